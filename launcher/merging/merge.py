"""A merge from beginning to end: measure the adapter, write and measure each way to do it, keep one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from launcher.merging.adapters import Adapters, Rounding
from launcher.merging.measuring import Comparison, Measuring, Reference, better, learned_places
from launcher.merging.needs import PROCESS_BYTES, Needs, available_host_bytes, needs_of
from launcher.merging.task import DEQUANTISED, MergeTask
from launcher.merging.writing import hidden_folder, publish, write_rest, write_weights
from launcher.runs import stack
from launcher.training.loading.base_folder import BaseFolder
from launcher.training.loading.skeleton import Skeleton, model_config
from launcher.training.loading.tower import tower_paths
from planner.base.data_files import write_atomically
from planner.base.errors import InputError

if TYPE_CHECKING:
    import torch

    from launcher.training.dataset import Tokens

FACTS = "merge.json"
LEAST_SHARE = 0.5
"""Of an adapter's change that rounding must leave: below, more is lost than kept."""


class Watch(Protocol):
    """Who is told what a merge does."""

    def phase(self, text: str) -> None:
        """Something begins."""

    def shards(self, done: int, total: int) -> None:
        """So many shards are written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way to merge: the base that was taken, what rounding left of the change, and how it answers."""

    kind: str
    rounding: Rounding
    comparison: Comparison | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """What came out: every way that was tried, the one that was kept, and the adapter's own answers."""

    ways: tuple[Way, ...]
    kept: Way
    reference: Reference | None


@dataclass(slots=True)
class Merge:
    """A task with all that it works on; `rows` are the examples to measure on, none for no measuring."""

    task: MergeTask
    base: BaseFolder
    adapters: Adapters
    rows: Sequence[Tokens]
    shard_bytes: int

    def needs(self) -> Needs:
        """What it needs of this machine."""
        skeleton = self._skeleton(DEQUANTISED if self.task.quantized else self.task.kinds[0])
        tokens = sum(len(learned_places(row)) for row in self.rows)
        try:
            return needs_of(
                self.task,
                self.base,
                skeleton,
                adapted=frozenset(self.adapters.layers),
                shard_bytes=self.shard_bytes,
                tokens=tokens,
            )
        finally:
            skeleton.close()

    def run(self, device: torch.device, needs: Needs, watch: Watch) -> Merged:
        """Do it; the result takes its name at the end, and nothing is left behind before.

        Raises:
            InputError: weights or examples that cannot be used, or an adapter that rounding would erase.
        """
        measuring = self._measuring(device, needs)
        reference = None
        if measuring is not None:
            watch.phase("measuring the adapter as it was trained")
            reference = measuring.reference()
        with hidden_folder(self.task.output) as hidden:
            ways = []
            for kind in self.task.kinds:
                rounding = self._write(hidden / kind, kind, watch)
                comparison = None
                if measuring is not None and reference is not None:
                    watch.phase(f"measuring the merge ({kind})")
                    comparison = measuring.compare(hidden / kind, reference, spill=hidden / "spill")
                    shutil.rmtree(hidden / "spill", ignore_errors=True)
                ways.append(Way(kind=kind, rounding=rounding, comparison=comparison))
            kept = self._best(ways)
            made = Merged(ways=tuple(ways), kept=kept, reference=reference)
            write_atomically(hidden / kept.kind / FACTS, json.dumps(self._facts(made), indent=2) + "\n")
            publish(hidden / kept.kind, self.task.output)
        return made

    def _skeleton(self, kind: str) -> Skeleton:
        import torch

        from launcher.training import build

        setup, tower = self.task.setup, tower_paths(model_config(self.base))
        quantises = kind == DEQUANTISED and self.base.checkpoint is None
        on_gpu = torch.cuda.is_available() and kind == DEQUANTISED
        return Skeleton(
            base=self.base,
            dtype=build.torch_dtype(setup),
            quantization=build.quantization_config(setup, tower) if quantises else None,
            quantizes_experts=setup.experts == "4bit",
            # Quantised where the run quantised it, as far as this machine has the device.
            device=torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
        )

    def _measuring(self, device: torch.device, needs: Needs) -> Measuring | None:
        import torch

        if not self.rows:
            return None
        if device.type == "cpu":
            free = available_host_bytes() - PROCESS_BYTES - needs.answers_bytes
        else:
            free = int(torch.cuda.mem_get_info(device)[0])
        # What activations take is in the needs; here it is left free beside the weights.
        return Measuring(self.task, self.base, self.rows, device, free_bytes=int(free / 1.2))

    def _write(self, folder: Path, kind: str, watch: Watch) -> Rounding:
        import torch

        watch.phase(f"merging ({kind})")
        folder.mkdir()
        skeleton = self._skeleton(kind)
        try:
            rounding = write_weights(
                folder,
                skeleton,
                self.adapters,
                dtype=getattr(torch, self.task.dtype),
                shard_bytes=self.shard_bytes,
                report=watch.shards,
            )
        finally:
            skeleton.close()
        write_rest(folder, self.base, self.task.adapters[0].path, dtype=self.task.dtype)
        return rounding

    def _best(self, ways: Sequence[Way]) -> Way:
        """The better of the ways that keep what was learned.

        Raises:
            InputError: rounding erases most of the adapter in all of them.
        """
        usable = [way for way in ways if way.rounding.share >= LEAST_SHARE]
        if not usable:
            most = max(way.rounding.share for way in ways)
            raise InputError(
                f"{self.task.adapters[0].path}: rounding to {self.task.dtype} leaves {most:.0%} of what the "
                f"adapter changes, {ways[0].rounding.size:.2%} of the weights' norm: serve it unmerged"
            )
        best = usable[0]
        for way in usable[1:]:
            if way.comparison and best.comparison and better(way.comparison, best.comparison):
                best = way
        return best

    def _facts(self, made: Merged) -> dict[str, Any]:
        """What is worth knowing of a merged model later."""
        task = self.task
        return {
            "base": self.base.name,
            "adapters": [str(one.path) for one in task.adapters],
            "weights": list(task.weights),
            "trained": {"method": task.setup.method, "dtype": task.setup.dtype},
            "merged_into": made.kept.kind,
            "dtype": task.dtype,
            "share_left_by_rounding": {way.kind: way.rounding.share for way in made.ways},
            "measured": None if made.reference is None else _figures(made, len(self.rows)),
            "stack": dict(stack.versions()),
        }


def _figures(made: Merged, examples: int) -> dict[str, Any]:
    assert made.reference is not None
    named = [("base without adapter", made.reference.untrained)]
    named += [(way.kind, way.comparison) for way in made.ways if way.comparison is not None]
    figures: dict[str, Any] = {"examples": examples, "tokens": len(named[0][1].token_losses)}
    figures["adapter"] = {"loss": made.reference.loss}
    for name, one in named:
        figures[name] = {
            "loss": one.loss,
            "kl": one.kl,
            "same_top": one.same_top,
            "mean_logit": one.mean_logit,
            "max_logit": one.max_logit,
        }
    return figures
