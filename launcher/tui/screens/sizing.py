"""The sizing screen: model, GPU and knobs on one side, what they need on the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical, VerticalScroll
from textual.screen import Screen
from textual.widgets import Footer, Static
from textual.worker import get_current_worker

from launcher.tui import advice, cards, knobs
from launcher.tui.command_line import plan_command
from launcher.tui.inspection import inspector
from launcher.tui.screens import sizing_parts as parts
from launcher.tui.screens.sizing_messages import Advised, Chosen, Opened, Refined, Resolved
from launcher.tui.screens.sizing_pickers import gpu_picker, model_picker
from launcher.tui.sizing import Sizing, refine, size_up
from launcher.tui.text import plain
from launcher.tui.themes import colours
from launcher.tui.widgets.advice_panel import AdvicePanel
from launcher.tui.widgets.frontier_panel import FrontierPanel
from launcher.tui.widgets.knob_form import KnobForm
from launcher.tui.widgets.legend import Legend
from launcher.tui.widgets.memory_bar import MemoryBar
from launcher.tui.widgets.phase_table import PhaseTable
from launcher.tui.widgets.pick_button import PickButton
from launcher.tui.widgets.setup_list import SetupList
from launcher.tui.widgets.speed_panel import SpeedPanel
from launcher.tui.widgets.verdict_line import VerdictLine
from planner.base.errors import FieldError, InputError, NotModelledError, VramwiseError
from planner.models.catalog import resolve_model
from planner.models.spec import ModelSpec
from planner.setup import defaults
from planner.setup.training_setup import TrainingSetup

PAUSE_SECONDS = 0.08
"""From a change to the work of refining it, so that a held key is not slowed by what it overtakes."""


class SizingScreen(Screen[None]):
    """Answers every change at once; holds no number that it did not get from the planner."""

    AUTO_FOCUS = "#knob-max_length"

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("m", "pick_model", "Model", id="sizing.model", tooltip="Pick another model"),
        Binding("g", "pick_gpu", "GPU", id="sizing.gpu", tooltip="Pick another GPU"),
        Binding("a", "choose", "Auto", id="sizing.auto", tooltip="Take the fastest setup that fits"),
        Binding("u", "undo", "Undo", show=False, id="sizing.undo", tooltip="Take back what was applied last"),
        Binding("t", "train", "Train", id="sizing.train", tooltip="Start this run"),
        Binding("c", "copy_command", "Copy", id="sizing.command", tooltip="Show and copy the command line"),
        Binding(
            "o", "app.open_run", "Runs", id="sizing.runs", tooltip="Follow a run that was started before"
        ),
        Binding("escape", "leave_field", "Leave field", show=False, id="sizing.leave"),
    ]

    def __init__(
        self, model: ModelSpec, card: cards.Card, setup: TrainingSetup, *, automatic: bool = False
    ) -> None:
        super().__init__()
        self._automatic = automatic
        self._model = model
        self._model_name = setup.model
        self._card = card
        self._others: dict[str, Any] = knobs.other_fields(setup)
        self._initial = knobs.to_texts(setup)
        self._asked_optim = self._shown_optim = setup.optim
        self._before: list[tuple[TrainingSetup, str]] = []
        self._question: Text | None = None
        self._advising = threading.Lock()
        self.sizing: Sizing | None = None

    def compose(self) -> ComposeResult:
        """The headline over the form and the details."""
        with Vertical(id="headline"):
            yield Static("", id="question")
            yield VerdictLine()
            yield MemoryBar()
        with Container(id="body"):
            yield VerticalScroll(KnobForm(self._initial), id="form-scroll", can_focus=False)
            with VerticalScroll(id="details"):
                with Container(id="columns"):
                    with Vertical(id="memory-column"):
                        yield Static("memory", classes="heading")
                        yield Legend()
                    with Vertical(id="speed-column"):
                        yield Static("speed", classes="heading")
                        yield SpeedPanel()
                        yield Static("phases", classes="heading")
                        yield PhaseTable()
                yield Static("what to change", classes="heading")
                yield AdvicePanel()
                yield Static("speed against memory", classes="heading")
                yield FrontierPanel()
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Answer the first question."""
        self.app.theme_changed_signal.subscribe(self, lambda _: self._show_question())
        if not self._automatic:
            self._answer(self._initial)
        elif self._draw(self._initial) is not None:
            self.query_one(VerdictLine).searching = True
            self._open(self._model, self._model_name, self._card)

    @property
    def form(self) -> KnobForm:
        """The knobs."""
        return self.query_one(KnobForm)

    @on(KnobForm.Changed)
    def _knob_changed(self, event: KnobForm.Changed) -> None:
        event.stop()
        if event.texts["gradient_checkpointing"] == knobs.OFF:
            self._others.pop("checkpointed_layers", None)
        if event.texts["optim"] != self._shown_optim:
            self._asked_optim = event.texts["optim"]
        self._answer(event.texts)

    @on(PickButton.Pressed)
    def _pick(self, event: PickButton.Pressed) -> None:
        event.stop()
        if event.button.id == "pick-model":
            self.action_pick_model()
        else:
            self.action_pick_gpu()

    def _answer(self, texts: Mapping[str, str]) -> None:
        """Recompute, show, then refine. What is answered now wins over the search for a setup to open on."""
        self.query_one(VerdictLine).searching = False
        sizing = self._draw(texts)
        if sizing is not None:
            self._work_out(sizing)

    def _draw(self, texts: Mapping[str, str]) -> Sizing | None:
        """Recompute and show; on a value that is not accepted say so and keep the last answer, greyed."""
        self._shown_optim = texts["optim"]
        self.form.show_picks(model=self._model_name, gpu=self._card.title)
        try:
            setup = knobs.to_setup(self._model_name, texts, self._others)
            sizing = size_up(setup, self._model, self._card, asked_optim=self._asked_optim)
        except InputError as error:
            field = (
                error.field
                if isinstance(error, FieldError | NotModelledError)
                else parts.field_of(str(error))
            )
            self.form.show_error(field, str(error))
            self.query_one(VerdictLine).stale = True
            return None
        self.form.clear_errors()
        self.query_one(VerdictLine).stale = False
        self._show(sizing)
        return sizing

    def _show(self, sizing: Sizing) -> None:
        self.sizing = sizing
        self._show_question()
        self.query_one(VerdictLine).sizing = sizing
        self.query_one(MemoryBar).data = parts.bar(sizing)
        self.query_one(Legend).memory = sizing.memory
        self.query_one(PhaseTable).memory = sizing.memory
        self.query_one(SpeedPanel).sizing = sizing
        self.form.show_other_fields(parts.other_fields(self._others))

    def _show_question(self) -> None:
        if self.sizing is None:
            return
        question = parts.question(self.sizing, colours(self.app).muted)
        if question != self._question:
            self._question = question
            self.query_one("#question", Static).update(question)

    @work(thread=True, exclusive=True, group="work-out")
    def _work_out(self, sizing: Sizing) -> None:
        """Refine the figures, then look for advice; what a later change overtakes is not begun."""
        overtaken = partial(getattr, get_current_worker(), "is_cancelled")
        time.sleep(PAUSE_SECONDS)
        if overtaken():
            return
        refined = refine(sizing)
        if overtaken():
            return
        self.post_message(Refined(sizing, refined))
        # One at a time: what is overtaken is not ended midway, and several would slow the answers.
        with self._advising:
            if overtaken():
                return
            try:
                found = advice.work_out(refined, overtaken)
            except InputError as error:
                found = advice.Suggestions(refusal=str(error))
        if not overtaken():
            self.post_message(Advised(refined, found))

    @work(thread=True, exclusive=True, group="choice")
    def _open(self, model: ModelSpec, name: str, card: cards.Card) -> None:
        try:
            self.post_message(Opened(advice.opening_choice(name, model, card)))
        except InputError:
            self.post_message(Opened(None))

    @on(Opened)
    def _take_opening(self, event: Opened) -> None:
        if not self.query_one(VerdictLine).searching:
            return
        if event.setup is None:
            self._answer(self.form.texts)
        else:
            self._put(event.setup, self._asked_for(event.setup))

    @on(Refined)
    def _show_refined(self, event: Refined) -> None:
        if event.first is self.sizing:
            self._show(event.refined)

    @on(Advised)
    def _show_advice(self, event: Advised) -> None:
        if event.sizing is self.sizing:
            found = event.found
            self.query_one(AdvicePanel).show(event.sizing, found.offers, refusal=found.refusal)
            self.query_one(FrontierPanel).show(event.sizing, found.points, refusal=found.refusal)

    @on(SetupList.Applied)
    def _apply(self, event: SetupList.Applied) -> None:
        event.stop()
        self._take(event.setup)

    def action_pick_model(self) -> None:
        """Pick a model; each is shown with what it needs at the present knobs."""
        self.app.push_screen(
            model_picker(self._model, self._card, self.form.texts, dict(self._others)), self._model_picked
        )

    def _model_picked(self, name: str | None) -> None:
        if name is None:
            return
        self._resolve(name)

    @work(thread=True, exclusive=True, group="resolve")
    def _resolve(self, name: str) -> None:
        """A model of the catalog is there at once; one that has to be inspected takes seconds."""
        try:
            model = resolve_model(
                name,
                allow_network=self.app.allow_download,  # type: ignore[attr-defined]
                inspector=inspector,
            )
            self.post_message(Resolved(name, model, ""))
        except VramwiseError as error:
            self.post_message(Resolved(name, None, str(error)))

    @on(Resolved)
    def _take_model(self, event: Resolved) -> None:
        if event.model is None:
            self.form.show_error("model", event.message)
            return
        self._model, self._model_name = event.model, event.name
        self._before.clear()
        self._answer(self.form.texts)

    def action_pick_gpu(self) -> None:
        """Pick a card; each is shown with the verdict on the present setup."""
        known = {str(index): card for index, card in enumerate(cards.offered())}

        def picked(key: str | None) -> None:
            if key is None:
                return
            try:
                self._card = known[key] if key in known else cards.card_from_text(key)
            except VramwiseError as error:
                self.form.show_error("gpu", str(error))
                return
            self._answer(self.form.texts)

        texts, others = self.form.texts, dict(self._others)
        self.app.push_screen(
            gpu_picker(known, self._card, self._model, self._model_name, texts, others), picked
        )

    def action_choose(self) -> None:
        """Ask the planner for the fastest setup that fits at this length."""
        asked = {**self.form.texts, "optim": self._asked_optim}
        self._choose(self._model, self._model_name, self._card, asked)

    @work(thread=True, exclusive=True, group="choice")
    def _choose(self, model: ModelSpec, name: str, card: cards.Card, texts: Mapping[str, str]) -> None:
        try:
            chosen = advice.automatic_choice(name, model, card, texts)
        except VramwiseError as error:
            self.post_message(Chosen(None, str(error)))
            return
        self.post_message(Chosen(chosen.setup, chosen.reason))

    @on(Chosen)
    def _take_choice(self, event: Chosen) -> None:
        if event.setup is None:
            self.notify(plain(event.message), title="No automatic choice", severity="warning", markup=False)
            return
        self._take(event.setup)
        self.notify(f"{plain(event.message)}; u takes it back", title="Automatic choice", markup=False)

    def action_undo(self) -> None:
        """Go back to the setup before the last one that was applied."""
        if self._before:
            self._put(*self._before.pop())
        else:
            self.notify("nothing was applied", severity="warning", markup=False)

    def _take(self, setup: TrainingSetup) -> None:
        if self.sizing is not None:
            self._before.append((self.sizing.setup, self._asked_optim))
        self._put(setup, self._asked_for(setup))

    def _asked_for(self, setup: TrainingSetup) -> str:
        """What a search starts from once a setup is taken, whose optimizer a search may have put in."""
        put_in = (self._asked_optim, setup.optim) == (defaults.OPTIM, defaults.FASTER_OPTIM)
        return self._asked_optim if put_in else setup.optim

    def _put(self, setup: TrainingSetup, asked_optim: str) -> None:
        """Show a setup in the knobs and answer it."""
        if setup.model != self._model_name:
            self._model, self._model_name = resolve_model(setup.model), setup.model
        one = setup.replace(num_processes=1, distributed=None)
        self._others = knobs.other_fields(one)
        self._asked_optim = asked_optim
        texts = knobs.to_texts(one)
        self.form.set_texts(texts)
        self._answer(texts)

    def action_copy_command(self) -> None:
        """Copy the command line that plans this setup, and show it."""
        if self.sizing is None:
            return
        command = plan_command(self.sizing)
        self.app.copy_to_clipboard(command)
        self.notify(plain(command), title="Copied", timeout=12, markup=False)

    def action_train(self) -> None:
        """Start this run."""
        if self.sizing is not None and not self.query_one(VerdictLine).stale:
            self.app.start_run(self.sizing)  # type: ignore[attr-defined]

    def action_leave_field(self) -> None:
        """Let go of the field, so that all keys reach the screen."""
        self.set_focus(None)
