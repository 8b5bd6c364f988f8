"""From the timeline to what is reported: phases as the driver shows them, and components."""

from __future__ import annotations

from functools import lru_cache

from planner.base.values import dataclass
from planner.memory.breakdown import Component, PhaseMemory
from planner.memory.measured.coefficients import Coefficients, Distance, ReserveTerms
from planner.memory.measured.cuda_terms import NO_NCCL, NcclMemory, managed_process_bytes
from planner.memory.step.replayed import ReplayedMemory
from planner.memory.step.resident import Resident
from planner.memory.step.timeline import StepMoment
from planner.setup.parallelism import DDP, FSDP
from planner.setup.run import TrainingRun

_SAVING = "adapter and state are copied to the host"


def phases(
    measured: Coefficients,
    resident: Resident,
    step: StepMoment,
    evaluation: StepMoment,
    terms: ReserveTerms,
    replayed: ReplayedMemory | None,
    distance: Distance,
    *,
    kind: str,
    context_bytes: int,
    loaded_context_bytes: int,
    nccl: NcclMemory = NO_NCCL,
    pools_bytes: int = 0,
) -> tuple[PhaseMemory, ...]:
    """Peaks of load, step, evaluation and save; what the allocator has reserved by then it keeps.

    Load and step are those of the allocator's replay where there is one. `kind` is the interval's,
    `context_bytes` the context once a step has run, `loaded_context_bytes` before one has, `nccl` what it
    then holds, `pools_bytes` what other streams' pools hold beside what is counted, which a replay has in it.
    """
    outside = outside_bytes(resident, context_bytes, nccl)
    if replayed is None:
        step_allocated = resident.allocated_bytes + step.total_bytes
        step_reserved = step_allocated + measured.reserve_bytes(terms) + pools_bytes
        load = load_reserved = resident.weights.allocated_bytes + resident.largest_dequantized_bytes
        load_margin, margin = measured.margin_bytes, measured.margin(terms, kind)
    else:
        step_allocated, step_reserved = replayed.step_allocated_bytes, replayed.step_reserved_bytes
        load, load_reserved = replayed.load_allocated_bytes, replayed.load_reserved_bytes
        load_margin = measured.replay_margin_bytes
        margin = measured.replay_margin(replayed.largest_block_bytes, kind)
    load_margin, margin = distance.widened(load_margin), distance.widened(margin) + nccl.spread_bytes
    evaluated = resident.allocated_bytes + evaluation.total_bytes
    rows = (
        (
            "load",
            "quantising the largest weight" if resident.largest_dequantized_bytes else "the last weight",
            load,
            load_reserved,
            loaded_context_bytes,
        ),
        ("step", step.name, step_allocated, step_reserved, outside),
        ("evaluation", evaluation.name, evaluated, max(evaluated, step_reserved), outside),
        ("save", _SAVING, resident.allocated_bytes, step_reserved, outside),
    )
    return tuple(
        PhaseMemory(
            name=name,
            peak_moment=moment,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            process_bytes=reserved + beyond,
            process_upper_bytes=reserved + beyond + (load_margin if name == "load" else margin),
        )
        for name, moment, allocated, reserved, beyond in rows
    )


def outside_bytes(resident: Resident, context_bytes: int, nccl: NcclMemory) -> int:
    """What the driver shows beside what torch's allocator has reserved, once a step has run."""
    return context_bytes + managed_process_bytes(resident.optimizer.managed_bytes) + nccl.expected_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentText:
    """What a component is called and where its bytes come from; words in braces are a run's."""

    name: str
    title: str
    origin: str


def _text(name: str, title: str, origin: str) -> ComponentText:
    return ComponentText(name=name, title=title, origin=origin)


