from __future__ import annotations

import itertools
import shlex
import threading
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, OptionList, Static

from launcher.tui import cards, starting
from launcher.tui.advice import work_out
from launcher.tui.command_line import request_of
from launcher.tui.longest import OvertakenError, find_longest, question_of
from launcher.tui.screens import sizing_workers
from launcher.tui.screens.picker import Picker
from launcher.tui.screens.sizing import SizingScreen
from launcher.tui.screens.sizing_messages import Refined
from launcher.tui.sizing import NO_WISHES, Sizing, Verdict, evaluator_of, refine
from launcher.tui.themes import DARK
from launcher.tui.widgets.sizing.choice_knob import ChoiceKnob
from launcher.tui.widgets.sizing.pick_button import PickButton
from launcher.tui.widgets.sizing.verdict_line import VerdictLine
from planner.base.errors import InputError, MissingExtraError
from planner.commands import plan
from planner.commands.program import Parser
from planner.memory import estimate_memory
from planner.planning.longest import longest_context
from planner.planning.make_plan import make_plan
from planner.setup import defaults
from planner.setup.request import make_request
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

from .conftest import MakeApp, Scene, joins, play, settle

SIZE = (120, 40)
SIZED: list[Scene] = []
"""Of a screen that shows START."""
TABLES: list[Scene] = []
"""Of its knobs, many values each."""
OPENED: list[Scene] = []
"""What opens over it."""
START = TrainingSetup(
    model="qwen2.5-14b", max_length=4096, gradient_accumulation_steps=16, optim=defaults.OPTIM
)


def screen_of(pilot: Pilot[None]) -> SizingScreen:
    screen = pilot.app.screen
    assert isinstance(screen, SizingScreen)
    return screen


def verdict_of(pilot: Pilot[None]) -> Verdict:
    sizing = screen_of(pilot).sizing
    assert sizing is not None
    return sizing.verdict


def shown_text(pilot: Pilot[None]) -> str:
    """All text on the screen, line by line."""
    return "\n".join(
        "".join(segment.text for segment in strip) for strip in pilot.app.screen._compositor.render_strips()
    )


async def type_into(pilot: Pilot[None], field: str, text: str) -> None:
    """As pasted: typed, each character would be answered."""
    knob = screen_of(pilot).query_one(f"#knob-{field}", Input)
    knob.focus()
    await pilot.pause()
    knob.value = text
    await pilot.pause()
    await settle(pilot)


async def type_into_without_waiting(pilot: Pilot[None], field: str, text: str) -> None:
    knob = screen_of(pilot).query_one(f"#knob-{field}", Input)
    knob.focus()
    await pilot.pause()
    knob.action_select_all()
    await pilot.press(*text)


async def filter_by(pilot: Pilot[None], text: str) -> None:
    """As pasted into a picker's filter: at every key that is typed all models are listed anew."""
    pilot.app.screen.query_one(Input).value = text
    await settle(pilot)


async def begin_anew(pilot: Pilot[None]) -> None:
    """As the app was opened: no screen over sizing, START on its card, the length in focus."""
    while not isinstance(pilot.app.screen, SizingScreen):
        await pilot.app.pop_screen()
    pilot.app.theme = DARK.name
    screen = screen_of(pilot)
    screen._card = cards.card_from_text("16GB")
    screen._put(START, defaults.OPTIM)
    screen.query_one("#knob-max_length").focus()
    await settle(pilot)
    assert screen.sizing is not None
    assert (screen.sizing.setup, screen.sizing.refined) == (START, True)
    assert not screen.query(".knob-error.shown")


@pytest.mark.parametrize("scenes", [SIZED, TABLES, OPENED], ids=["on it", "of its knobs", "over it"])
async def test_the_screen_that_is_open(make_app: MakeApp, tmp_path: Path, scenes: list[Scene]) -> None:
    async with make_app().run_test(size=SIZE) as pilot:
        await settle(pilot)
        await play(scenes, pilot, tmp_path, begin=begin_anew)


