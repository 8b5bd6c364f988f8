"""Matrix work of one training micro-step, counted from the model's own parameters.

Every count is exact for dense models; a mixture of experts counts the experts that a token is routed to.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import NamedTuple

from planner.base.values import dataclass
from planner.models.parameter import Parameter
from planner.models.scored import is_scored
from planner.models.spec import LayerSpec, ModelSpec
from planner.models.storage import is_expert_stack
from planner.setup.adapters import Adapter
from planner.setup.attention import SKIPS_MASKED
from planner.setup.run import RunKind, TrainingRun
from planner.setup.trained import adapted, expert_rank

# Attention's backward with flash or memory-efficient kernels: five matmuls (the scores again, dV, dP, dQ, dK)
# against the forward's two (Dao 2023, arXiv:2307.08691, section 4.1).
ATTENTION_BACKWARD = 2.5
# Eager attention keeps the scores: four matmuls against two.
EAGER_ATTENTION_BACKWARD = 2.0
WIDE_HEAD = 128
"""Head width up to which torch's memory-efficient kernels, which take masks, hold their output in registers
(aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_forward.h: kKeepOutputInRF). Wider ones, as
Gemma 3's of 256, write and read it again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearWork:
    """Sums over a model's decoder layers that fix its matrix work, for one choice of LoRA targets.

    `active_weights` are weight elements that multiply each token, but for those of experts, which are
    `active_expert_weights`; `linear_weights` those in nn.Linear, which
    QLoRA holds in 4 bits, `expert_weights` those of stacked experts, which it may; `wrapped_*` are sums over
    the layers that an adapter wraps: input and output widths, weight elements, and how many there are.
    `folded_weights` are elements of experts that adapters are folded into, those of fused tensors, whose rank
    is doubled, twice; `folded_router_weights` those of routers; `folded_active_weights` those of both that
    multiply each token.
    """

    active_weights: int
    active_expert_weights: int
    linear_weights: int
    expert_weights: int
    wrapped_inputs: int
    wrapped_outputs: int
    wrapped_weights: int
    wrapped_count: int
    folded_weights: int
    folded_router_weights: int
    folded_active_weights: int
    head_weights: int


class MatrixFlops(NamedTuple):
    """Floating-point operations of one micro-step's matmuls, multiply and add counted apart.

    `experts` are those of a mixture's experts, `layers` the decoder layers' others. `masked_attention` is
    that of layers whose attention is given a mask, which flash kernels do not take; `wide_masked_attention`
    that of those among them whose heads are wider than WIDE_HEAD.
    """

    layers: float
    experts: float
    adapter: float
    head: float
    attention: float
    masked_attention: float
    wide_masked_attention: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


class AdapterFlops(NamedTuple):
    """Operations that adapters add to one micro-step.

    `products` are those of tokens with the adapters of linear layers, of one pass; `forward` and `backward`
    what each pass computes of weights alone, whatever its tokens; `folded_gradients` the gradients of weights
    that adapters are folded into, experts nearly all of them.
    """

    products: float
    forward: float
    backward: float
    folded_gradients: float


def matrix_flops(run: TrainingRun) -> MatrixFlops:
    """Count the matmuls of one micro-step: forward, recompute of checkpointed layers, backward."""
    forward, backward = pass_flops(run)
    return MatrixFlops(*map(operator.add, forward, backward))


def pass_flops(run: TrainingRun) -> tuple[MatrixFlops, MatrixFlops]:
    """Count the matmuls of a micro-step's forward pass, and of its backward pass with what it recomputes.

    A weight that is trained has three matmuls a token (forward, input gradient, weight gradient), a frozen
    one has no weight gradient; each costs 2 operations an element. TRL's chunked head computes each tile of
    logits in the forward and again in the backward, then the hidden states' gradient
    (trl/kernels/chunked_logprob.py:347), and with a trained head its weight gradient.
    """
    setup, tokens = run.setup, run.micro_step.tokens
    work = linear_work(run.model, setup.target_modules)
    recomputed = checkpointed_share(run)
    layers = 2.0 * work.active_weights * tokens
    experts = 2.0 * work.active_expert_weights * tokens
    head = 2.0 * work.head_weights * tokens
    attention, masked, wide = _attention_flops(run)
    again = _attention_again(run, recomputed)
    trained = run.adapter is None
    tower = run.model.tower
    seen = 0.0 if tower is None or not run.sees_images else tower.flops(setup.image_patches)
    adapter = AdapterFlops(0.0, 0.0, 0.0, 0.0) if run.adapter is None else _adapter_flops(run, run.adapter)
    return (
        MatrixFlops(
            # A frozen vision tower looks at images once.
            layers=layers + seen * setup.per_device_train_batch_size,
            experts=experts,
            adapter=adapter.products + adapter.forward,
            head=head,
            attention=attention,
            masked_attention=masked,
            wide_masked_attention=wide,
        ),
        MatrixFlops(
            layers=layers * (1 + recomputed + trained),
            experts=experts * (1 + recomputed + trained) + adapter.folded_gradients,
            adapter=adapter.products * (2 + recomputed) + adapter.forward * recomputed + adapter.backward,
            head=head * (2 + (trained or run.trained.head)),
            attention=attention * again,
            masked_attention=masked * again,
            wide_masked_attention=wide * again,
        ),
    )


