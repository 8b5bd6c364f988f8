"""Every screen in each of its states, opened over sizing with figures that are fixed, so that a change
of the memory model is no change of looks.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.screen import Screen
from textual.widgets import Input
from textual.worker import get_current_worker

import launcher.tui.screens
from launcher.runs.folder import RunFolder
from launcher.tui import advice, longest, run_follower, sizing, starting
from launcher.tui.measured.calibrating import FittedRun, Heard
from launcher.tui.measured.own_runs import OwnRun
from launcher.tui.run_rows import RowReader
from launcher.tui.screens import accuracy, needs, reading, sizing_pickers, waiting
from launcher.tui.screens import run as run_screen
from launcher.tui.screens.accuracy import AccuracyScreen
from launcher.tui.screens.calibrate import CalibrateScreen
from launcher.tui.screens.compare_runs import CompareRuns
from launcher.tui.screens.confirm import Confirm
from launcher.tui.screens.data_picker import DataPicker
from launcher.tui.screens.help import Help
from launcher.tui.screens.needs import NeedsScreen
from launcher.tui.screens.picker import Picker
from launcher.tui.screens.reading import Opening, Reading
from launcher.tui.screens.run import RunScreen
from launcher.tui.screens.runs import RunsScreen
from launcher.tui.screens.sizing import SizingScreen
from launcher.tui.screens.start_run import StartRun
from launcher.tui.screens.waiting import Waiting
from planner.answers.plan import Advice, FrontierPoint, Longest
from planner.base.errors import InputError
from planner.memory import Basis, Component, MemoryBreakdown, PhaseMemory
from planner.memory.breakdown import REPLAYED
from planner.planning.cards_for import CardAnswer
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput import StepEstimate

from . import synthetic
from .conftest import settle

GIB = 2**30
PARTS = (
    ("weights_4bit", "weights in 4 bits", 6.15),
    ("weights_16bit", "weights kept in 16 bits", 2.9),
    ("constants", "quantisation constants", 0.2),
    ("adapter", "adapter", 0.13),
    ("gradients", "gradients", 0.13),
    ("optimizer", "optimizer", 0.13),
    ("activations", "activations", 2.75),
    ("workspace", "workspace", 0.2),
    ("context", "CUDA context", 0.87),
)


def every_screen_class() -> Iterator[type[Screen[Any]]]:
    """Every screen of the interface that is no other's base, by the code."""
    for module in pkgutil.iter_modules(launcher.tui.screens.__path__, "launcher.tui.screens."):
        importlib.import_module(module.name)
    todo: list[type[Screen[Any]]] = [Screen]
    while todo:
        for one in todo.pop().__subclasses__():
            own = [below for below in one.__subclasses__() if below.__module__.startswith("launcher.")]
            if one.__module__.startswith("launcher.") and not own:
                yield one
            todo.append(one)


def fixed_memory(run: TrainingRun, **_: object) -> MemoryBreakdown:
    """Figures that only grow with the length."""
    factor = {"activations": run.micro_step.tokens / 4096}
    components = tuple(
        Component(name=n, title=t, size_bytes=int(g * factor.get(n, 1.0) * GIB), origin="fixed")
        for n, t, g in PARTS
    )
    total = sum(component.size_bytes for component in components)
    phases = tuple(
        PhaseMemory(
            name=name,
            peak_moment="backward of decoder layer 47",
            allocated_bytes=int(total * share) - 2 * GIB,
            reserved_bytes=int(total * share) - GIB,
            process_bytes=int(total * share),
            process_upper_bytes=int(total * share * 1.03),
        )
        for name, share in (("load", 0.7), ("step", 1.0), ("evaluation", 0.98), ("save", 0.99))
    )
    return MemoryBreakdown(
        weights_bytes=9 * GIB,
        allocated_bytes=total - 2 * GIB,
        reserved_bytes=total - GIB,
        process_bytes=total,
        process_upper_bytes=int(total * 1.03),
        components=components,
        phases=phases,
        basis=Basis(
            coefficients="fixed", record_count=0, stack_versions=(), measured=False, reserve=REPLAYED
        ),
    )


def fixed_step(*_: object) -> StepEstimate:
    """One forecast for all setups."""
    return StepEstimate(
        seconds_per_micro_step=12.0,
        seconds_per_optimizer_step=204.0,
        tokens_per_second=321.0,
        tokens_per_second_low=209.0,
        tokens_per_second_high=481.0,
        matrix_flops=1e15,
        bytes_moved=1e11,
        roofline_tokens_per_second=700.0,
        bound_by="compute",
        calibrated=False,
        basis="roofline of the card; not calibrated on this GPU",
    )


