"""TrainingSetup: every knob that changes memory or speed, named as TRL, PEFT and bitsandbytes name it.

The JSON form is a contract: `vramwise estimate` reads it and every plan holds it. Unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.base import validate
from planner.base.errors import FieldError, InputError

METHODS = ("qlora", "lora", "full")
DTYPES = ("bfloat16", "float16", "float32")
QUANT_TYPES = ("nf4", "fp4")
OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adafactor",
    "lion_8bit",
    "paged_lion_8bit",
    "sgd",
)
ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flex_attention")
KERNELS = ("none", "liger")
COMPILE = ("none", "regional")
SAMPLING_STRATEGIES = ("random", "group_by_length")
DISTRIBUTED = ("ddp", "fsdp")
ALL_LINEAR = "all-linear"

MAX_LENGTH = 2**24
MAX_BATCH = 2**16
MAX_ACCUMULATION = 2**20
MAX_RANK = 2**14
MAX_PROCESSES = 2**14


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSetup:
    """One training run's knobs, validated at construction.

    Defaults are the contract's, not TRL's. `lora_alpha=None` stands for twice the rank,
    `checkpointed_layers=None` for all decoder layers, `attn_implementation=None` for what transformers
    picks for the model, `activation_memory_budget=None` for no budget, `distributed=None` for one process.
    LoRA and quantisation keys keep their defaults for methods that do not use them; a value other than the
    default there is a contradiction and refused.

    Raises:
        FieldError: a value is outside what the field accepts.
        InputError: two values contradict each other.
    """

    model: str
    max_length: int
    method: str = "qlora"
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    dtype: str = "bfloat16"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_quant_type: str = "nf4"
    lora_r: int = 16
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    use_dora: bool = False
    use_rslora: bool = False
    optim: str = "paged_adamw_8bit"
    gradient_checkpointing: bool = True
    checkpointed_layers: int | None = None
    selective_checkpointing: bool = False
    activation_offloading: bool = False
    attn_implementation: str | None = None
    kernels: str = "none"
    compile: str = "none"
    activation_memory_budget: float | None = None
    prepare_for_kbit_training: bool = False
    packing: bool = False
    train_sampling_strategy: str = "random"
    num_processes: int = 1
    distributed: str | None = None

    def __post_init__(self) -> None:
        validate.text("model", self.model)
        validate.integer("max_length", self.max_length, minimum=1, maximum=MAX_LENGTH)
        validate.choice("method", self.method, METHODS)
        validate.integer(
            "per_device_train_batch_size", self.per_device_train_batch_size, minimum=1, maximum=MAX_BATCH
        )
        validate.integer(
            "gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            minimum=1,
            maximum=MAX_ACCUMULATION,
        )
        validate.choice("dtype", self.dtype, DTYPES)
        validate.boolean("bnb_4bit_use_double_quant", self.bnb_4bit_use_double_quant)
        validate.choice("bnb_4bit_quant_type", self.bnb_4bit_quant_type, QUANT_TYPES)
        validate.integer("lora_r", self.lora_r, minimum=1, maximum=MAX_RANK)
        if self.lora_alpha is not None:
            validate.integer("lora_alpha", self.lora_alpha, minimum=1, maximum=MAX_RANK * 64)
        validate.number("lora_dropout", self.lora_dropout, minimum=0.0, maximum=0.99)
        object.__setattr__(self, "target_modules", _target_modules(self.target_modules))
        for name in _BOOLEANS:
            validate.boolean(name, getattr(self, name))
        validate.choice("optim", self.optim, OPTIMIZERS)
        if self.checkpointed_layers is not None:
            validate.integer("checkpointed_layers", self.checkpointed_layers, minimum=0, maximum=10_000)
        if self.attn_implementation is not None:
            validate.choice("attn_implementation", self.attn_implementation, ATTENTION_IMPLEMENTATIONS)
        validate.choice("kernels", self.kernels, KERNELS)
        validate.choice("compile", self.compile, COMPILE)
        if self.activation_memory_budget is not None:
            validate.number(
                "activation_memory_budget", self.activation_memory_budget, minimum=0.0, maximum=1.0
            )
        validate.choice("train_sampling_strategy", self.train_sampling_strategy, SAMPLING_STRATEGIES)
        validate.integer("num_processes", self.num_processes, minimum=1, maximum=MAX_PROCESSES)
        if self.distributed is not None:
            validate.choice("distributed", self.distributed, DISTRIBUTED)
        _refuse_contradictions(self)

    @property
    def alpha(self) -> int:
        """lora_alpha with its default of twice the rank resolved."""
        return 2 * self.lora_r if self.lora_alpha is None else self.lora_alpha

    @property
    def tokens_per_micro_step(self) -> int:
        """Tokens of one forward pass on one GPU, sequences full."""
        return self.max_length * self.per_device_train_batch_size

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
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: every key of the contract, lists for tuples."""
        values = {name: getattr(self, name) for name in FIELD_NAMES}
        if isinstance(self.target_modules, tuple):
            values["target_modules"] = list(self.target_modules)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingSetup:
        """Read the JSON form; missing keys take the contract's defaults.

        Raises:
            InputError: not an object, an unknown or missing key, or a value that is not accepted.
        """
        if not isinstance(values, Mapping):
            raise InputError("a training setup must be a JSON object")
        for key in values:
            if key not in FIELD_NAMES:
                raise FieldError("setup key", key, "one of " + ", ".join(FIELD_NAMES))
        for key in ("model", "max_length"):
            if key not in values:
                raise InputError(f"{key} is required in a training setup")
        return cls(**values)


