"""What `vramwise merge` shows: progress on stderr, and at the end how the result answers and is served."""

from __future__ import annotations

import re
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from launcher.merging.adapter_folder import AdapterFolder
from launcher.merging.measuring import loss_difference
from launcher.merging.merge import Merge, Merged
from launcher.merging.serving import merged_lines, unmerged_lines
from planner.text.figures import bullets, columns, footnote, heading, pairs

INTO = {
    "dequantised": "the weights that it was trained on, dequantised",
    "original": "the base's own weights",
}


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


def print_merged(out: Console, merge: Merge, merged: Merged) -> None:
    """Where the merged model is, how it answers beside the adapter, and the lines that serve it."""
    rounding, task = merged.kept.rounding, merge.task
    first = task.adapters[0]
    changes = f"changes the weights by {rounding.size:.2%} of their norm"
    left = f"rounding to {task.dtype} leaves {rounding.share:.1%} of the change"
    pairs(
        out,
        [
            ("merged into", f"{INTO[merged.kept.kind]}, in {task.dtype}"),
            ("folder", str(task.output)),
            ("adapter", f"{changes}; {left}"),
        ],
    )
    if merged.reference is not None:
        _print_measured(out, merge, merged)
    heading(out, "Serve it")
    _print_lines(out, merged_lines(task.output, _served_name(first)))
    held = "the base in 16 bits" if merge.base.checkpoint is None else "the base as it is stored"
    heading(out, f"Or unmerged, on {held}")
    if len(task.adapters) > 1:
        footnote(out, "  servers take one adapter at a time: a sum of several is served merged")
    else:
        _print_lines(out, unmerged_lines(merge.base, first))


def _print_measured(out: Console, merge: Merge, merged: Merged) -> None:
    assert merged.reference is not None
    heading(out, "Beside the adapter as it was trained")
    rows = [["adapter, unmerged", f"{merged.reference.loss:.4f}", "", "", "", ""]]
    named = [("base without it", merged.reference.untrained)]
    for way in merged.ways:
        label = f"{way.kind}, kept" if way is merged.kept and len(merged.ways) > 1 else way.kind
        if way.comparison is not None:
            named.append((label, way.comparison))
    for name, one in named:
        figures = (f"{one.loss:.4f}", f"{one.kl:.5f}", f"{one.same_top:.1%}")
        rows.append([name, *figures, f"{one.mean_logit:.4f}", f"{one.max_logit:.3f}"])
    heads = [("", "name"), ("loss", "number"), ("KL", "number"), ("same token", "number")]
    columns(out, [*heads, ("logits mean", "number"), ("max", "number")], rows)
    count, data = len(merged.reference.untrained.token_losses), merge.task.data
    bullets(
        out,
        [
            f"{len(merge.rows)} examples of {'' if data is None else data.name}, {count:,} learned tokens",
            "KL: how far the next token's distribution is from the adapter's, in nats; same token: the "
            "likeliest one; logits: how far they are apart",
            *_why(merged),
        ],
    )


def _why(merged: Merged) -> list[str]:
    """Why one of two ways was kept."""
    kept = merged.kept
    others = [way for way in merged.ways if way is not kept]
    if not others or kept.comparison is None or others[0].comparison is None:
        return []
    mean, error = loss_difference(kept.comparison, others[0].comparison)
    apart = f"the losses are {abs(mean):.4f} apart (standard error {error:.4f})"
    if abs(mean) > 2 * error:
        return [f"{kept.kind} is kept, whose loss is lower: {apart}"]
    return [f"{kept.kind} is kept, which is nearer to the adapter: {apart}, which is chance"]


def _print_lines(out: Console, lines: list[tuple[str, str]]) -> None:
    """Commands in one line each, however long, so that they can be copied."""
    width = max(len(server) for server, _ in lines)
    for server, command in lines:
        out.print(Text(f"  {server:<{width}}  {command}"), soft_wrap=True)


def _served_name(adapter: AdapterFolder) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", adapter.name).strip("-.") or "merged"