def fixed_advice(answer: sizing.Sizing, _: object) -> advice.Suggestions:
    """One change that can be applied, and a frontier of three."""
    offer = Advice(
        title="length 2,048",
        flags="--max-length 2048",
        effect="longer examples are cut",
        peak_upper_bytes=12 * GIB,
        change_bytes=-GIB,
        fits=True,
        tokens_per_second=400.0,
        setup=answer.setup.replace(max_length=2048),
    )
    compiled = answer.setup.replace(compile="regional")
    points = tuple(
        FrontierPoint(
            strategy=strategy,
            setup=setup,
            peak_upper_bytes=gib * GIB,
            tokens_per_second=rate,
            hours=1000 / rate,
            fits=gib < 16,
            chosen=gib == 15,
        )
        for strategy, setup, gib, rate in (
            ("checkpointed", answer.setup, 14, 321.0),
            ("compiled, checkpointed", compiled, 15, 385.0),
            ("compiled, not checkpointed", compiled.replace(gradient_checkpointing=False), 37, 530.0),
        )
    )
    return advice.Suggestions(offers=(offer,), points=points)


def fixed_longest(request: Any, *_: object) -> Longest:
    """Five times the length."""
    setup = TrainingSetup(model=request.model, max_length=20480)
    return Longest(
        max_length=20480,
        peak_upper_bytes=15 * GIB,
        tokens_per_second=262.0,
        reaches_model_limit=False,
        setup=setup,
    )


def fixed_cards(asked: Any) -> Iterator[CardAnswer]:
    """One that does it, one that is too small."""
    setup = TrainingSetup(model=asked.request.model, max_length=4096)
    yield CardAnswer(
        gpu="24GB",
        name="rtx-4090",
        kind="desktop",
        fits=True,
        setup=setup,
        usable_bytes=23 * GIB,
        peak_upper_bytes=14 * GIB,
        tokens_per_second=1500.0,
        hours=5.5,
        hours_low=4.0,
        hours_high=7.25,
        usd_per_gpu_hour=0.16,
        usd=0.88,
    )
    yield CardAnswer(
        gpu="8GB",
        name="rtx-4060",
        kind="desktop",
        fits=False,
        setup=setup,
        usable_bytes=7 * GIB,
        peak_upper_bytes=14 * GIB,
    )


def own_runs(_: object) -> tuple[tuple[OwnRun, ...], tuple[str, ...]]:
    """Three measured runs, one without a forecast."""
    runs = [
        OwnRun(
            id=f"run-{at}",
            created=f"2026-11-0{at}",
            source="train",
            model=model,
            method="qlora",
            gpu="rtx-3060-12gb",
            outcome="ok",
            measured_bytes=int(measured * GIB),
            predicted_bytes=None if predicted is None else int(predicted * GIB),
            measured_rate=rate,
            predicted_rate=forecast,
        )
        for at, model, measured, predicted, rate, forecast in (
            (1, "llama-3.1-8b", 9.5, 9.52, 470.0, 458.0),
            (2, "qwen2.5-7b", 11.2, 10.6, 520.0, 660.0),
            (3, "smollm2-135m", 2.1, None, 9800.0, None),
        )
    ]
    return tuple(runs), ()


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fixed figures, a clock that stands still, and no path that differs between machines."""
    monkeypatch.setattr(sizing, "estimate_memory", fixed_memory)
    monkeypatch.setattr(sizing, "estimate_step", fixed_step)
    monkeypatch.setattr(advice, "work_out", fixed_advice)
    monkeypatch.setattr(longest, "longest_context", fixed_longest)
    monkeypatch.setattr(needs, "cards_for", fixed_cards)
    monkeypatch.setattr(accuracy, "own_runs", own_runs)
    monkeypatch.setattr(starting, "refuse_what_cannot_start", lambda answer: None)
    monkeypatch.setattr(run_follower, "estimate_memory", fixed_memory)
    monkeypatch.setattr(run_follower, "is_alive", lambda folder: True)
    monkeypatch.setattr(run_screen, "POLL_SECONDS", 3600.0)
    for module in (waiting, reading):
        monkeypatch.setattr(module, "seconds", lambda _: "12 s")
    models = sizing_pickers.list_models()[:8]
    monkeypatch.setattr(sizing_pickers, "list_models", lambda: models)
    monkeypatch.chdir(tmp_path)


Open = Callable[[Pilot[None]], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class View:
    """A screen in a state: how one comes to it from sizing."""

    name: str
    screen: type[Screen[Any]] | None
    """None: one of Textual's own."""
    open: Open
    once: bool = False
    """Whether another view shows the same screen at all sizes, so that one size is enough."""


