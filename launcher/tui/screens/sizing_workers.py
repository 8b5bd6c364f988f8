"""The sizing screen's work that takes longer than a key may: in threads, which report by messages."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial

from textual import work
from textual.screen import Screen
from textual.worker import get_current_worker

from launcher.tui import advice, cards, knobs
from launcher.tui.dataset import read_dataset
from launcher.tui.inspection import inspector
from launcher.tui.longest import LongestAnswer, OvertakenError, find_longest, question_of
from launcher.tui.screens.sizing_messages import (
    Advised,
    Chosen,
    DataRead,
    LongestFound,
    Opened,
    Refined,
    Resolved,
)
from launcher.tui.sizing import Sizing, Wishes, refine
from launcher.tui.whole_run import with_whole_run
from planner.base.errors import InputError, VramwiseError
from planner.models.catalog import resolve_model
from planner.models.spec import ModelSpec

PAUSE_SECONDS = 0.08
"""From a change to the work of refining it, so that a held key is not slowed by what it overtakes."""


class SizingWorkers(Screen[None]):
    """What a sizing screen has worked out for it."""

    def __init__(self) -> None:
        super().__init__()
        self._advising = threading.Lock()
        self._longest: LongestAnswer | None = None

    @work(thread=True, exclusive=True, group="work-out")
    def _work_out(self, sizing: Sizing, longest: LongestAnswer | None) -> None:
        """Refine the figures, then look for advice and, unless `longest` is of the same question, for the
        longest sequences; what a later change overtakes is not begun.
        """
        overtaken = partial(getattr, get_current_worker(), "is_cancelled")
        time.sleep(PAUSE_SECONDS)
        if overtaken():
            return
        refined = with_whole_run(refine(sizing))
        if overtaken():
            return
        self.post_message(Refined(sizing, refined))
        # One at a time: what is overtaken is not ended midway, and several would slow the answers.
        with self._advising:
            if overtaken():
                return
            try:
                if longest is None or longest.question != question_of(refined):
                    self.post_message(LongestFound(find_longest(refined, overtaken)))
            except OvertakenError:
                return
            if overtaken():
                return
            try:
                found = advice.work_out(refined, overtaken)
            except InputError as error:
                found = advice.Suggestions(refusal=str(error))
        if not overtaken():
            self.post_message(Advised(refined, found))

    @work(thread=True, exclusive=True, group="ahead")
    def _look_ahead(
        self,
        row: knobs.Row,
        texts: Mapping[str, str],
        of: Callable[[Mapping[str, str]], Sizing],
    ) -> None:
        """Answer what the two arrow keys would ask of a knob: what is worked out for the first time takes up
        to 30 ms longer than what is known already.
        """
        overtaken = partial(getattr, get_current_worker(), "is_cancelled")
        time.sleep(PAUSE_SECONDS)
        for direction in (1, -1):
            value = knobs.step(row, texts[row.field], direction)
            if value is not None and not overtaken():
                with contextlib.suppress(InputError):
                    of({**texts, row.field: value})

    @work(thread=True, exclusive=True, group="choice")
    def _open(self, model: ModelSpec, name: str, card: cards.Card, wishes: Wishes) -> None:
        try:
            self.post_message(Opened(advice.opening_choice(name, model, card, wishes)))
        except InputError:
            self.post_message(Opened(None))

    @work(thread=True, exclusive=True, group="choice")
    def _choose(
        self, model: ModelSpec, name: str, card: cards.Card, texts: Mapping[str, str], wishes: Wishes
    ) -> None:
        try:
            chosen = advice.automatic_choice(name, model, card, texts, wishes)
        except VramwiseError as error:
            self.post_message(Chosen(None, str(error)))
            return
        self.post_message(Chosen(chosen.setup, chosen.reason))

    @work(thread=True, exclusive=True, group="resolve")
    def _resolve(self, name: str, allow_network: bool) -> None:
        """A model of the catalog is there at once; one that has to be inspected takes seconds."""
        try:
            model = resolve_model(name, allow_network=allow_network, inspector=inspector)
            self.post_message(Resolved(name, model, ""))
        except VramwiseError as error:
            self.post_message(Resolved(name, None, str(error)))

    @work(thread=True, exclusive=True, group="data")
    def _read_data(self, text: str, allow_network: bool) -> None:
        """Read the data that the screen begins with."""
        try:
            self.post_message(DataRead(read_dataset(text, allow_network=allow_network), ""))
        except VramwiseError as error:
            self.post_message(DataRead(None, str(error)))
