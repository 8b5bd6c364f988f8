"""How every screen looks. `pytest tests/tui/test_snapshots.py --snapshot-update` after looking at the report.

The figures are fixed here, so that a change of the memory model is no change of looks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import textual
from textual.pilot import Pilot
from textual.widgets import Input

from launcher.tui import advice, run_follower, sizing
from launcher.tui.app import VramwiseApp
from launcher.tui.screens import run as run_screen
from launcher.tui.screens import sizing_pickers
from planner.answers.plan import Advice, FrontierPoint
from planner.memory import Basis, Component, MemoryBreakdown, PhaseMemory
from planner.memory.breakdown import REPLAYED
from planner.setup.run import TrainingRun
from planner.throughput import StepEstimate

from . import synthetic
from .conftest import MakeApp, settle

# Another Textual draws borders, scroll bars and footers a little differently.
RECORDED_WITH = "8.2"
pytestmark = pytest.mark.skipif(
    ".".join(textual.__version__.split(".")[:2]) != RECORDED_WITH,
    reason=f"the snapshots were recorded with Textual {RECORDED_WITH}",
)

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
Before = Callable[[Pilot[None]], Awaitable[None]]


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


@pytest.fixture(autouse=True)
def fixed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fixed figures, a clock that stands still, and no path that differs between machines."""
    monkeypatch.setattr(sizing, "estimate_memory", fixed_memory)
    monkeypatch.setattr(sizing, "estimate_step", fixed_step)
    monkeypatch.setattr(advice, "work_out", fixed_advice)
    monkeypatch.setattr(run_follower, "estimate_memory", fixed_memory)
    monkeypatch.setattr(run_follower, "is_alive", lambda folder: True)
    monkeypatch.setattr(run_screen, "POLL_SECONDS", 3600.0)
    models = sizing_pickers.list_models()[:8]
    monkeypatch.setattr(sizing_pickers, "list_models", lambda: models)
    monkeypatch.chdir(tmp_path)


def then(*keys: str, theme: str | None = None) -> Before:
    """Press keys, wait, and stop what blinks."""

    async def before(pilot: Pilot[None]) -> None:
        if theme is not None:
            pilot.app.theme = theme
        await settle(pilot)
        for key in keys:
            await pilot.press(key)
            await settle(pilot)
        for field in pilot.app.screen.query(Input):
            field.cursor_blink = False
            field._cursor_visible = True
        await settle(pilot)

    return before


def relative_runs(app: VramwiseApp) -> VramwiseApp:
    app._runs_root = Path("runs")
    return app


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_sizing(snap_compare: Any, make_app: MakeApp, size: tuple[int, int]) -> None:
    assert snap_compare(make_app(), terminal_size=size, run_before=then())


def test_sizing_that_does_not_fit_in_the_light_theme(snap_compare: Any, make_app: MakeApp) -> None:
    before = then("right", "right", "right", theme="vramwise-light")
    assert snap_compare(make_app(), terminal_size=(120, 40), run_before=before)


def test_sizing_with_an_invalid_value(snap_compare: Any, make_app: MakeApp) -> None:
    assert snap_compare(make_app(), terminal_size=(80, 24), run_before=then("0", "down"))


def test_model_picker(snap_compare: Any, make_app: MakeApp) -> None:
    assert snap_compare(make_app(), terminal_size=(80, 24), run_before=then("m"))


def test_start_form(snap_compare: Any, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.tui.starting.refuse_what_cannot_start", lambda answer: None)
    app = relative_runs(make_app())
    assert snap_compare(app, terminal_size=(80, 24), run_before=then("t"))


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_run(snap_compare: Any, make_app: MakeApp, tmp_path: Path, size: tuple[int, int]) -> None:
    app = make_app(run=synthetic.half_way(tmp_path / "run"))
    assert snap_compare(app, terminal_size=size, run_before=then())


def test_runs(snap_compare: Any, make_app: MakeApp, tmp_path: Path) -> None:
    synthetic.half_way(tmp_path / "runs" / "first")
    synthetic.make_folder(tmp_path / "runs" / "second", model="qwen2.5-0.5b")
    app = relative_runs(make_app())
    assert snap_compare(app, terminal_size=(60, 20), run_before=then("o"))


def test_stop_question(snap_compare: Any, make_app: MakeApp, tmp_path: Path) -> None:
    app = make_app(run=synthetic.half_way(tmp_path / "run"))
    assert snap_compare(app, terminal_size=(80, 24), run_before=then("s"))
