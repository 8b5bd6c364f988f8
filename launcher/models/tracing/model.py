"""A model traced: one layer of each kind and the norm after them, while the model itself runs around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from launcher.models.tracing.autocast import autocast
from launcher.models.tracing.block import BlockRun, run_block, weights_that_ask
from launcher.models.tracing.fitting import POINTS, Point, joined, loops_of
from launcher.models.tracing.fused import fused_as_one
from launcher.models.tracing.opaque import (
    IMPLEMENTATION,
    AttentionFacts,
    Calls,
    opaque,
    register_attention,
    stacks_of,
)
from launcher.models.tracing.parts import kinds_of, parts_of
from launcher.models.tracing.recorder import Recorder
from planner.base.errors import InputError
from planner.memory.layers.attention import flexes_shared
from planner.models.storage import adapts_experts
from planner.models.traced import (
    ADAPTED,
    EXPERTS,
    METHODS,
    NO_STACKS,
    ROUTER,
    TracedBlock,
    TracedPass,
    TracedWay,
)

_DTYPES = (torch.bfloat16, torch.float32)
"""A model with experts is traced in the first alone: torch knows no shapes of grouped products in others."""
_Way = tuple[str, int, bool, str, bool]


@dataclass(frozen=True, kw_only=True)
class TracedKind:
    """Layers of one kind: where they are, what was recorded, what attention and what experts they have (null:
    none).
    """

    indices: tuple[int, ...]
    block: TracedBlock
    attention: AttentionFacts | None
    experts: ExpertFacts | None


@dataclass(frozen=True, kw_only=True)
class ExpertFacts:
    """Experts of a layer: how many, to how many a token is sent, and the width between their products."""

    experts: int
    per_token: int
    intermediate_size: int


@dataclass(frozen=True, kw_only=True)
class TracedModel:
    """What tracing found of a model.

    `scaled` says that its embeddings are changed before the first layer, `tables` how many pairs of rotary
    tables its layers get, of `table_features` a row (a table of complex numbers in fp32 takes as much as a
    pair of twice its features in 16 bits).
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
    experts: ExpertFacts | None = None
    fused: set[str] = field(default_factory=set)

    def block(self) -> TracedBlock:
        """All of them as one description."""
        passes: dict[TracedPass, int] = {}
        ways = []
        for (method, width, heads_first, adapted, kernel), runs in self.runs.items():
            number = passes.setdefault(joined(runs), len(passes))
            ways.append(
                TracedWay(
                    method=method,
                    width=width,
                    heads_first=heads_first,
                    adapted=adapted,
                    kernel=kernel,
                    number=number,
                )
            )
        return TracedBlock(
            passes=tuple(passes),
            ways=tuple(ways),
            unseen=tuple(sorted(self.fused)),
            # That of the first way stands for all: methods differ by the gradients of a few weights.
            loops=loops_of(next(iter(self.runs.values()))),
        )


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
        mixes = any(stacks_of(module) for module in self.model.modules())
        for dtype in _DTYPES[:1] if mixes else _DTYPES:
            for point in POINTS:
                with FakeTensorMode():
                    self._materialise(dtype)
                    self._run(point, dtype)
        kinds = [(indices, self.recorded[indices[0]]) for indices in self.kinds]
        return TracedModel(
            kinds=tuple(_merged(kinds)),
            norm=self.norm.block(),
            scaled=self.scaled,
            tables=sum(2 if table.is_complex() else 1 for table in self.tables.values()) // 2,
            table_features=max(
                (table.shape[-1] * (2 if table.is_complex() else 1) for table in self.tables.values()),
                default=0,
            ),
        )

    def _materialise(self, dtype: torch.dtype) -> None:
        """Give the modules that will run fake weights."""
        skipped = {
            id(module)
            for index, layer in enumerate(self.parts.layers)
            if index not in self.recorded
            for module in layer.modules()
        }
        # transformers modeling_utils.py, _get_dtype_plan: these stay in fp32 beside bf16.
        kept = set(self.model._keep_in_fp32_modules_strict or ())
        for path, module in self.model.named_modules():
            if id(module) in skipped:
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    single = any(part in kept for part in (*path.split("."), name))
                    made = torch.empty(parameter.shape, dtype=torch.float32 if single else dtype)
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
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
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
                module,
                lambda x: run(x, *args, **kwargs),
                hidden,
                outside,
                dtype,
                self.model.config.model_type,
            ):
                recorded.runs.setdefault(way, []).append(found)
                recorded.attention = calls.attention
                recorded.experts = recorded.experts or _experts(module, calls)
                recorded.fused |= set(calls.fused)
            return hidden

        return forward