def _adapter_flops(run: TrainingRun, adapter: Adapter) -> AdapterFlops:
    """Count them.

    Experts and routers are parameters, which PEFT adapts by folding BA into the weight, of all experts, in
    each forward (peft/tuners/lora/layer.py: ParamWrapper). Of experts it does so twice: torch evaluates a
    parametrisation when it is registered, and again where the weight is used
    (torch/nn/utils/parametrize.py: ParametrizationList), but for those in 4 bits, which the launcher has
    evaluated once (launcher/training/loading/quantised_experts.py); of routers BA is computed once, before.
    The backward pass computes the folded weight's gradient, as of a trained one, and from it those of A and
    of B.
    """
    work = linear_work(run.model, adapter.target_modules)
    tokens, rank = run.micro_step.tokens, adapter.rank
    # The norm of W + BA needs BA itself, in each forward (peft/tuners/lora/dora.py:86-98).
    norm = 2.0 * rank * work.wrapped_weights if adapter.variant.magnitudes else 0.0
    experts, routers = 2.0 * rank * work.folded_weights, 2.0 * rank * work.folded_router_weights
    return AdapterFlops(
        products=2.0 * rank * (work.wrapped_inputs + work.wrapped_outputs) * tokens,
        forward=norm + (1 if run.storage.experts else 2) * experts + routers,
        backward=2 * (experts + routers),
        folded_gradients=2.0 * work.folded_active_weights * tokens,
    )


def checkpointed_share(run: TrainingRun | RunKind) -> float:
    """Share of the decoder layers' forward that runs again in the backward.

    An activation memory budget recomputes about as much of a compiled layer as it does not let it keep.
    """
    if run.setup.activation_memory_budget is not None:
        return 1.0 - run.setup.activation_memory_budget
    layers = run.model.num_hidden_layers
    return min(run.checkpointed_layers, layers) / layers


def attention_pairs(run: TrainingRun, layer: LayerSpec, kernel: str) -> float:
    """Query-key pairs that one head computes in a micro-step.

    Flash and flex attention skip what is masked. SDPA does so only without a mask tensor. Eager computes
    every pair. A packed batch is one long row.
    """
    setup = run.setup
    length, batch = setup.max_length, setup.sequences_per_micro_step
    window = layer.sliding_window
    if run.attention in SKIPS_MASKED:
        if window is None or window >= length:
            return batch * length * (length + 1) / 2
        return batch * (window * (window + 1) / 2 + (length - window) * window)
    if setup.packing:
        return float((batch * length) ** 2)
    if run.attention == "eager" or kernel == "masked":
        return float(batch * length * length)
    return batch * length * (length + 1) / 2


def _attention_flops(run: TrainingRun) -> tuple[float, float, float]:
    """Attention's share of the forward pass: of layers without a mask, of those with one, and of the latter
    those with wide heads apart.
    """
    found = [0.0, 0.0, 0.0]
    for layer, kernel in zip(run.model.layers, run.attention_kernels, strict=True):
        pairs = attention_pairs(run, layer, kernel)
        # QK^T and PV: 2 operations an element of the head each.
        kind = 0 if kernel != "masked" else 1 if layer.head_dim <= WIDE_HEAD else 2
        found[kind] += 4.0 * layer.count * layer.query_size * pairs
    return found[0], found[1], found[2]


def _attention_again(run: TrainingRun, recomputed: float) -> float:
    """Attention's operations in the backward pass, recomputed ones too, for each of the forward pass."""
    again = 0.0 if run.keeps_attention else recomputed
    return again + (EAGER_ATTENTION_BACKWARD if run.attention == "eager" else ATTENTION_BACKWARD)


@functools.lru_cache(maxsize=256)
def linear_work(model: ModelSpec, target_modules: str | tuple[str, ...]) -> LinearWork:
    """Sum up the model's matrix weights for one choice of LoRA targets."""
    found = adapted(model, target_modules)
    folded = found.experts + found.routers
    weights = [p for p in model.parameters if p.in_decoder_layer and len(p.shape) >= 2]
    linears = [p for p in weights if p.module_class == "Linear"]
    return LinearWork(
        active_weights=_active([p for p in weights if not _routed(p)], model),
        active_expert_weights=_active([p for p in weights if _routed(p)], model),
        linear_weights=sum(p.elements * p.count for p in linears),
        expert_weights=sum(p.elements * p.count for p in weights if is_expert_stack(p)),
        wrapped_inputs=sum(p.shape[1] * p.count for p in found.linears),
        wrapped_outputs=sum(p.shape[0] * p.count for p in found.linears),
        wrapped_weights=sum(p.elements * p.count for p in found.linears),
        wrapped_count=sum(p.count for p in found.linears),
        folded_weights=sum(p.elements * p.count * expert_rank(p.kind, 1) for p in found.experts),
        folded_router_weights=sum(p.elements * p.count for p in found.routers),
        folded_active_weights=_active(folded, model),
        head_weights=model.hidden_size * (1 if is_scored(model) else model.vocab_size),
    )


def _active(parameters: Iterable[Parameter], model: ModelSpec) -> int:
    """Weight elements that multiply each token."""
    return round(sum(p.elements * p.count * _routed_share(p, model) for p in parameters))


def _routed(parameter: Parameter) -> bool:
    """Whether it is of experts, that tokens are routed to."""
    return len(parameter.shape) >= 3 or ".experts." in parameter.name


def _routed_share(parameter: Parameter, model: ModelSpec) -> float:
    """Share of an expert tensor that multiplies one token; 1 for all other weights."""
    if not _routed(parameter):
        return 1.0
    for layer in model.layers:
        if layer.experts:
            return layer.experts_per_token / layer.experts
    return 1.0
