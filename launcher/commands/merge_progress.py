"""Progress of a merge on stderr: a bar of shards in a terminal, a line a phase elsewhere."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


class MergeProgress:
    """Shows what a merge does while it does it."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False, emoji=False, markup=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("shards"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
            expand=True,
        )
        self._task = self._progress.add_task("", total=None)
        self._phase = ""

    def __enter__(self) -> MergeProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def phase(self, text: str) -> None:
        """Show that something begins."""
        self._phase = text
        self._progress.update(self._task, description=text, total=None, completed=0)
        self._say(text)

    def shards(self, done: int, total: int) -> None:
        """Show how many shards are written."""
        self._progress.update(self._task, total=total, completed=done)
        if done:
            self._say(f"{self._phase}: shard {done} of {total}")

    def _say(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(Text(text), soft_wrap=True)
