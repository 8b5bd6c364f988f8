"""What do I need: from model, data and wished hours to the cards that do it, with their price."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.message import Message
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Input, Label, Static
from textual.worker import get_current_worker

from launcher.tui.command_line import asked_of
from launcher.tui.sizing import Sizing
from launcher.tui.text import FITS, GIB, TOO_BIG, plain
from launcher.tui.themes import Colours, colours
from planner.base.errors import InputError
from planner.planning.asked import Asked
from planner.planning.cards_for import OWN, CardAnswer, answer_of, card_names, cards_for
from planner.setup.request import make_request
from planner.text.figures import dollars, duration, rate

_LATE = "! too slow"
_HEADS = ("card", "kind", "", "time", "cost", "from, to", "tokens/s", "needs GiB", "of")


class NeedsScreen(Screen[CardAnswer | None]):
    """Asks a plan for each card; returns the one that was taken."""

    AUTO_FOCUS = "#needs-table"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("h", "hours", "Hours", id="needs.hours", tooltip="Say within how many hours"),
        Binding("s", "sort", "Sort", id="needs.sort", tooltip="Sort by cost, then by time"),
        Binding("escape", "back", "Back", id="needs.back", tooltip="Back; take no card"),
    ]

    class Answered(Message):
        """A card has been asked about."""

        def __init__(self, answer: CardAnswer) -> None:
            super().__init__()
            self.answer = answer

    class Done(Message):
        """All have been; or why none could be."""

        def __init__(self, message: str) -> None:
            super().__init__()
            self.message = message

    def __init__(self, sizing: Sizing) -> None:
        super().__init__()
        self._sizing = sizing
        self._answers: list[CardAnswer] = []
        self._shown: list[CardAnswer] = []
        self._by_cost = True
        self._told = ""

    def compose(self) -> ComposeResult:
        """What is asked, hours, table."""
        yield Static("", id="needs-title")
        with Horizontal(id="needs-hours"):
            yield Label("hours at most", classes="knob-label")
            yield Input(id="needs-limit", compact=True, restrict=r"[0-9.]*", max_length=8, placeholder="any")
        yield DataTable(id="needs-table", cursor_type="row", zebra_stripes=True)
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Ask about the cards."""
        self.app.theme_changed_signal.subscribe(self, lambda _: self._draw())
        self._draw()
        self._ask()

    @work(thread=True, exclusive=True, group="needs")
    def _ask(self) -> None:
        worker = get_current_worker()
        try:
            asked = asked_about(self._sizing)
            if self._sizing.card.argument is None:
                self.post_message(self.Answered(answer_of(asked, OWN)))
            for answer in cards_for(asked):
                if worker.is_cancelled:
                    return
                self.post_message(self.Answered(answer))
        except InputError as error:
            self.post_message(self.Done(str(error)))
            return
        self.post_message(self.Done(""))

    @on(Answered)
    def _take(self, event: Answered) -> None:
        event.stop()
        self._answers.append(event.answer)
        self._draw()

    @on(Done)
    def _end(self, event: Done) -> None:
        event.stop()
        self._told = event.message or "all asked"
        self._draw()

    @property
    def _limit(self) -> float | None:
        """The hours that are wished; None for any."""
        try:
            return float(self.query_one("#needs-limit", Input).value)
        except ValueError:
            return None

    def _draw(self) -> None:
        table, shown, limit = self.query_one(DataTable), colours(self.app), self._limit
        # The cursor stays on the card that it was moved to, else on the best.
        before = self._current if table.cursor_row else None
        self._shown = ordered(self._answers, limit, by_cost=self._by_cost)
        lines = [_cells(one, limit, shown) for one in self._shown]
        table.clear(columns=True)
        for index, head in enumerate(_HEADS):
            width = max(len(head), *(len(cells[index]) for cells in lines), 0)
            table.add_column(Text(head), width=width)
        for cells in lines:
            table.add_row(*cells)
        if before is not None:
            table.move_cursor(row=self._shown.index(before), animate=False)
        self.query_one("#needs-title", Static).update(self._title(shown))

    def _title(self, shown: Colours) -> Text:
        sizing, text = self._sizing, Text(no_wrap=True, overflow="ellipsis")
        text.append("Cards for ", f"bold {shown.primary}")
        data = sizing.wishes.data
        of = "a million tokens" if data is None else data.name
        method = f"{sizing.setup.method} at {sizing.setup.max_length:,} tokens"
        text.append(f"{plain(sizing.setup.model, 40)}, {method}, {plain(of, 40)}", "bold")
        order = "cheapest" if self._by_cost else "fastest"
        asked = f"asked {len(self._answers)} of {len(card_names())}" if not self._told else plain(self._told)
        return text.append(f"  {order} first, {asked}; enter takes a card", shown.muted)

    @property
    def _current(self) -> CardAnswer | None:
        at = self.query_one(DataTable).cursor_row
        return self._shown[at] if 0 <= at < len(self._shown) else None

    @on(Input.Changed, "#needs-limit")
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        self._draw()

    @on(Input.Submitted, "#needs-limit")
    def _typed_out(self, event: Input.Submitted) -> None:
        event.stop()
        self.query_one(DataTable).focus()

    @on(DataTable.RowSelected)
    def _pick(self, event: DataTable.RowSelected) -> None:
        event.stop()
        if 0 <= event.cursor_row < len(self._shown):
            self.workers.cancel_group(self, "needs")
            self.dismiss(self._shown[event.cursor_row])

    def action_hours(self) -> None:
        """Say within how many hours it must be done."""
        self.query_one("#needs-limit", Input).focus()

    def action_sort(self) -> None:
        """Sort by cost, or by time."""
        self._by_cost = not self._by_cost
        self._draw()

    def action_back(self) -> None:
        """Leave, taking no card."""
        self.workers.cancel_group(self, "needs")
        self.dismiss(None)


