"""Runs that go on: found when the interface starts, so that one key leads back to them."""

from __future__ import annotations

from pathlib import Path

from textual import on, work
from textual.app import App
from textual.message import Message

from launcher.runs.folder import RunFolder
from launcher.tui.runs import goes_on, list_runs
from launcher.tui.text import plain


class FollowsLive(App[None]):
    """An application that shows runs: `follow` one, or all by `action_open_run`."""

    class Live(Message):
        """The runs that are alive, the newest first; `asked` for by a key, or looked for at the start."""

        def __init__(self, folders: tuple[RunFolder, ...], *, asked: bool) -> None:
            super().__init__()
            self.folders = folders
            self.asked = asked

    def follow(self, folder: RunFolder) -> None:
        """Show a run."""
        raise NotImplementedError

    def action_open_run(self) -> None:
        """Show the runs."""
        raise NotImplementedError

    @property
    def runs_root(self) -> Path:
        """Where runs are."""
        raise NotImplementedError

    def action_follow_live(self) -> None:
        """Follow the newest run that goes on; without one show all."""
        self.look_for_live(asked=True)

    @work(thread=True, group="live")
    def look_for_live(self, *, asked: bool = False) -> None:
        """Look which runs are alive."""
        found = tuple(folder for folder in list_runs(self.runs_root) if goes_on(folder))
        self.post_message(self.Live(found, asked=asked))

    @on(Live)
    def _lead_to_live(self, event: Live) -> None:
        event.stop()
        if event.asked and event.folders:
            self.follow(event.folders[0])
        elif event.asked:
            self.action_open_run()
        elif event.folders:
            name, more = plain(event.folders[0].path.name, 60), len(event.folders) - 1
            others = f", as do {more} more" if more else ""
            self.notify(f"{name} goes on{others}: f follows it", title="Training", timeout=15, markup=False)