FIELD_NAMES: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(TrainingSetup))
_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(TrainingSetup)
    if field.default is not dataclasses.MISSING
}
_BOOLEANS = (
    "use_dora",
    "use_rslora",
    "gradient_checkpointing",
    "selective_checkpointing",
    "activation_offloading",
    "prepare_for_kbit_training",
    "packing",
)
_LORA_ONLY = ("lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora")


def _target_modules(value: object) -> str | tuple[str, ...]:
    accepted = f'"{ALL_LINEAR}" or a non-empty list of module names'
    if value == ALL_LINEAR:
        return ALL_LINEAR
    if not isinstance(value, list | tuple) or not value or len(value) > 1000:
        raise FieldError("target_modules", value, accepted)
    for item in value:
        if not isinstance(item, str) or not item or not item.isprintable():
            raise FieldError("target_modules", value, accepted)
    if len(set(value)) != len(value):
        raise FieldError("target_modules", value, "each module name once")
    return tuple(value)


def _refuse_contradictions(setup: TrainingSetup) -> None:
    if setup.method == "full":
        for name in _LORA_ONLY:
            if getattr(setup, name) != _DEFAULTS[name]:
                raise InputError(f"{name} applies to qlora and lora, but method is full")
    if setup.method != "qlora" and setup.prepare_for_kbit_training:
        raise InputError("prepare_for_kbit_training applies to qlora, but method is " + setup.method)
    if not setup.gradient_checkpointing:
        if setup.checkpointed_layers not in (None, 0):
            raise InputError("checkpointed_layers needs gradient_checkpointing true")
        if setup.selective_checkpointing:
            raise InputError("selective_checkpointing needs gradient_checkpointing true")
    if setup.activation_memory_budget is not None:
        if setup.compile == "none":
            raise InputError("activation_memory_budget needs compile regional")
        if setup.gradient_checkpointing:
            raise InputError("activation_memory_budget needs gradient_checkpointing false")
    if setup.packing and setup.train_sampling_strategy != "random":
        raise InputError(
            f"train_sampling_strategy {setup.train_sampling_strategy} needs packing false: packed sequences "
            "are all of one length"
        )
    if setup.num_processes == 1 and setup.distributed is not None:
        raise InputError("distributed needs num_processes of at least 2")
    if setup.num_processes > 1 and setup.distributed is None:
        raise InputError("num_processes of 2 or more needs distributed: ddp or fsdp")
