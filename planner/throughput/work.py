"""Work of one training step: what the GPU computes and moves, and what the host launches.

Matrix work is counted from the model's parameters (flops.py). Everything else follows from the same tape of
a decoder layer that memory is counted from: each tensor that a layer makes is a kernel launched and bytes
written, forward, recomputed and backward, for every knob that the memory model knows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from planner.base.values import dataclass
from planner.memory.decoder.groups import DecoderSetup, decoder_setup, groups_of
from planner.models.spec import LayerSpec, ModelSpec
from planner.setup.micro_step import MicroStep
from planner.setup.run import RunKind, TrainingRun
from planner.setup.trained import adapted
from planner.throughput.by_kind import ByKind, positions_of
from planner.throughput.eight_bit import CALL_SHARE, KERNEL_BYTES, eight_bit_products, sooner_flops
from planner.throughput.flops import MatrixFlops, checkpointed_share, linear_work, pass_flops
from planner.throughput.made import NOTHING, Made, forward_alone, layer_work
from planner.throughput.traffic import OPTIMIZER, OPTIMIZER_CALLS


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """Work by kind (work_kinds.py): of a micro-step's forward pass, of its backward pass with what that
    recomputes, of the micro-step beside both, and of an optimizer step. `total_flops` has eager attention's
    too.
    """

    total_flops: float
    forward: ByKind
    backward: ByKind
    micro_step: ByKind
    optimizer_step: ByKind

    @property
    def offloaded_bytes(self) -> float:
        """Bytes that leave for the host in the forward pass."""
        return self.forward["offloaded_byte"]


def step_work(run: TrainingRun) -> StepWork:
    """Count the work of a run's steps, sequences full."""
    setup, shape = run.setup, run.micro_step
    decoder = decoder_setup(run)
    made = _all_layers(run.model, decoder)
    flops = pass_flops(run)
    offloaded = made.kept.bytes_at(shape.tokens, shape.scores) if setup.activation_offloading else 0.0
    single, eager = setup.dtype == "float32", run.attention == "eager"
    single_head = single or (setup.prepare_for_kbit_training and not run.stack.autocast)
    forward, backward = (
        sizeless.with_amounts(
            _GROWING,
            (
                0.0 if single else part.layers - sooner_flops(eight_bit, shape.tokens),
                0.0 if single else part.experts,
                0.0 if single_head else part.head,
                (part.layers + part.experts if single else 0.0) + (part.head if single_head else 0.0),
                part.adapter,
                0.0 if eager else part.attention,
                part.masked_attention,
                part.wide_masked_attention,
                tensors.bytes_at(shape.tokens, shape.scores) - tensors.constant,
                offloaded,
            ),
        )
        for sizeless, part, tensors, eight_bit in zip(
            _sizeless(run.kind, decoder),
            flops,
            (made.forward, made.backward),
            eight_bit_products(run.kind),
            strict=True,
        )
    )
    if run.model.unseen_kernels:
        inside = _inside(run.model, decoder, positions=shape.scores // shape.tokens, run=shape)
        forward, backward = (one.plus(more, 1) for one, more in zip((forward, backward), inside, strict=True))
    total = sum(part.total for part in flops)
    for count, adapters in ((setup.objective.policy_passes, True), (setup.reference_passes, False)):
        if count:
            alone, operations = _pass_alone(run, decoder, flops[0], adapters=adapters)
            forward, total = forward.plus(alone, count), total + operations * count
    return StepWork(
        total_flops=total,
        forward=forward,
        backward=backward,
        micro_step=_ONE_MICRO_STEP,
        optimizer_step=_optimizer_step(run.kind),
    )


def _inside(
    model: ModelSpec, decoder: DecoderSetup, *, positions: int, run: MicroStep
) -> tuple[ByKind, ByKind]:
    """What both passes launch and write inside functions that were traced as one operation each, on rows of
    so many positions: transformers' reference in torch, a loop along the row.
    """
    launches, written = [0.0, 0.0], [0.0, 0.0]
    for part in groups_of(model, decoder)[0]:
        loops = None if part.layer.traced is None else part.layer.traced.loops
        if loops is None:
            continue
        again = (loops.forward,) if part.checkpointed else ()
        for at, works in enumerate(((loops.forward,), (loops.backward, *again))):
            for work in works:
                once, per_token, per_score = work.written
                launches[at] += len(part.indices) * (work.launches + work.per_position * positions)
                written[at] += len(part.indices) * (once + per_token * run.tokens + per_score * run.scores)
    forward, backward = (
        ByKind.counted("pass", launch=launch, written_byte=size)
        for launch, size in zip(launches, written, strict=True)
    )
    return forward, backward


def _pass_alone(
    run: TrainingRun, decoder: DecoderSetup, policy: MatrixFlops, *, adapters: bool
) -> tuple[ByKind, float]:
    """A forward pass that keeps nothing, with adapters at work or without, and its operations; `policy` are
    those of the forward pass that learns.
    """
    setup, shape = run.setup, run.micro_step
    flops = policy if adapters else policy._replace(adapter=0.0)
    made = NOTHING
    for part in groups_of(run.model, decoder)[0]:
        knobs = part.knobs if adapters else part.knobs.without_adapters()
        made = made.plus(forward_alone(part.layer, knobs), len(part.indices))
    single = setup.dtype == "float32"
    python = _python_runs(run.kind, linear_work(run.model, setup.target_modules).wrapped_count, 0)
    routed = sum(layer.count for layer in run.model.layers if layer.experts)
    found = ByKind.counted(
        "pass",
        layer_flop=0.0 if single else flops.layers,
        expert_flop=0.0 if single else flops.experts,
        head_flop=0.0 if single else flops.head,
        single_flop=flops.layers + flops.experts + flops.head if single else 0.0,
        adapter_flop=flops.adapter,
        attention_flop=0.0 if run.attention == "eager" else flops.attention,
        masked_attention_flop=flops.masked_attention,
        wide_masked_attention_flop=flops.wide_masked_attention,
        written_byte=made.bytes_at(shape.tokens, shape.scores) - made.constant,
        weight_byte=made.constant,
        launch=made.launches,
        quantized_call=python.quantized,
        lora_call=python.lora if adapters else 0.0,
        expert_call=python.experts if adapters else routed,
        eager_layer=python.eager_layers,
    )
    return found, flops.total


_GROWING = positions_of(
    "layer_flop",
    "expert_flop",
    "head_flop",
    "single_flop",
    "adapter_flop",
    "attention_flop",
    "masked_attention_flop",
    "wide_masked_attention_flop",
    "written_byte",
    "offloaded_byte",
)
"""What grows with the tokens of a micro-step."""


@lru_cache(maxsize=8192)
def _sizeless(run: RunKind, decoder: DecoderSetup) -> tuple[ByKind, ByKind]:
    """Of the forward and of the backward pass what is done whatever the tokens."""
    setup, model = run.setup, run.model
    made, share = _all_layers(model, decoder), checkpointed_share(run)
    wrapped = linear_work(model, setup.target_modules).wrapped_count
    forward_8bit, backward_8bit = eight_bit_products(run)
    python = _python_runs(run, wrapped, made.liger_kernels)
    forward, backward = (
        ByKind.counted(
            "pass",
            weight_byte=tensors.constant + KERNEL_BYTES * eight_bit.elements,
            launch=0.0 if setup.compile != "none" else tensors.launches + seen,
            selected_launch=dispatched.launches if setup.selective_checkpointing else 0.0,
            quantized_call=python.quantized * runs,
            lora_call=python.lora * runs,
            expert_call=python.experts * runs,
            liger_call=python.liger * nodes,
            eager_layer=python.eager_layers * runs,
            compiled_layer=python.compiled_layers,
            compiled_call=python.compiled * nodes + CALL_SHARE * eight_bit.products,
        )
        for tensors, dispatched, runs, nodes, eight_bit, seen in (
            (made.forward, made.forward, 1.0, 1.0, forward_8bit, _tower_launches(run)),
            # Backward nodes of bitsandbytes and Liger are Python too, of PEFT's layers torch's own.
            (made.backward, made.recomputed, share, 1.0 + share, backward_8bit, 0.0),
        )
    )
    return forward, backward


def _tower_launches(run: RunKind) -> float:
    tower, storage = run.model.tower, run.storage
    if tower is None or not run.sees_images:
        return 0.0
    return tower.launches(tower.pass_of(storage.width, quantized=storage.quantized and storage.tower))


@lru_cache(maxsize=8192)
def _optimizer_step(run: RunKind) -> ByKind:
    optim, trained = run.setup.optim, run.trained
    moved = trained.elements * OPTIMIZER[optim]
    return ByKind.counted(
        "optimizer_step",
        **{"optimizer_8bit_byte" if optim.endswith("_8bit") else "optimizer_byte": moved},
        optimizer_call=trained.tensor_count * OPTIMIZER_CALLS.get(optim, 1.0),
    )


_ONE_MICRO_STEP = ByKind.counted("micro_step", micro_step=1.0)


class _AllLayers(NamedTuple):
    """What all decoder layers make (in the backward pass with what it recomputes) and keep together."""

    forward: Made
    recomputed: Made
    backward: Made
    kept: Made
    liger_kernels: int


@lru_cache(maxsize=4096)
def _all_layers(model: ModelSpec, decoder: DecoderSetup) -> _AllLayers:
    """Sum up a model's layers."""
    forward = recomputed = backward = kept = NOTHING
    liger = 0
    for part in groups_of(model, decoder)[0]:
        count = len(part.indices)
        one = layer_work(
            part.layer,
            part.knobs,
            checkpointed=part.checkpointed,
            input_requires_grad=part.input_requires_grad,
        )
        inputs = Made(1, 0.0, part.input_bytes_per_token, 0.0)
        forward = forward.plus(one.forward, count)
        recomputed = recomputed.plus(one.recomputed, count)
        backward = backward.plus(one.backward, count).plus(one.recomputed, count)
        # A compiled layer is offloaded only where its input is all that it keeps (memory/refusals.py).
        alone = part.checkpointed or part.knobs.compiled
        kept = kept.plus(inputs if alone else one.kept, count)
        liger += count * _liger_kernels(part.layer)
    return _AllLayers(forward, recomputed, backward, kept, liger)


class _PythonRuns(NamedTuple):
    """Layers whose Python runs once a pass, by kind."""

    quantized: int
    lora: int
    liger: int
    compiled: int
    compiled_layers: int
    eager_layers: int
    experts: int


def _python_runs(run: RunKind, wrapped: int, liger: int) -> _PythonRuns:
    setup, model = run.setup, run.model
    experts = sum(layer.count for layer in model.layers if layer.experts)
    if setup.compile != "none":
        quantized = wrapped if setup.method == "qlora" else 0
        return _PythonRuns(0, 0, 0, quantized, model.num_hidden_layers, 0, 0)
    return _PythonRuns(
        wrapped if setup.method == "qlora" else 0,
        wrapped if setup.method == "lora" else 0,
        liger if setup.kernels == "liger" else 0,
        0,
        0,
        model.num_hidden_layers,
        experts * (1 + len(adapted(model, setup.target_modules).experts) if setup.uses_lora else 1),
    )


def _liger_kernels(layer: LayerSpec) -> int:
    """Kernels of Liger's in a layer's forward: norms, activation, rotation."""
    norms = 2 * layer.input_norms + 2 * layer.output_norms + 2 * (layer.qk_norm != "none")
    return norms + layer.gated_mlp + layer.rotary
