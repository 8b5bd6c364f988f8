"""A panel that shows a snapshot, and whose height changes seldom."""

from __future__ import annotations

from collections.abc import Hashable

from textual.reactive import reactive
from textual.widget import Widget

from launcher.tui.run_follower import RunSnapshot


class SnapshotPanel(Widget):
    """Is drawn anew with each snapshot; the screen is laid out anew only where `shape` says so."""

    DEFAULT_CSS = "SnapshotPanel { height: auto; }"

    snapshot: reactive[RunSnapshot | None] = reactive(None)

    def shape(self, snapshot: RunSnapshot) -> Hashable:
        """What the panel's height depends on."""
        raise NotImplementedError

    def watch_snapshot(self, before: RunSnapshot | None, now: RunSnapshot | None) -> None:
        """Lay the screen out anew where the height may be another."""
        if None in (before, now) or self._shape_of(before) != self._shape_of(now):
            self.refresh(layout=True)

    def _shape_of(self, snapshot: RunSnapshot | None) -> Hashable:
        return None if snapshot is None else self.shape(snapshot)
