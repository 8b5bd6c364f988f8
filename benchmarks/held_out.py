"""Measured runs beside their predictions from fits without their models, and the knobs that they had."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from planner.calibration.accuracy import shipped_records
from planner.calibration.memory_fit import Calibration, Residual, calibrate
from planner.calibration.records import RunRecord
from planner.gpus.catalog import gpu_catalog
from planner.memory.measured.coverage import Trait, model_traits, run_traits
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import EXPANDABLE
from planner.setup.run import TrainingRun

PLAIN = "QLoRA, every layer checkpointed, no other knob"
KNOBS: dict[str, Trait] = {
    "LoRA": ("method", "lora"),
    "full": ("method", "full"),
    "dropout": ("lora_dropout", "above 0"),
    "no layer checkpointed": ("gradient_checkpointing", "no layer"),
    "k of L checkpointed": ("gradient_checkpointing", "some layers"),
    "selective checkpointing": ("selective_checkpointing", "true"),
    "activation offloading": ("activation_offloading", "true"),
    "DoRA": ("use_dora", "true"),
    "k-bit preparation": ("prepare_for_kbit_training", "true"),
    "packing": ("packing", "true"),
    "padded batches": ("padded batches", "true"),
    "eager attention": ("attn_implementation", "eager"),
    "flex attention": ("attn_implementation", "flex_attention"),
    "Liger's kernels": ("kernels", "liger"),
    "compiled layers": ("compile", "regional"),
    "float16": ("dtype", "float16"),
    "float32": ("dtype", "float32"),
    "several micro-steps": ("gradient_accumulation_steps", "several"),
    "experts": ("experts", "true"),
}
"""Knobs by what pages call them."""
_USUAL = frozenset(
    {
        ("method", "qlora"),
        ("dtype", "bfloat16"),
        ("attn_implementation", "sdpa"),
        ("kernels", "none"),
        ("compile", "none"),
        ("gradient_checkpointing", "all layers"),
        ("lora_dropout", "0"),
    }
)
_UNUSUAL = frozenset(
    KNOBS[name]
    for name in (
        "selective checkpointing",
        "activation offloading",
        "DoRA",
        "k-bit preparation",
        "packing",
        "padded batches",
    )
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A run, its held-out errors by the allocator's replay and by the fit, and what values it had."""

    record: RunRecord
    residual: Residual
    fitted: Residual
    values: frozenset[Trait]

    def is_of(self, label: str) -> bool:
        """Whether the run has the knob that KNOBS calls so, or is PLAIN.

        Raises:
            KeyError: there is no such knob.
        """
        if label == PLAIN:
            return self.values >= _USUAL and not self.values & _UNUSUAL
        return KNOBS[label] in self.values

    @property
    def knobs(self) -> str:
        """The knobs that the run had, in words."""
        return ", ".join(label for label in KNOBS if self.is_of(label)) or PLAIN


@functools.cache
def calibration(gpu_id: str, allocator: str = EXPANDABLE) -> Calibration:
    """The fit to the committed records of a GPU and an allocator, with its held-out residuals."""
    gpu = gpu_catalog().get(gpu_id)
    return calibrate(shipped_records(), gpu, load_shipped, name=gpu_id, allocator=allocator)


@functools.cache
def compared(gpu_id: str, allocator: str = EXPANDABLE) -> tuple[Compared, ...]:
    """Every usable run of a GPU with an allocator."""
    found = calibration(gpu_id, allocator)
    records = {record.id: record for record in shipped_records()}
    return tuple(
        Compared(
            record=records[one.record_id],
            residual=one,
            fitted=fitted,
            values=_values(records[one.record_id]),
        )
        for one, fitted in zip(found.residuals, found.fitted_residuals, strict=True)
    )


def _values(record: RunRecord) -> frozenset[Trait]:
    model = load_shipped(record.setup.model)
    return run_traits(TrainingRun(setup=record.setup, model=model, padded=record.padded)) | model_traits(
        model
    )
