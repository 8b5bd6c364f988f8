"""TrainingSetup: every knob that changes memory or speed, named as TRL, PEFT and bitsandbytes name it.

The JSON form is a contract: `vramwise estimate` reads it and every plan holds it. Unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from operator import attrgetter
from typing import Any

from planner.base import validate
from planner.base.errors import FieldError, InputError
from planner.base.json_codec import encode_text
from planner.base.values import dataclass
from planner.setup.checks import setup_check
from planner.setup.knob import METHODS
from planner.setup.knobs import KNOBS
from planner.setup.objective import TASKS, Objective
from planner.setup.training_knobs import ALL_LINEAR, MAX_LENGTH, OPTIMIZERS

__all__ = ["ALL_LINEAR", "FIELD_NAMES", "MAX_LENGTH", "METHODS", "OPTIMIZERS", "TrainingSetup"]

# Untyped: a row's default is of any knob's type. A test compares the rows' kinds with the fields' types.
_DEFAULTS: dict[str, Any] = {knob.name: knob.default for knob in KNOBS}
_LISTS = tuple(knob.name for knob in KNOBS if knob.kind in ("names", "indices"))
_check_knobs = setup_check(KNOBS)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSetup:
    """One training run's knobs, validated at construction.

    Defaults are the contract's, not TRL's. What each knob accepts, what null stands for and what it needs of
    others is in its row of KNOBS. A knob that the method does not use has its default: another value is a
    contradiction and refused, unless the row says that it is kept.

    Raises:
        FieldError: a value is outside what the field accepts.
        InputError: two values contradict each other.
    """

    model: str
    max_length: int
    method: str = _DEFAULTS["method"]
    per_device_train_batch_size: int = _DEFAULTS["per_device_train_batch_size"]
    gradient_accumulation_steps: int = _DEFAULTS["gradient_accumulation_steps"]
    dtype: str = _DEFAULTS["dtype"]
    bnb_4bit_use_double_quant: bool = _DEFAULTS["bnb_4bit_use_double_quant"]
    bnb_4bit_quant_type: str = _DEFAULTS["bnb_4bit_quant_type"]
    load_in_8bit: bool = _DEFAULTS["load_in_8bit"]
    experts: str = _DEFAULTS["experts"]
    experts_matmul: str = _DEFAULTS["experts_matmul"]
    vision_tower: str = _DEFAULTS["vision_tower"]
    lora_r: int = _DEFAULTS["lora_r"]
    lora_alpha: int | None = _DEFAULTS["lora_alpha"]
    lora_dropout: float = _DEFAULTS["lora_dropout"]
    target_modules: str | tuple[str, ...] = _DEFAULTS["target_modules"]
    peft_type: str = _DEFAULTS["peft_type"]
    bias: str = _DEFAULTS["bias"]
    modules_to_save: str | tuple[str, ...] | None = _DEFAULTS["modules_to_save"]
    trainable_token_indices: tuple[int, ...] | None = _DEFAULTS["trainable_token_indices"]
    use_dora: bool = _DEFAULTS["use_dora"]
    use_rslora: bool = _DEFAULTS["use_rslora"]
    init_lora_weights: str = _DEFAULTS["init_lora_weights"]
    loraplus_lr_ratio: float | None = _DEFAULTS["loraplus_lr_ratio"]
    optim: str = _DEFAULTS["optim"]
    task: str = _DEFAULTS["task"]
    precompute_ref_log_probs: bool = _DEFAULTS["precompute_ref_log_probs"]
    gradient_checkpointing: bool = _DEFAULTS["gradient_checkpointing"]
    checkpointed_layers: int | None = _DEFAULTS["checkpointed_layers"]
    selective_checkpointing: bool = _DEFAULTS["selective_checkpointing"]
    activation_offloading: bool = _DEFAULTS["activation_offloading"]
    attn_implementation: str | None = _DEFAULTS["attn_implementation"]
    kernels: str = _DEFAULTS["kernels"]
    compile: str = _DEFAULTS["compile"]
    activation_memory_budget: float | None = _DEFAULTS["activation_memory_budget"]
    base_matmul: str = _DEFAULTS["base_matmul"]
    prepare_for_kbit_training: bool = _DEFAULTS["prepare_for_kbit_training"]
    packing: bool = _DEFAULTS["packing"]
    train_sampling_strategy: str = _DEFAULTS["train_sampling_strategy"]
    image_patches: int = _DEFAULTS["image_patches"]
    num_processes: int = _DEFAULTS["num_processes"]
    distributed: str | None = _DEFAULTS["distributed"]

    def __post_init__(self) -> None:
        validate.text("model", self.model)
        _check_knobs(self)
        for name in _LISTS:
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    @property
    def alpha(self) -> int:
        """lora_alpha with its default of twice the rank resolved."""
        return 2 * self.lora_r if self.lora_alpha is None else self.lora_alpha

    @property
    def objective(self) -> Objective:
        """What is learned from an example."""
        return TASKS[self.task]

    @property
    def sequences_per_micro_step(self) -> int:
        """Rows of one forward pass on one GPU."""
        return self.per_device_train_batch_size * self.objective.sequences_per_example

    @property
    def extra_passes(self) -> int:
        """Forward passes of a micro-step beside the one that learns."""
        return self.objective.policy_passes + self.reference_passes

    @property
    def reference_passes(self) -> int:
        """Forward passes of the reference in a micro-step: none where they were run before training."""
        return 0 if self.precompute_ref_log_probs else self.objective.reference_passes

    @property
    def tokens_per_micro_step(self) -> int:
        """Tokens of one forward pass on one GPU, sequences full."""
        return self.max_length * self.sequences_per_micro_step

    @property
    def every_process_has_rows(self) -> bool:
        """Whether adapters that are shared out by rows, `ceil(lora_r / num_processes)` to each process, leave
        none without (torch/distributed/fsdp/_fully_shard/_fsdp_param.py pads the last ones).
        """
        rows = -(-self.lora_r // self.num_processes)
        return not self.uses_lora or rows * (self.num_processes - 1) < self.lora_r

    @property
    def effective_batch_size(self) -> int:
        """Sequences that one optimizer step sees, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_processes

    @property
    def uses_lora(self) -> bool:
        """Whether the run trains an adapter (QLoRA and LoRA) and not the base weights."""
        return self.method != "full"

    def replace(self, **changes: Any) -> TrainingSetup:
        """Copy with fields changed, validated again."""
        return TrainingSetup(**dict(zip(FIELD_NAMES, _values_of(self), strict=True)) | changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: every key of the contract, lists for tuples."""
        values = zip(FIELD_NAMES, _values_of(self), strict=True)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}

    def to_json(self) -> str:
        """The same as text; what a knob's values are written as is remembered, but for numbers."""
        values = _values_of(self)
        return "{" + ", ".join([write(value) for write, value in zip(_WRITERS, values, strict=True)]) + "}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingSetup:
        """Read the JSON form; missing keys take the contract's defaults.

        Raises:
            InputError: not an object, an unknown or missing key, or a value that is not accepted.
        """
        if not isinstance(values, Mapping):
            raise InputError("a training setup must be a JSON object")
        if not _FIELDS.issuperset(values):
            unknown = next(key for key in values if key not in _FIELDS)
            raise FieldError("setup key", unknown, "one of " + ", ".join(FIELD_NAMES))
        for key in ("model", "max_length"):
            if key not in values:
                raise InputError(f"{key} is required in a training setup")
        return cls(**values)


FIELD_NAMES: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(TrainingSetup))
_FIELDS = frozenset(FIELD_NAMES)
_values_of = attrgetter(*FIELD_NAMES)


def _writer(name: str, kind: str) -> Callable[[Any], str]:
    """What writes a knob with its value, as `encode_text` does."""

    def write(value: Any) -> str:
        return f'"{name}": {encode_text(value)}'

    known = lru_cache(maxsize=256)(write)

    def write_number(value: Any) -> str:
        # Numbers may be equal and written otherwise.
        return known(None) if value is None else f'"{name}": {value!r}'

    return write_number if kind in ("int", "float") else known


_KINDS = {knob.name: knob.kind for knob in KNOBS}
_WRITERS = tuple(_writer(name, _KINDS.get(name, "text")) for name in FIELD_NAMES)