def _by_way(
    module: nn.Module,
    run: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    outside: list[torch.Tensor],
    dtype: torch.dtype,
    model_type: str,
) -> Iterator[tuple[_Way, BlockRun, Calls]]:
    """A block's runs with each method, with attention that hands back gradients in each layout, and with
    adapters on what stacks it has.
    """
    names = {name for one in module.modules() for name in stacks_of(one).values()}
    stacks: tuple[str, ...] = ADAPTED if ROUTER in names else (NO_STACKS, EXPERTS)
    if not names or not adapts_experts(model_type):
        stacks = (NO_STACKS,)
    heads = 0
    for kernel in (False, True):
        known: dict[tuple[str, str], tuple[BlockRun, Calls]] = {}
        for heads_first in (False, True) if not heads else (not flexes_shared(heads),):
            for method in METHODS:
                for adapted in stacks if method != "full" else (NO_STACKS,):
                    way = method, adapted
                    if method == "lora" and not known["qlora", adapted][1].mixed:
                        # A base that is not quantised changes the dtype of products alone.
                        known[way] = known["qlora", adapted]
                    elif way not in known or known[way][1].lays_out:
                        calls = Calls(
                            Recorder(),
                            method=method,
                            dtype=dtype,
                            heads_first=heads_first,
                            adapted=adapted,
                            kernel=kernel,
                        )
                        known[way] = _run(module, run, hidden, outside, calls), calls
                    heads = next((one.heads for one in known[way][1].attention if one.sinks), 0)
                    yield (method, dtype.itemsize, heads_first, adapted, kernel), *known[way]
        if not heads:
            return


def _run(
    module: nn.Module,
    run: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    outside: list[torch.Tensor],
    calls: Calls,
) -> BlockRun:
    with (
        opaque(module, calls),
        fused_as_one(module, calls.recorder) as fused,
        weights_that_ask(module, trained=calls.method == "full"),
    ):
        found = run_block(run, hidden, outside, calls)
    calls.fused = tuple(fused.names)
    return replace(found, inside=(fused.forward, fused.backward))


def _experts(module: nn.Module, calls: Calls) -> ExpertFacts | None:
    """What experts a block has: none that reads no stack of them."""
    stacks = {
        name: parameter.shape
        for one in module.modules()
        for parameter, name in ((one._parameters[key], name) for key, name in stacks_of(one).items())
        if name != ROUTER and parameter is not None
    }
    if not stacks:
        return None
    gate_up, down = stacks["gate_up_proj"], stacks["down_proj"]
    # Products are transposed in some families: the width that both stacks have is that of the stream.
    inner = next(size for size in down[1:] if 2 * size in gate_up[1:])
    # A block that says of no token where it goes sends each to every expert.
    return ExpertFacts(experts=down[0], per_token=calls.routed or down[0], intermediate_size=inner)


def _merged(kinds: list[tuple[tuple[int, ...], _Recorded]]) -> Iterator[TracedKind]:
    """Kinds whose traces are equal, as one."""
    found: dict[tuple[TracedBlock, AttentionFacts | None, ExpertFacts | None], list[int]] = {}
    for indices, recorded in kinds:
        if len(recorded.attention) > 1:
            raise InputError("a layer runs attention more than once")
        attention = recorded.attention[0] if recorded.attention else None
        found.setdefault((recorded.block(), attention, recorded.experts), []).extend(indices)
    for (block, attention, experts), positions in found.items():
        yield TracedKind(indices=tuple(sorted(positions)), block=block, attention=attention, experts=experts)