COMPONENTS = (
    _text("weights_4bit", "weights in {held} bits", "{share} for each quantised weight"),
    _text(
        "weights_unquantized",
        "weights kept in {bits} bits",
        "embeddings, output head, norms, biases, routers and experts as transformers leaves them",
    ),
    _text(
        "quantization_constants",
        "quantisation constants",
        "bitsandbytes: {constants}",
    ),
    _text("adapter", "adapter", "rank x (inputs + outputs) of each target module"),
    _text("gradients", "gradients", "in the trained parameters' dtype, alive at the peak"),
    _text(
        "gradient_buckets",
        "gradient buckets",
        "DDP: the buffers that gradients are averaged in, as large as they are",
    ),
    _text("optimizer", "optimizer", "{optim}: state by tensor, as torch or bitsandbytes lays it out"),
    _text("activations", "activations", "checkpoints, what layers save for backward, and the layer at work"),
    _text(
        "gathered",
        "gathered weights",
        "FSDP2: the layer at work, and the buffer that the next one arrives in",
    ),
    _text("head_and_loss", "head and loss", "{head}"),
    _text(
        "workspace", "workspace", "dequantised weights of the layer at work, optimizer temporaries, cuBLAS"
    ),
    _text(
        "allocator",
        "allocator reserve",
        "rounding, and cached blocks that do not fit what is asked for ({reserve})",
    ),
    _text("nccl", "NCCL", "the channels' buffers, outside torch's allocator, from the first collective on"),
    _text("context", "CUDA context", "context, kernels and libraries (measured: {coefficients})"),
)
"""In the order in which people think of them."""
OF_SEVERAL = {
    "gradient_buckets": DDP,
    "gathered": FSDP,
    "nccl": None,
}
"""Components that a run on several GPUs has, by the way in which they share the work (null: either)."""


def components(
    run: TrainingRun,
    measured: Coefficients,
    resident: Resident,
    step: StepMoment,
    phase: PhaseMemory,
    nccl: NcclMemory = NO_NCCL,
    *,
    context_bytes: int,
    replayed: bool,
) -> tuple[Component, ...]:
    """The parts of the step's process bytes.

    What the allocator holds beyond the counted parts is its reserve: cached blocks, unsplit tails, rounding.
    """
    weights, optimizer = resident.weights, resident.optimizer
    counted = resident.allocated_bytes + step.total_bytes
    sizes = {
        "weights_4bit": weights.quantized_bytes,
        "weights_unquantized": weights.unquantized_bytes + resident.upcast_bytes + resident.reference_bytes,
        "quantization_constants": weights.constants_bytes,
        "adapter": resident.adapter_bytes,
        "gradients": step.gradient_bytes,
        "gradient_buckets": resident.buckets_bytes,
        "gathered": step.gathered_bytes,
        "nccl": nccl.expected_bytes,
        "optimizer": optimizer.allocated_bytes + managed_process_bytes(optimizer.managed_bytes),
        "activations": step.kept_bytes + step.live_bytes + resident.tables_bytes,
        "head_and_loss": step.head_bytes,
        "workspace": step.workspace_bytes + resident.cublas_bytes,
        "allocator": weights.rounding_bytes + phase.reserved_bytes - counted,
        "context": context_bytes,
    }
    texts = _component_texts(
        () if run.parallelism.is_single else (None, run.parallelism.strategy),
        run.storage.width * 8,
        run.storage.bits,
        run.setup.optim,
        run.stack.head_words,
        "torch's allocator replayed" if replayed else "measured",
        measured.name,
    )
    return tuple(
        [
            Component(name=row.name, title=row.title, size_bytes=sizes[row.name], origin=row.origin)
            for row in texts
        ]
    )


def _of_storage(held: int) -> dict[str, object]:
    """What is said of weights that are quantised to so many bits."""
    four = "one constant per 64 weights, themselves quantised with double quantisation"
    share, constants = ("half a byte", four) if held == 4 else ("a byte", "one constant for each output")
    return {"held": held, "share": share, "constants": constants}


@lru_cache(maxsize=512)
def _component_texts(
    shared: tuple[str | None, ...],
    bits: int,
    held: int,
    optim: str,
    head: str,
    reserve: str,
    coefficients: str,
) -> tuple[ComponentText, ...]:
    """Those of COMPONENTS that a run has, with its words; of OF_SEVERAL it has those of `shared` ways."""
    words: dict[str, object] = {
        "bits": bits,
        "optim": optim,
        "head": head,
        "reserve": reserve,
        "coefficients": coefficients,
    }
    words |= _of_storage(held)
    return tuple(
        _text(row.name, row.title.format(**words), row.origin.format(**words))
        for row in COMPONENTS
        if row.name not in OF_SEVERAL or OF_SEVERAL[row.name] in shared
    )
