"""The sizing screen: model, GPU and knobs on one side, what they need on the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical, VerticalScroll
from textual.widgets import Footer

from launcher.tui import cards, knobs
from launcher.tui.command_line import plan_command
from launcher.tui.explained import Explained, explained
from launcher.tui.longest import question_of
from launcher.tui.screens import sizing_parts as parts
from launcher.tui.screens.needs import NeedsScreen
from launcher.tui.screens.sizing_messages import Advised, Chosen, DataRead, LongestFound, Opened, Refined
from launcher.tui.screens.sizing_picks import SizingPicks
from launcher.tui.sizing import Sizing, Wishes, size_up
from launcher.tui.text import plain
from launcher.tui.widgets.breakpoints import fit_before_composing
from launcher.tui.widgets.sizing.advice_panel import AdvicePanel
from launcher.tui.widgets.sizing.data_panel import DataPanel
from launcher.tui.widgets.sizing.frontier_panel import FrontierPanel
from launcher.tui.widgets.sizing.headline import Headline
from launcher.tui.widgets.sizing.knob_form import KnobForm
from launcher.tui.widgets.sizing.legend import Legend
from launcher.tui.widgets.sizing.phase_table import PhaseTable
from launcher.tui.widgets.sizing.setup_list import SetupList
from launcher.tui.widgets.sizing.speed_panel import SpeedPanel
from launcher.tui.widgets.sizing.verdict_line import VerdictLine
from planner.base.errors import FieldError, InputError, NotModelledError
from planner.models.catalog import resolve_model
from planner.models.spec import ModelSpec
from planner.planning.cards_for import OWN, CardAnswer
from planner.setup import defaults
from planner.setup.training_setup import TrainingSetup


class SizingScreen(SizingPicks):
    """Answers every change at once; holds no number that it did not get from the planner."""

    AUTO_FOCUS = "#knob-max_length"

    BINDINGS: ClassVar[list[BindingType]] = [
        # First, so that a narrow footer has it.
        Binding("question_mark", "app.help", "Help", id="sizing.help", tooltip="Keys and sources of numbers"),
        Binding("m", "pick_model", "Model", id="sizing.model", tooltip="Pick another model"),
        Binding("g", "pick_gpu", "GPU", id="sizing.gpu", tooltip="Pick another GPU"),
        Binding("d", "pick_data", "Data", id="sizing.data", tooltip="Pick the data to train on"),
        Binding("a", "choose", "Auto", id="sizing.auto", tooltip="The fastest setup that fits"),
        Binding(
            "u,ctrl+z",
            "undo",
            "Undo",
            show=False,
            id="sizing.undo",
            tooltip="Take back what was applied",
        ),
        Binding("l", "longest", "Longest", show=False, id="sizing.longest", tooltip="Take the longest"),
        Binding("p", "pin", "Pin", id="sizing.pin", tooltip="Pin: show differences to it"),
        Binding("t", "train", "Train", id="sizing.train", tooltip="Start this run"),
        Binding("n", "needs", "Need", id="sizing.needs", tooltip="Which card for these hours"),
        Binding("c", "copy_command", "Copy", id="sizing.command", tooltip="Copy the command line"),
        Binding("o", "app.open_run", "Runs", id="sizing.runs", tooltip="The runs, to follow one"),
        Binding("f", "app.follow_live", show=False, id="sizing.follow", tooltip="The run that goes on"),
        Binding("k", "keep", "Keep", show=False, id="sizing.keep", tooltip="Keep card, display, price"),
        Binding("e", "app.accuracy", show=False, id="sizing.accuracy", tooltip="Accuracy of own runs"),
        Binding("b", "app.calibrate", show=False, id="sizing.calibrate", tooltip="Calibrate on this GPU"),
        Binding(
            "1",
            "panel(1)",
            show=False,
            id="sizing.panel1",
            key_display=f"1-{len(parts.PANELS)}",
            tooltip="Go to a panel",
        ),
        *(
            Binding(str(at), f"panel({at})", show=False, id=f"sizing.panel{at}")
            for at in range(2, len(parts.PANELS) + 1)
        ),
        Binding("escape", "leave_field", "Leave field", show=False, id="sizing.leave"),
    ]

    def __init__(
        self,
        model: ModelSpec,
        card: cards.Card,
        setup: TrainingSetup,
        *,
        automatic: bool = False,
        data: str = "",
        price: float | None = None,
    ) -> None:
        """Begins with `data`, a path or a name on the Hub, read once the screen is drawn."""
        super().__init__(model, card, setup)
        self._automatic = automatic
        self._begins_with = data
        # A search takes the card's own type; until it has found something, so does the first answer.
        first = setup.replace(dtype=card.spec.dtype) if automatic else setup
        self._initial = {**knobs.to_texts(first), **knobs.asked_texts(card, price)}
        self._asked_optim = self._shown_optim = setup.optim
        self._pinned: Sizing | None = None

    def compose(self) -> ComposeResult:
        """The headline over the form and the details."""
        fit_before_composing(self)
        yield Headline()
        with Container(id="body"):
            yield VerticalScroll(KnobForm(self._initial), id="form-scroll", can_focus=False)
            with VerticalScroll(id="details"):
                with Container(id="columns"):
                    with Vertical(id="memory-column"):
                        yield parts.heading("memory")
                        yield Legend()
                        yield parts.heading("data")
                        yield DataPanel()
                    with Vertical(id="speed-column"):
                        yield parts.heading("speed")
                        yield SpeedPanel()
                        yield parts.heading("phases")
                        yield PhaseTable()
                yield parts.heading("what to change")
                yield AdvicePanel()
                yield parts.heading("speed against memory")
                yield FrontierPanel()
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Answer the first question."""
        self.call_after_refresh(self._scroll_to_focus)
        if not self._automatic:
            self._answer(self._initial)
        elif self._draw(self._initial) is not None:
            self.query_one(VerdictLine).searching = True
            if not self._begins_with:
                self._search_opening()
        if self._begins_with:
            self.form.show_picks(model=self._model_name, gpu=self._card.title, data="reading ...")
            self._read_data(self._begins_with, self._allow_network)

    def _scroll_to_focus(self) -> None:
        """The field in focus is in sight however few lines there are."""
        if self.focused is not None:
            self.focused.scroll_visible(animate=False)

    def _search_opening(self) -> None:
        try:
            wishes = knobs.to_wishes(self.form.texts, self._data)
        except FieldError:
            # Said where it was typed.
            self.query_one(VerdictLine).searching = False
            return
        self._open(self._model, self._model_name, self._shown_card(self.form.texts), wishes)

    @on(DataRead)
    def _take_first_data(self, event: DataRead) -> None:
        """Data that the command line named; the search for a setup to open on goes by it."""
        self._data = event.data
        if event.data is None:
            self.form.show_error("data", event.message)
        if self.query_one(VerdictLine).searching:
            self._draw(self.form.texts)
            self._search_opening()
        else:
            self._answer(self.form.texts)
        if event.data is None:
            self.form.show_error("data", event.message)

    @on(KnobForm.Changed)
    def _knob_changed(self, event: KnobForm.Changed) -> None:
        event.stop()
        if event.texts["gradient_checkpointing"] == knobs.OFF:
            self._others.pop("checkpointed_layers", None)
        if event.texts["optim"] != self._shown_optim:
            self._asked_optim = event.texts["optim"]
        self._answer(event.texts)

    def _answer(self, texts: Mapping[str, str]) -> None:
        """Recompute, show, then refine. What is answered now wins over the search for a setup to open on."""
        self.query_one(VerdictLine).searching = False
        sizing = self._draw(texts)
        if sizing is not None:
            self._work_out(sizing, self._longest)
            self._ahead()

    @on(events.DescendantFocus)
    def _ahead(self) -> None:
        """Be ready for the next key on the knob in focus."""
        row = getattr(self.focused, "row", None)
        if isinstance(row, knobs.Row) and self.sizing is not None:
            self._look_ahead(row, dict(self.form.texts), self._sized)

    def _sized(self, texts: Mapping[str, str]) -> Sizing:
        """The answer to texts of knobs; raises InputError."""
        setup = knobs.to_setup(self._model_name, texts, self._others)
        wishes = knobs.to_wishes(texts, self._data)
        card = self._shown_card(texts)
        return size_up(setup, self._model, card, asked_optim=self._asked_optim, wishes=wishes)

    def _draw(self, texts: Mapping[str, str]) -> Sizing | None:
        """Recompute and show; on a value that is not accepted say so and keep the last answer, greyed."""
        self._shown_optim = texts["optim"]
        data = "none" if self._data is None else self._data.name
        self.form.show_picks(model=self._model_name, gpu=self._card.title, data=data)
        self.form.show_card(self._card)
        try:
            sizing = self._sized(texts)
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
        self._show_headline()
        # The verdict is painted first, the data's picture in the frame after it.
        self.call_after_refresh(self._show_data)
        self.query_one(Legend).memory = sizing.memory
        self.query_one(PhaseTable).memory = sizing.memory
        self.query_one(SpeedPanel).sizing = sizing
        self.form.show_other_fields(parts.other_fields(self._others))

    def _show_data(self) -> None:
        self.query_one(DataPanel).sizing = self.sizing

    def _show_headline(self) -> None:
        """Show the answers, and beside every figure how it differs from the pinned setup's, if one is."""
        now, pin, longest = self.sizing, self._pinned, self._longest
        if now is None:
            return
        known = longest is not None and longest.question == question_of(now)
        self.query_one(Headline).show(now, longest if known else None, pin)
        memory = None if pin is None else pin.memory
        self.query_one(Legend).pinned = self.query_one(PhaseTable).pinned = memory

    def action_panel(self, number: int) -> None:
        """Bring a panel into sight, and what of it takes keys into focus."""
        parts.go_to(self, number)

    def action_pin(self) -> None:
        """Pin the setup with its figures; pinned as it is, let go of it."""
        now, pin = self.sizing, self._pinned
        same = now is not None and pin is not None and (now.setup, now.card) == (pin.setup, pin.card)
        self._pinned = None if same else now
        self._show_headline()

    def explained(self) -> tuple[Explained, ...]:
        """Where the numbers on the screen come from."""
        longest = None if self._longest is None else self._longest.longest
        return () if self.sizing is None else explained(self.sizing, longest)

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
        if event.first is self._pinned:
            self._pinned = event.refined
        if event.first is self.sizing:
            self._show(event.refined)

    @on(Advised)
    def _show_advice(self, event: Advised) -> None:
        if event.sizing is self.sizing:
            found = event.found
            self.query_one(AdvicePanel).show(event.sizing, found.offers, refusal=found.refusal)
            self.query_one(FrontierPanel).show(event.sizing, found.points, refusal=found.refusal)

    @on(LongestFound)
    def _show_longest(self, event: LongestFound) -> None:
        self._longest = event.found
        self._show_headline()

    def action_longest(self) -> None:
        """Take the setup with the longest sequences."""
        found = self._longest
        if found is None or found.longest is None:
            self.notify("not known yet" if found is None else "nothing fits", title="Longest", markup=False)
        else:
            self._take(found.longest.setup)

    @on(SetupList.Applied)
    def _apply(self, event: SetupList.Applied) -> None:
        event.stop()
        self._take(event.setup)

    def action_choose(self) -> None:
        """Ask the planner for the fastest setup that fits at this length."""
        asked = {**self.form.texts, "optim": self._asked_optim}
        card = self._shown_card(asked)
        self._choose(self._model, self._model_name, card, asked, self._wishes)

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
        self.form.set_texts(knobs.to_texts(one))
        self._answer(self.form.texts)

    def action_needs(self) -> None:
        """Ask which cards do it in time, and take one."""
        if self.sizing is not None:
            self.app.push_screen(NeedsScreen(self.sizing), self._take_card)

    def _take_card(self, answer: CardAnswer | None) -> None:
        if answer is None:
            return
        if answer.kind != OWN:
            self._card = cards.card_from_text(answer.gpu)
        self._take(answer.setup)

    @property
    def model_name(self) -> str:
        """The model that is sized, by the name that it was picked by."""
        return self._model_name

    def action_keep(self) -> None:
        """Keep card, display and price as the settings that commands read too."""
        if self.sizing is None:
            return
        card, wishes = self.sizing.card, self.sizing.wishes
        told = f"{plain(card.title, 60)}, display {knobs.ON if card.display else knobs.OFF}, {_price(wishes)}"
        self.app.keep_settings(  # type: ignore[attr-defined]
            {"gpu": card.argument, "display": card.display, "price_per_hour": wishes.usd_per_gpu_hour}, told
        )

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


def _price(wishes: Wishes) -> str:
    price = wishes.usd_per_gpu_hour
    return "the catalog's price" if price is None else f"${price:g} a GPU-hour"