def pressed(*keys: str) -> Open:
    async def opened(pilot: Pilot[None]) -> None:
        for key in keys:
            await pilot.press(key)
            await settle(pilot)

    return opened


def pushed(make: Callable[[], Screen[Any]], *keys: str) -> Open:
    async def opened(pilot: Pilot[None]) -> None:
        await pilot.app.push_screen(make())
        await settle(pilot)
        await pressed(*keys)(pilot)

    return opened


def run() -> RunScreen:
    folder = Path("runs/first")
    return RunScreen(RunFolder(folder) if folder.exists() else synthetic.half_way(folder))


def finished() -> RunScreen:
    folder = Path("runs/over")
    if not folder.exists():
        synthetic.append(synthetic.half_way(folder).events, synthetic.end("finished", 240))
    return RunScreen(RunFolder(folder))


def compared() -> CompareRuns:
    run(), finished()
    one, other = (RowReader().read(RunFolder(Path("runs") / name)) for name in ("first", "over"))
    assert one is not None
    assert other is not None
    return CompareRuns(one, other)


def working(make: Callable[[], Screen[Any]]) -> Open:
    """Of a screen that works until it is left."""

    async def opened(pilot: Pilot[None]) -> None:
        await pilot.app.push_screen(make())
        await pilot.pause()

    return opened


def reading_on() -> Reading:
    def read() -> Any:
        worker = get_current_worker()
        while not worker.is_cancelled:
            time.sleep(0.01)
        raise InputError("left")

    return Reading(Opening(name="llama-3.1-8b", read=read))


def waiting_on() -> Waiting:
    reason = "GPU 0: the run first has it, which is at step 240 of 400"
    return Waiting(reason, lambda: reason)


async def calibrated(pilot: Pilot[None]) -> None:
    """After a calibration that found something."""
    await pressed("escape", "b")(pilot)
    screen = pilot.app.screen
    runs = tuple(
        FittedRun(model=f"model-{at % 3}", allocated=0.001 * at, reserved=0.004 * (-1) ** at, process=None)
        for at in range(12)
    )
    for at in range(1, 13):
        screen.post_message(CalibrateScreen.Said(Heard(f"model-{at % 3}: ok", ended=at, total=12)))
    screen.post_message(CalibrateScreen.Ended(runs, ""))
    await settle(pilot)


VIEWS = (
    View(name="sizing", screen=SizingScreen, open=pressed()),
    View(name="a list of choices", screen=SizingScreen, open=pressed("up", "enter"), once=True),
    View(name="an invalid value", screen=SizingScreen, open=pressed("0", "down"), once=True),
    View(name="cards", screen=Picker, open=pressed("g")),
    View(name="models", screen=Picker, open=pressed("m"), once=True),
    View(name="data", screen=DataPicker, open=pressed("d")),
    View(name="help", screen=Help, open=pressed("question_mark")),
    View(name="needs", screen=NeedsScreen, open=pressed("n")),
    View(name="start form", screen=StartRun, open=pressed("t")),
    View(name="run", screen=RunScreen, open=pushed(run)),
    View(name="stop question", screen=Confirm, open=pushed(run, "s")),
    View(name="finished run", screen=RunScreen, open=pushed(finished), once=True),
    View(name="runs", screen=RunsScreen, open=pressed("o")),
    View(name="compared runs", screen=CompareRuns, open=pushed(compared)),
    View(name="accuracy", screen=AccuracyScreen, open=pressed("escape", "e")),
    View(name="calibrate", screen=CalibrateScreen, open=pressed("escape", "b"), once=True),
    View(name="calibrated", screen=CalibrateScreen, open=calibrated),
    View(name="waiting", screen=Waiting, open=working(waiting_on)),
    View(name="reading", screen=Reading, open=working(reading_on)),
    View(name="command palette", screen=None, open=pressed("ctrl+p"), once=True),
)


async def back(pilot: Pilot[None], start: TrainingSetup) -> SizingScreen:
    """To the sizing screen as it was opened."""
    while not isinstance(pilot.app.screen, SizingScreen):
        await pilot.app.pop_screen()
    screen = pilot.app.screen
    screen._put(start, start.optim)
    pilot.app.clear_notifications()
    field = screen.query_one("#knob-max_length", Input)
    if screen.focused is not field:
        screen.set_focus(None)
        field.focus()
    await settle(pilot)
    return screen