def asked_about(sizing: Sizing) -> Asked:
    """What is asked on each card: model, data, length, method and rank; the rest is chosen there.

    A price of one's own is of one's own card.

    Raises:
        InputError: it cannot be asked.
    """
    setup, card = sizing.setup, sizing.card
    knobs = {"method": setup.method, "max_length": setup.max_length}
    if setup.uses_lora:
        knobs["lora_r"] = setup.lora_r
    wishes = {**asked_of(card, sizing.wishes), "price_usd_per_hour": None}
    data = sizing.wishes.data
    request = make_request(setup.model, knobs=knobs, **wishes)
    return Asked(request, card.target, sizing.model, None if data is None else data.stats)


def ordered(answers: list[CardAnswer], limit: float | None, *, by_cost: bool) -> list[CardAnswer]:
    """Those that do it first, by cost or by time; then the late; then what does not fit."""

    def rank(one: CardAnswer) -> tuple[bool, bool, float, float]:
        late = limit is not None and not one.in_time(limit)
        hours = one.hours if one.hours is not None else float("inf")
        cost = one.usd if one.usd is not None else float("inf")
        return (not one.fits, late, *((cost, hours) if by_cost else (hours, cost)))

    return sorted(answers, key=rank)


def _cells(one: CardAnswer, limit: float | None, shown: Colours) -> list[Text]:
    if not one.fits:
        told, colour = TOO_BIG, shown.error
    elif limit is not None and not one.in_time(limit):
        told, colour = _LATE, shown.warning
    else:
        told, colour = FITS, shown.success
    between = (
        ""
        if one.hours_low is None or one.hours_high is None
        else (f"{duration(one.hours_low)} to {duration(one.hours_high)}")
    )
    return [
        Text(one.gpu),
        Text(one.kind, shown.muted),
        Text(told, colour),
        _right("-" if one.hours is None else duration(one.hours)),
        _right("-" if one.usd is None else dollars(one.usd)),
        Text(between, shown.muted),
        _right("-" if one.tokens_per_second is None else rate(one.tokens_per_second)),
        _right(f"{one.peak_upper_bytes / GIB:.1f}"),
        _right(f"{one.usable_bytes / GIB:.1f}"),
    ]


def _right(text: str) -> Text:
    return Text(text, justify="right")