async def test_the_figures_are_those_of_plan_once_they_are_refined(make_app: MakeApp) -> None:
    async with make_app().run_test(size=SIZE) as pilot:
        await settle(pilot)
        sizing = screen_of(pilot).sizing
        assert sizing is not None
        fixed = {"max_length": 4096, "gradient_checkpointing": True, "compile": "none"}
        plan = make_plan(make_request("qwen2.5-14b", gpu="16GB", knobs=fixed), whole=False)
        assert plan.setup == sizing.setup
        assert sizing.memory == plan.memory
        assert f"needs {plan.memory.peak_bytes / 2**30:.1f} GiB" in shown_text(pilot)
        assert "refining" not in shown_text(pilot)
        assert "FITS" in shown_text(pilot)
        assert "uncalibrated" in shown_text(pilot)
        # The longest sequences are those of `plan --longest`, whatever length is sized, and one key away.
        request, target = make_request("qwen2.5-14b", gpu="16GB"), sizing.card.target
        longest = longest_context(request, target, evaluator_of(sizing.model, sizing.card, NO_WISHES))
        assert longest is not None
        assert f"longest {longest.max_length:,} tokens at" in shown_text(pilot)
        await pilot.press("escape", "l")
        assert screen_of(pilot).sizing.setup == longest.setup  # type: ignore[union-attr]
        assert f"longest {longest.max_length:,} tokens at" in shown_text(pilot)
        await pilot.press("u")
        assert screen_of(pilot).sizing.setup == plan.setup  # type: ignore[union-attr]
        asked, counted = question_of(sizing), itertools.count()
        with pytest.raises(OvertakenError):
            find_longest(sizing, lambda: next(counted) == 5)
        assert next(counted) == 6
        # What decides it is asked anew, its answer before is not shown meanwhile.
        screen_of(pilot).query_one("#knob-method", ChoiceKnob).value = "lora"
        await pilot.pause()
        assert question_of(screen_of(pilot).sizing) != asked  # type: ignore[arg-type]
        assert f"longest {longest.max_length:,} tokens" not in shown_text(pilot)


@joins(SIZED)
async def a_longer_length_changes_the_verdict(pilot: Pilot[None], _: Path) -> None:
    assert verdict_of(pilot) is Verdict.FITS
    await type_into(pilot, "max_length", "65536")
    assert verdict_of(pilot) is Verdict.DOES_NOT_FIT
    assert "DOES NOT FIT" in shown_text(pilot)
    await type_into(pilot, "max_length", "4096")
    assert verdict_of(pilot) is Verdict.FITS


@joins(SIZED)
async def arrows_step_through_values_and_knobs(pilot: Pilot[None], _: Path) -> None:
    await pilot.press("right")
    assert screen_of(pilot).sizing.setup.max_length == 6144  # type: ignore[union-attr]
    await pilot.press("down", "right")
    assert screen_of(pilot).sizing.setup.per_device_train_batch_size == 2  # type: ignore[union-attr]
    await pilot.press("up", "up", "right")
    assert screen_of(pilot).sizing.setup.method == "lora"  # type: ignore[union-attr]


