"""A model traced: one layer of each kind and the norm after them, while the model itself runs around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from launcher.models.tracing.autocast import autocast
from launcher.models.tracing.block import BlockRun, run_block, weights_that_ask
from launcher.models.tracing.fitting import POINTS, Point, joined
from launcher.models.tracing.fused import fused_as_one
from launcher.models.tracing.opaque import IMPLEMENTATION, AttentionFacts, Calls, opaque, register_attention
from launcher.models.tracing.parts import kinds_of, parts_of
from launcher.models.tracing.recorder import Recorder
from planner.base.errors import InputError
from planner.models.traced import METHODS, TracedBlock, TracedPass, TracedWay

_DTYPES = (torch.bfloat16, torch.float32)
_Way = tuple[str, int, bool]


@dataclass(frozen=True, kw_only=True)
class TracedKind:
    """Layers of one kind: where they are, what was recorded, and what attention they have (null: none)."""

    indices: tuple[int, ...]
    block: TracedBlock
    attention: AttentionFacts | None


@dataclass(frozen=True, kw_only=True)
class TracedModel:
    """What tracing found of a model.

    `scaled` says that its embeddings are changed before the first layer, `tables` how many pairs of rotary
    tables its layers get, of `table_features` a row.
    """

    kinds: tuple[TracedKind, ...]
    norm: TracedBlock
    scaled: bool
    tables: int
    table_features: int


@dataclass
class _Recorded:
    """Runs of one block, by way and in the order of POINTS."""

    runs: dict[_Way, list[BlockRun]] = field(default_factory=dict)
    attention: list[AttentionFacts] = field(default_factory=list)
    fused: set[str] = field(default_factory=set)

    def block(self) -> TracedBlock:
        """All of them as one description."""
        passes: dict[TracedPass, int] = {}
        ways = []
        for (method, width, heads_first), runs in self.runs.items():
            number = passes.setdefault(joined(runs), len(passes))
            ways.append(TracedWay(method=method, width=width, heads_first=heads_first, number=number))
        return TracedBlock(passes=tuple(passes), ways=tuple(ways), unseen=tuple(sorted(self.fused)))


class ModelTracer:
    """Traces a model that lies on the meta device; it is of no other use afterwards.

    Raises:
        InputError: the model is not built of the parts that are looked at.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.parts = model, parts_of(model)
        self.kinds = kinds_of(self.parts.layers)
        self.recorded = {indices[0]: _Recorded() for indices in self.kinds}
        self.norm = _Recorded()
        self.scaled = False
        self.tables: dict[int, torch.Tensor] = {}

    def trace(self) -> TracedModel:
        """Run the model at each dtype and point.

        Raises:
            InputError: a block does something that a trace cannot describe.
        """
        register_attention()
        self.model.config._attn_implementation = IMPLEMENTATION
        self.model.train()
        for dtype in _DTYPES:
            for point in POINTS:
                with FakeTensorMode():
                    self._materialise(dtype)
                    self._run(point, dtype)
        kinds = [(indices, self.recorded[indices[0]]) for indices in self.kinds]
        return TracedModel(
            kinds=tuple(_merged(kinds)),
            norm=self.norm.block(),
            scaled=self.scaled,
            tables=len(self.tables) // 2,
            table_features=max((table.shape[-1] for table in self.tables.values()), default=0),
        )

    def _materialise(self, dtype: torch.dtype) -> None:
        """Give the modules that will run fake weights."""
        skipped = {
            id(module)
            for index, layer in enumerate(self.parts.layers)
            if index not in self.recorded
            for module in layer.modules()
        }
        for module in self.model.modules():
            if id(module) in skipped:
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    made = torch.empty(parameter.shape, dtype=dtype)
                    module._parameters[name] = nn.Parameter(made, requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)

    def _run(self, point: Point, dtype: torch.dtype) -> None:
        """One forward pass in which every block that is looked at is traced instead of run."""
        embedded: list[torch.Tensor] = []
        self.tables = {}
        forwards: list[tuple[nn.Module, Callable[..., Any]]] = [
            (self.parts.norm, self._traced(self.parts.norm, self.norm, dtype))
        ]
        for index, layer in enumerate(self.parts.layers):
            if index in self.recorded:
                traced = self._traced(layer, self.recorded[index], dtype, first=None if index else embedded)
                forwards.append((layer, traced))
            else:
                forwards.append((layer, lambda hidden, *args, **kwargs: hidden))
        handle = self.parts.embedding.register_forward_hook(lambda *found: embedded.append(found[2]))
        for module, forward in forwards:
            module.forward = forward
        ids = torch.zeros((point.batch, point.length), dtype=torch.int64)
        try:
            with autocast(dtype):
                self.parts.base(input_ids=ids, use_cache=False)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            # The model's own code, and torch's where an operation asks for contents that fake tensors lack.
            what = str(error).strip().partition("\n")[0][:200]
            raise InputError(f"its forward pass does not run without contents: {what}") from error
        finally:
            handle.remove()
            for module, _ in forwards:
                del module.forward

    def _traced(
        self,
        module: nn.Module,
        recorded: _Recorded,
        dtype: torch.dtype,
        *,
        first: list[torch.Tensor] | None = None,
    ) -> Callable[..., torch.Tensor]:
        """A forward pass that traces a block's in every way; `first` is what the first layer's embeddings
        were.
        """
        run = module.forward

        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if first is not None:
                scaled = "Scaled" in type(self.parts.embedding).__name__
                self.scaled = scaled or first[0] is not hidden
            outside = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
            outside += [*module.parameters(), *module.buffers()]
            for one in tree_iter(kwargs.get("position_embeddings")):
                if isinstance(one, torch.Tensor):
                    self.tables[id(one)] = one
            for way, found, calls in _by_way(
                module, lambda x: run(x, *args, **kwargs), hidden, outside, dtype
            ):
                recorded.runs.setdefault(way, []).append(found)
                recorded.attention = calls.attention
                recorded.fused |= set(calls.fused)
            return hidden

        return forward


def _by_way(
    module: nn.Module,
    run: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    outside: list[torch.Tensor],
    dtype: torch.dtype,
) -> Iterator[tuple[_Way, BlockRun, Calls]]:
    """A block's runs with each method, and with attention that hands back gradients in each layout."""
    for heads_first in (False, True):
        known: tuple[BlockRun, Calls] | None = None
        for method in METHODS:
            # A base that is not quantised changes the dtype of products alone.
            if method != "lora" or known is None or known[1].mixed:
                calls = Calls(Recorder(), method=method, dtype=dtype, heads_first=heads_first)
                with (
                    opaque(module, calls),
                    fused_as_one(module, calls.recorder) as fused,
                    weights_that_ask(module, trained=method == "full"),
                ):
                    known = run_block(run, hidden, outside, calls), calls
                calls.fused = tuple(fused)
            yield (method, dtype.itemsize, heads_first), *known


def _merged(kinds: list[tuple[tuple[int, ...], _Recorded]]) -> Iterator[TracedKind]:
    """Kinds whose traces are equal, as one."""
    found: dict[tuple[TracedBlock, AttentionFacts | None], list[int]] = {}
    for indices, recorded in kinds:
        if len(recorded.attention) > 1:
            raise InputError("a layer runs attention more than once")
        attention = recorded.attention[0] if recorded.attention else None
        found.setdefault((recorded.block(), attention), []).extend(indices)
    for (block, attention), positions in found.items():
        yield TracedKind(indices=tuple(sorted(positions)), block=block, attention=attention)
