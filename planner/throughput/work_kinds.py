"""The kinds of work that a step's time is made of: one table, from which counts, rates, their files, their
scaling to other cards and the equations of their fit follow.
"""

from __future__ import annotations

from typing import Literal, get_args

from planner.base import validate
from planner.base.values import dataclass

Per = Literal["pass", "micro_step", "optimizer_step"]
"""What is counted: a forward or backward pass, a micro-step beside its passes, an optimizer step."""
Side = Literal["matrix", "traffic", "copies", "host"]
"""Who does it: the GPU's matrix units or its memory, the link to the host beside them, or the host."""
Scale = Literal[
    "matrix",
    "single",
    "attention",
    "masked_attention",
    "adapter",
    "elementwise",
    "dequantized",
    "host_copy",
    "launch",
    "quantized_call",
]
"""What a rate scales with from one GPU and host to another: fields of microbenchmarks.Slowdown."""
SCALES: tuple[Scale, ...] = get_args(Scale)
SIDES: dict[Per, tuple[Side, ...]] = {
    "pass": get_args(Side),
    "micro_step": ("host",),
    "optimizer_step": ("traffic", "host"),
}
"""The sides that time is computed from (rates.micro_step_time, Rates.optimizer_seconds)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkKind:
    """A kind of work.

    `name` is one unit of it, `start` the seconds that a unit takes where the reference's fit begins, roughly
    an H100's and its host's. `once_in` is the kind that it was counted in before it was told apart: files of
    rates from then have that one's for both. `came_later` says that it was not counted at all: files from
    then have none of it, and no time for it. `doc` says what is counted.
    """

    name: str
    per: Per
    side: Side
    scales_with: Scale
    start: float
    doc: str
    once_in: str | None = None
    came_later: bool = False

    def __post_init__(self) -> None:
        validate.text("kind of work", self.name)
        validate.choice(f"{self.name} per", self.per, SIDES)
        validate.choice(f"{self.name} side", self.side, SIDES[self.per])
        validate.choice(f"{self.name} scales_with", self.scales_with, SCALES)
        validate.number(f"{self.name} start", self.start, minimum=1e-18, maximum=10.0)

    @property
    def rate(self) -> str:
        """The name of its rate in JSON, in seconds a unit."""
        return f"{self.name}_seconds"


WORK_KINDS: tuple[WorkKind, ...] = (
    WorkKind(
        name="layer_flop",
        per="pass",
        side="matrix",
        scales_with="matrix",
        start=1 / 6e14,
        doc="floating-point operations of the decoder layers' matrices, in 16 bits",
    ),
    WorkKind(
        name="expert_flop",
        per="pass",
        side="matrix",
        scales_with="matrix",
        start=1 / 6e14,
        doc="those of a mixture's experts, in 16 bits: grouped products of the rows routed to each",
        once_in="layer_flop",
    ),
    WorkKind(
        name="attention_flop",
        per="pass",
        side="matrix",
        scales_with="attention",
        start=1 / 4e14,
        doc="those of attention in fused kernels without a mask (eager attention's are in its tensors)",
    ),
    WorkKind(
        name="masked_attention_flop",
        per="pass",
        side="matrix",
        scales_with="masked_attention",
        start=1 / 2e14,
        doc="those of attention in fused kernels that take a mask",
    ),
    WorkKind(
        name="wide_masked_attention_flop",
        per="pass",
        side="matrix",
        scales_with="masked_attention",
        start=1 / 2e14,
        doc="the same with heads wider than flops.WIDE_HEAD",
        once_in="masked_attention_flop",
    ),
    WorkKind(
        name="head_flop",
        per="pass",
        side="matrix",
        scales_with="matrix",
        start=1 / 5e14,
        doc="those of the output head, in 16 bits",
    ),
    WorkKind(
        name="adapter_flop",
        per="pass",
        side="matrix",
        scales_with="adapter",
        start=1 / 6e14,
        doc="those of the adapters",
    ),
    WorkKind(
        name="single_flop",
        per="pass",
        side="matrix",
        scales_with="single",
        # TF32: half the rate of 16 bits.
        start=1 / 3e14,
        doc="those of layers and head in fp32, by TF32 where the GPU has it",
    ),
    WorkKind(
        name="written_byte",
        per="pass",
        side="traffic",
        scales_with="elementwise",
        start=1e-12,
        doc="bytes of tensors made that grow with the batch",
    ),
    WorkKind(
        name="weight_byte",
        per="pass",
        side="traffic",
        scales_with="dequantized",
        start=1e-12,
        doc="bytes of tensors made that do not, dequantised weights above all",
    ),
    WorkKind(
        name="offloaded_byte",
        per="pass",
        side="copies",
        scales_with="host_copy",
        start=2e-11,
        doc="bytes that leave for the host in the forward pass and come back in the backward pass",
    ),
    WorkKind(
        name="optimizer_byte",
        per="optimizer_step",
        side="traffic",
        scales_with="elementwise",
        start=5e-13,
        doc="bytes that the optimizer moves (traffic.OPTIMIZER)",
    ),
    WorkKind(
        name="optimizer_8bit_byte",
        per="optimizer_step",
        side="traffic",
        # A search in a table of 256 values for each state: processors bound it, not memory. On
        # the H200 an element takes 30 ps (runs 20261201-846aa1929bd6, -afd014fa197a, -8d2b9b6b9cb1), its
        # bytes alone 8.
        scales_with="dequantized",
        start=1.5e-12,
        doc="those that an optimizer with states in 8 bits moves",
        once_in="optimizer_byte",
    ),
    WorkKind(
        name="launch",
        per="pass",
        side="host",
        scales_with="launch",
        start=3e-5,
        doc="tensors made by eager layers",
    ),
    WorkKind(
        name="quantized_call",
        per="pass",
        side="host",
        scales_with="quantized_call",
        start=1.5e-4,
        doc="runs of PEFT's Python around a 4-bit layer",
    ),
    WorkKind(
        name="lora_call",
        per="pass",
        side="host",
        scales_with="quantized_call",
        start=3e-5,
        doc="runs of PEFT's Python around a 16-bit layer",
    ),
    WorkKind(
        name="expert_call",
        per="pass",
        side="host",
        scales_with="launch",
        start=5e-4,
        doc="runs of transformers' Python around a layer's experts, and of PEFT's around what adapts them",
        came_later=True,
    ),
    WorkKind(
        name="liger_call",
        per="pass",
        side="host",
        scales_with="launch",
        start=1e-4,
        doc="runs of Liger's Python around one of its kernels",
    ),
    WorkKind(
        name="selected_launch",
        per="pass",
        side="host",
        scales_with="launch",
        start=3e-5,
        doc="tensors made where selective checkpointing looks at each operation",
    ),
    WorkKind(
        name="eager_layer",
        per="pass",
        side="host",
        scales_with="launch",
        start=1e-3,
        doc="eager decoder layers run",
    ),
    WorkKind(
        name="compiled_layer",
        per="pass",
        side="host",
        scales_with="launch",
        start=1e-3,
        doc="compiled decoder layers run",
    ),
    WorkKind(
        name="compiled_call",
        per="pass",
        side="host",
        scales_with="quantized_call",
        start=5e-4,
        doc="runs of the 4-bit layers in compiled ones, whose kernels no compiler sees into",
    ),
    WorkKind(
        name="micro_step",
        per="micro_step",
        side="host",
        scales_with="launch",
        start=4e-3,
        doc="micro-steps: collating a batch and what else comes once in each",
    ),
    WorkKind(
        name="optimizer_call",
        per="optimizer_step",
        side="host",
        scales_with="launch",
        start=1e-4,
        doc="the optimizer's runs of Python (traffic.OPTIMIZER_CALLS)",
    ),
)
"""All of them, in the order of the files of rates."""


def kinds_of(per: Per, *sides: Side) -> tuple[WorkKind, ...]:
    """The rows of those sides, in the table's order."""
    return tuple(kind for kind in WORK_KINDS if kind.per == per and kind.side in sides)