async def test_a_change_is_answered_by_the_fitted_estimate_and_then_refined(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()

    def waits(answer: Sizing) -> Sizing:
        let_go.wait(300)
        return refine(answer)

    async with make_app().run_test(size=SIZE) as pilot:
        await settle(pilot)
        monkeypatch.setattr(sizing_workers, "refine", waits)
        await pilot.press("right")
        first = screen_of(pilot).sizing
        assert first is not None
        assert first.setup.max_length == 6144
        assert first.memory == estimate_memory(
            TrainingRun(setup=first.setup, model=first.model), gpu=first.card.spec
        )
        assert "refining" in shown_text(pilot)
        let_go.set()
        await settle(pilot)
        second = screen_of(pilot).sizing
        assert second is not None
        assert second.refined
        assert second.setup == first.setup
        assert second.memory.peak_bytes != first.memory.peak_bytes
        assert "refining" not in shown_text(pilot)


async def test_a_refined_answer_that_was_overtaken_is_not_shown(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_app().run_test(size=SIZE) as pilot:
        await settle(pilot)
        old = screen_of(pilot).sizing
        await pilot.press("right")
        now = screen_of(pilot).sizing
        assert old is not None
        screen_of(pilot).post_message(Refined(old, old))
        await pilot.pause()
        assert screen_of(pilot).sizing is not None
        assert screen_of(pilot).sizing.setup == now.setup  # type: ignore[union-attr]


async def test_a_refined_answer_does_not_hide_that_a_value_is_invalid(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing_workers, "PAUSE_SECONDS", 0.3)
    async with make_app().run_test(size=SIZE) as pilot:
        await type_into_without_waiting(pilot, "lora_r", "8")
        screen_of(pilot).query_one("#knob-lora_r", Input).value = "0"
        await settle(pilot)
        assert screen_of(pilot).query_one(VerdictLine).stale


HOW_IT_RUNS = (
    ("compile", "regional", "regional"),
    ("kernels", "liger", "liger"),
    ("attn_implementation", "eager", "eager"),
    ("attn_implementation", "auto", None),
    ("selective_checkpointing", "on", True),
    ("train_sampling_strategy", "group_by_length", "group_by_length"),
)


@joins(TABLES)
async def what_changes_how_layers_and_batches_run_has_a_knob(pilot: Pilot[None], _: Path) -> None:
    await settle(pilot)
    for field, value, expected in HOW_IT_RUNS:
        knob = screen_of(pilot).query_one(f"#knob-{field}", ChoiceKnob)
        before, knob.value = knob.value, value
        await settle(pilot)
        sizing = screen_of(pilot).sizing
        assert sizing is not None
        assert not screen_of(pilot).query(".knob-error.shown"), field
        assert getattr(sizing.setup, field) == expected, field
        knob.value = before
        await settle(pilot)


async def test_a_knob_that_the_others_leave_no_meaning_is_disabled_and_comes_back(make_app: MakeApp) -> None:
    async with make_app(model="qwen2.5-0.5b").run_test(size=SIZE) as pilot:
        screen = screen_of(pilot)
        budget = screen.query_one("#knob-activation_memory_budget", Input)
        assert budget.disabled
        screen.query_one("#knob-compile", ChoiceKnob).value = "regional"
        screen.query_one("#knob-gradient_checkpointing", ChoiceKnob).value = "off"
        await settle(pilot)
        assert not budget.disabled
        assert screen.query_one("#knob-selective_checkpointing").disabled
        await type_into(pilot, "activation_memory_budget", "0.5")
        assert screen.sizing.setup.activation_memory_budget == 0.5  # type: ignore[union-attr]
        screen.query_one("#knob-compile", ChoiceKnob).value = "none"
        await settle(pilot)
        assert screen.sizing.setup.activation_memory_budget is None  # type: ignore[union-attr]
        screen.query_one("#knob-compile", ChoiceKnob).value = "regional"
        await settle(pilot)
        assert screen.sizing.setup.activation_memory_budget == 0.5  # type: ignore[union-attr]


@joins(SIZED)
async def only_the_label_of_the_knob_in_focus_is_lit(pilot: Pilot[None], _: Path) -> None:
    await pilot.press("down", "down")
    await pilot.pause()
    lit = [row for row in screen_of(pilot).query(".knob-row") if row.has_class("focused")]
    assert [row.query_one("NumberKnob").id for row in lit] == ["knob-gradient_accumulation_steps"]


async def test_a_point_of_the_frontier_is_taken_with_enter(make_app: MakeApp) -> None:
    async with make_app().run_test(size=SIZE) as pilot:
        await settle(pilot)
        points = screen_of(pilot).query_one("#frontier-list", OptionList)
        assert points.option_count > 2
        points.focus()
        plan = make_plan(make_request("qwen2.5-14b", gpu="16GB"), whole=False)
        # Beside the plan's own points the list has what the screen shows now.
        shown = work_out(screen_of(pilot).sizing).points  # type: ignore[arg-type]
        assert {point.setup for point in plan.frontier} < {point.setup for point in shown}
        chosen = next(index for index, point in enumerate(shown) if point.chosen)
        assert chosen > 0
        await pilot.press("home", *["down"] * chosen, "enter")
        await settle(pilot)
        sizing = screen_of(pilot).sizing
        assert sizing is not None
        assert sizing.setup == plan.setup
        assert sizing.memory == plan.memory


INVALID = (
    ("max_length", "0", "a whole number from 1 to"),
    ("max_length", "99999999999", "a whole number from 1 to"),
    ("per_device_train_batch_size", "1.5", "a whole number from 1 to"),
    ("lora_r", "0", "a whole number from 1 to"),
    ("lora_dropout", "2", "a number from 0 to 0.99"),
    ("target_modules", "nosuch", "nosuch"),
)


@joins(TABLES)
async def an_invalid_value_says_so_under_its_knob_and_keeps_the_answer(pilot: Pilot[None], _: Path) -> None:
    await settle(pilot)
    screen = screen_of(pilot)
    for field, text, says in INVALID:
        before, knob = screen.sizing, screen.query_one(f"#knob-{field}", Input)
        valid, knob.value = knob.value, text
        await settle(pilot)
        message = screen.query_one(f"#error-{field}", Static)
        assert message.display, (field, text)
        assert field in str(message.content)
        assert says in str(message.content)
        assert screen.sizing is before
        assert screen.query_one(VerdictLine).stale, (field, text)
        assert knob.value == text
        knob.value = valid
        await settle(pilot)
        assert not screen.query_one(VerdictLine).stale, (field, text)


@joins(SIZED)
async def a_valid_value_takes_the_message_away(pilot: Pilot[None], _: Path) -> None:
    await type_into(pilot, "lora_r", "0")
    assert screen_of(pilot).query(".knob-error.shown")
    await type_into(pilot, "lora_r", "8")
    assert not screen_of(pilot).query(".knob-error.shown")
    assert not screen_of(pilot).query_one(VerdictLine).stale


async def test_full_fine_tuning_puts_the_adapters_knobs_aside_and_brings_them_back(make_app: MakeApp) -> None:
    async with make_app(model="qwen2.5-0.5b").run_test(size=SIZE) as pilot:
        await type_into(pilot, "lora_dropout", "0.1")
        screen_of(pilot).query_one("#knob-method", ChoiceKnob).value = "full"
        await settle(pilot)
        assert screen_of(pilot).query_one("#knob-lora_dropout").disabled
        assert screen_of(pilot).sizing.setup.method == "full"  # type: ignore[union-attr]
        screen_of(pilot).query_one("#knob-method", ChoiceKnob).value = "qlora"
        await settle(pilot)
        assert screen_of(pilot).sizing.setup.lora_dropout == 0.1  # type: ignore[union-attr]


@joins(OPENED)
async def filtering_picks_a_model(pilot: Pilot[None], _: Path) -> None:
    await pilot.press("m")
    assert isinstance(pilot.app.screen, Picker)
    await filter_by(pilot, "llama 3.1 8b")
    rows = pilot.app.screen.query_one(OptionList)
    assert 1 <= rows.option_count < 10
    await pilot.press("enter")
    await settle(pilot)
    assert screen_of(pilot).sizing.model.id == "llama-3.1-8b"  # type: ignore[union-attr]
    assert "8.03B" in shown_text(pilot)


@joins(OPENED)
async def a_picker_shows_which_models_fit(pilot: Pilot[None], _: Path) -> None:
    await pilot.press("m", *"qwen2.5-")
    await settle(pilot)
    text = shown_text(pilot)
    assert "✔" in text
    assert "✘" in text


@joins(OPENED)
async def an_unknown_model_says_so_and_changes_nothing(pilot: Pilot[None], _: Path) -> None:
    await pilot.press("m")
    await filter_by(pilot, "qwen9.5")
    await pilot.press("enter")
    await settle(pilot)
    assert "unknown model" in str(screen_of(pilot).query_one("#error-model", Static).content)
    assert screen_of(pilot).sizing.model.id == "qwen2.5-14b"  # type: ignore[union-attr]


@joins(OPENED)
async def filtering_picks_a_card(pilot: Pilot[None], _: Path) -> None:
    for typed, usable in (("rtx-4090", 24), ("80GB", 80)):
        await pilot.press("g")
        await filter_by(pilot, typed)
        await pilot.press("enter")
        await settle(pilot)
        sizing = screen_of(pilot).sizing
        assert sizing is not None
        assert (usable - 2) * 2**30 < sizing.card.usable_bytes < usable * 2**30, typed


async def test_detected_cards_come_first(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    here = cards.Card(target=cards.card_from_text("t4").target, group=cards.DETECTED, argument=None)
    app = make_app()
    monkeypatch.setattr(cards, "detected_cards", lambda: (here,))
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press("g")
        first = pilot.app.screen.query_one(OptionList).get_option_at_index(0)
        assert "this machine" in str(first.prompt)


async def test_the_automatic_choice_is_applied_and_fits(make_app: MakeApp) -> None:
    async with make_app(gpu="80GB").run_test(size=SIZE) as pilot:
        await settle(pilot)
        before = screen_of(pilot).sizing
        await pilot.press("a")
        await settle(pilot)
        after = screen_of(pilot).sizing
        assert before is not None
        assert after is not None
        assert after.verdict is Verdict.FITS
        assert after.setup.effective_batch_size == before.setup.effective_batch_size
        assert after.step.tokens_per_second > before.step.tokens_per_second  # type: ignore[union-attr]
        knob = screen_of(pilot).query_one("#knob-per_device_train_batch_size", Input)
        assert knob.value == str(after.setup.per_device_train_batch_size)


@pytest.mark.parametrize(("picked", "ends_with"), [(None, "adamw_8bit"), ("adamw_torch_fused", None)])
async def test_an_optimizer_that_a_search_took_is_no_wish_and_a_picked_one_is(
    make_app: MakeApp, picked: str | None, ends_with: str | None
) -> None:
    """On a roomy card the search takes a faster optimizer; on a small one it may take the default again."""
    async with make_app(model="qwen2.5-1.5b", gpu="80GB").run_test(size=SIZE) as pilot:
        await settle(pilot)
        await pilot.press("a")
        await settle(pilot)
        screen = screen_of(pilot)
        assert screen.sizing is not None
        assert screen.sizing.setup.optim == "adamw_torch_fused"
        if picked is not None:
            knob = screen.query_one("#knob-optim", ChoiceKnob)
            for value in ("adamw_8bit", picked):
                knob.value = value
                await settle(pilot)
        await pilot.press("g")
        await pilot.press(*"8GB", "enter")
        await settle(pilot)
        shown = work_out(screen.sizing).points
        await pilot.press("a")
        await settle(pilot)
        plan = make_plan(
            make_request(
                "qwen2.5-1.5b", gpu="8GB", knobs={"max_length": 4096, **({"optim": picked} if picked else {})}
            ),
            whole=False,
        )
        assert screen.sizing.setup == plan.setup
        assert screen.sizing.setup.optim == (ends_with or picked)
        assert plan.setup in {point.setup for point in shown}


@pytest.mark.parametrize("knobs", [{}, {"max_length": 32768}], ids=["fits", "does not fit"])
async def test_advice_is_that_of_a_plan_with_every_knob_fixed(
    make_app: MakeApp, knobs: dict[str, Any]
) -> None:
    """Seen the other way: by searches of its own, with what the form had fixed left open."""
    async with make_app(**knobs).run_test(size=SIZE) as pilot:
        await settle(pilot)
        sizing = screen_of(pilot).sizing
        assert sizing is not None
        plan = make_plan(request_of(sizing))
        assert plan.setup == sizing.setup
        assert plan.memory.peak_upper_bytes == sizing.memory.peak_upper_bytes
        assert len(plan.advice) >= 2
        assert work_out(sizing).offers == plan.advice
        listed = screen_of(pilot).query_one("#advice-list", OptionList)
        lines = [str(listed.get_option_at_index(index).prompt) for index in range(listed.option_count)]
        assert len(lines) == len(plan.advice)
        for line, row in zip(lines, plan.advice, strict=True):
            assert row.title[:16] in line
            assert f"{row.peak_upper_bytes / 2**30:,.1f} GiB" in line


async def test_a_change_that_runs_in_another_way_says_in_which(make_app: MakeApp) -> None:
    async with make_app().run_test(size=SIZE) as pilot:
        await settle(pilot)
        (line,) = [
            line for line in shown_text(pilot).splitlines() if "how it runs left to the plan (" in line
        ]
        assert "+" in line
        await pilot.press("a")
        await settle(pilot)
        assert "how it runs" not in shown_text(pilot)


async def test_advice_is_applied_with_enter(make_app: MakeApp) -> None:
    async with make_app(max_length=32768).run_test(size=SIZE) as pilot:
        await settle(pilot)
        assert verdict_of(pilot) is not Verdict.FITS
        advice = screen_of(pilot).query_one("#advice-list", OptionList)
        assert advice.option_count
        advice.focus()
        await pilot.press("home", "enter")
        await settle(pilot)
        assert verdict_of(pilot) is Verdict.FITS


async def test_advice_is_given_whatever_else_the_setup_has(make_app: MakeApp) -> None:
    """16-bit LoRA has no 4-bit base to prepare: the change takes that with it."""
    async with make_app(model="qwen2.5-0.5b", gpu="24GB", prepare_for_kbit_training=True).run_test(
        size=SIZE
    ) as pilot:
        await settle(pilot)
        found = work_out(screen_of(pilot).sizing)  # type: ignore[arg-type]
        (change,) = [offer for offer in found.offers if offer.title == "16-bit LoRA"]
        assert change.setup is not None
        assert change.setup.method == "lora"
        assert not change.setup.prepare_for_kbit_training
        assert "16-bit LoRA" in shown_text(pilot)


async def test_why_there_is_no_advice_is_said(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise InputError("the effective batch cannot be had")

    monkeypatch.setattr(sizing_workers.advice, "work_out", refuse)
    async with make_app().run_test(size=SIZE) as pilot:
        await settle(pilot)
        assert "the effective batch cannot be had" in shown_text(pilot)


async def test_the_command_line_is_copied(make_app: MakeApp) -> None:
    async with make_app(lora_r=32).run_test(size=SIZE) as pilot:
        await pilot.press("c")
        await pilot.pause()
        copied = pilot.app.clipboard
        assert copied.startswith("vramwise plan --model qwen2.5-14b --gpu 16GB ")
        assert "--max-length 4096" in copied
        assert "--lora-r 32" in copied


@pytest.mark.parametrize(
    "knobs",
    [
        {"lora_r": 32, "lora_dropout": 0.05, "target_modules": ("q_proj", "v_proj"), "use_rslora": True},
        {"optim": "paged_adamw_8bit"},
        # With a small model and batch a plan takes another optimizer where none is told.
        {"model": "smollm2-135m", "max_length": 2048, "gradient_accumulation_steps": 4},
    ],
)
async def test_the_copied_command_means_the_same_setup(make_app: MakeApp, knobs: dict[str, Any]) -> None:
    async with make_app(**knobs).run_test(size=SIZE) as pilot:
        await pilot.press("c")
        await pilot.pause()
        sizing = screen_of(pilot).sizing
        parser = Parser()
        plan.add_arguments(parser)
        words = shlex.split(pilot.app.clipboard)
        assert words[:2] == ["vramwise", "plan"]
        args = parser.parse_args(words[2:])
        assert sizing is not None
        assert make_plan(plan.request_from(args), whole=False).setup == sizing.setup


async def test_training_without_the_training_stack_says_what_to_install(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise MissingExtraError("training", "torch")

    monkeypatch.setattr(starting, "refuse_what_cannot_start", refuse)
    async with make_app().run_test(size=SIZE, notifications=True) as pilot:
        await pilot.press("t")
        # Not until all is worked out: by then it is gone again.
        await pilot.pause(0.1)
        assert "vramwise[train]" in shown_text(pilot)


@joins(OPENED)
async def a_missing_data_file_is_told_in_the_form(pilot: Pilot[None], tmp_path: Path) -> None:
    await pilot.press("t")
    await settle(pilot)
    await pilot.press(*str(tmp_path / "absent.jsonl"), "ctrl+s")
    await settle(pilot)
    message = pilot.app.screen.query_one("#start-error-data", Static)
    assert message.display
    assert "a file that exists" in str(message.content)
    assert not (tmp_path / "runs").exists()


@joins(OPENED)
async def markup_and_control_characters_in_a_name_are_shown_not_obeyed(pilot: Pilot[None], _: Path) -> None:
    await pilot.press("m")
    name = "[red]x[/red]\x1b[31m\x07"
    pilot.app.screen.dismiss(name)
    await settle(pilot)
    text = str(screen_of(pilot).query_one("#error-model", Static).content)
    assert "[red]x[/red]" in text
    assert "\x1b" not in shown_text(pilot)
    screen_of(pilot).form.show_picks(model=name, gpu=name, data=name)
    await pilot.pause()
    assert "\x1b" not in screen_of(pilot).query_one("#pick-model", PickButton).value


@joins(SIZED)
async def every_change_answers_at_once(pilot: Pilot[None], _: Path) -> None:
    await settle(pilot)
    screen = screen_of(pilot)
    texts = screen.form.texts
    shown = []
    for length in (1000, 2000, 4000):
        # No await lies between the change and its answer: nothing is left to a worker.
        screen._answer({**texts, "max_length": str(length)})
        screen.workers.cancel_group(screen, "work-out")
        await pilot.pause()
        shown.append(shown_text(pilot))
    assert len(set(shown)) == len(shown)


async def test_the_verdict_and_the_focused_knob_are_in_sight_at_every_size(make_app: MakeApp) -> None:
    async with make_app().run_test(size=(60, 20)) as pilot:
        await settle(pilot)
        for size in ((60, 20), (80, 24), (120, 40), (160, 50)):
            screen_of(pilot).query_one("#knob-max_length").focus()
            await pilot.resize_terminal(*size)
            await settle(pilot)
            text = shown_text(pilot)
            assert "FITS" in text, size
            assert "max length" in text, size
            screen_of(pilot).query_one("#knob-train_sampling_strategy").focus()
            await settle(pilot)
            assert "random" in shown_text(pilot), size


@joins(OPENED)
async def the_command_palette_and_the_light_theme_work(pilot: Pilot[None], _: Path) -> None:
    pilot.app.theme = "vramwise-light"
    await pilot.press("ctrl+p")
    await pilot.pause()
    assert type(pilot.app.screen).__name__ == "CommandPalette"
    await pilot.press("escape", "escape", "question_mark")
    await pilot.pause()
    assert type(pilot.app.screen).__name__ == "Help"


async def test_every_key_of_the_screens_has_an_id_and_a_tooltip() -> None:
    from launcher.tui.app import VramwiseApp
    from launcher.tui.screens.compare_runs import CompareRuns
    from launcher.tui.screens.data_picker import DataPicker
    from launcher.tui.screens.needs import NeedsScreen
    from launcher.tui.screens.run import RunScreen
    from launcher.tui.screens.runs import RunsScreen

    screens = (SizingScreen, RunScreen, RunsScreen, CompareRuns, NeedsScreen, Picker, DataPicker)
    for owner in (VramwiseApp, *screens):
        for binding in owner.BINDINGS:
            assert binding.id, binding  # type: ignore[union-attr]
            if binding.show:  # type: ignore[union-attr]
                assert binding.tooltip, binding  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["advice", "frontier"])
async def test_lines_of_setups_tell_by_sign_whether_they_fit_and_by_word_where_there_is_room(
    make_app: MakeApp, name: str
) -> None:
    length = 16384 if name == "advice" else 4096
    async with make_app(max_length=length).run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        sizing = screen_of(pilot).sizing
        assert sizing is not None
        found = work_out(sizing)
        items = found.offers if name == "advice" else found.points
        assert any(item.fits for item in items)
        for size, fits, does_not in (((120, 40), "✔ fits", "✘ too big"), ((80, 24), "✔", "✘")):
            await pilot.resize_terminal(*size)
            await settle(pilot)
            listed = screen_of(pilot).query_one(f"#{name}-list", OptionList)
            lines = [str(listed.get_option_at_index(index).prompt) for index in range(listed.option_count)]
            assert ["✔" in line for line in lines] == [item.fits for item in items]
            assert ["✘" in line for line in lines] == [not item.fits for item in items]
            # A long title, which says what else a change brings, keeps the room that the word would take.
            assert name == "advice" or all(fits in line or does_not in line for line in lines)
            assert all(len(line) <= listed.content_size.width for line in lines)


async def test_pickers_tell_by_sign_and_word_what_fits(make_app: MakeApp) -> None:
    async with make_app().run_test(size=(80, 24)) as pilot:
        await pilot.press("m", *"qwen2.5-")
        await settle(pilot)
        assert "✔ fits" in shown_text(pilot)
        assert "✘ too big" in shown_text(pilot)
