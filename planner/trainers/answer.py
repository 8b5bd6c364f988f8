"""What a trainer's config needs there, and what to change in its own words until it fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from planner.base.errors import InputError
from planner.base.values import dataclass
from planner.gpus.target import GpuTarget
from planner.models.catalog import Inspector
from planner.planning.estimation import Estimate, Estimator
from planner.trainers.config import TrainerConfig
from planner.trainers.files import Trainer, read_config, read_values, trainer_of

_SHORTEST = 512
_FUSED: dict[str, dict[str, Any]] = {
    "axolotl": {
        "plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"],
        "cut_cross_entropy": True,
    },
    "llamafactory": {"enable_liger_kernel": True},
    "trl": {},
    "unsloth": {},
}
"""What removes the logits, where the trainer makes them all at once."""
_NARROW: dict[str, dict[str, Any]] = {
    "axolotl": {"peft_autocast_adapter_dtype": False},
    "llamafactory": {"pure_bf16": True},
    "trl": {},
    "unsloth": {},
}
_QUANTISED: dict[str, dict[str, Any]] = {
    "axolotl": {"adapter": "qlora", "load_in_4bit": True},
    "llamafactory": {"quantization_bit": 4},
    "trl": {"load_in_4bit": True},
    "unsloth": {"load_in_4bit": True},
}
_WORDS: dict[str, dict[str, str]] = {
    "axolotl": {"batch": "micro_batch_size", "length": "sequence_len", "optim": "optimizer"},
    "llamafactory": {"batch": "per_device_train_batch_size", "length": "cutoff_len", "optim": "optim"},
    "trl": {"batch": "per_device_train_batch_size", "length": "max_length", "optim": "optim"},
    "unsloth": {"batch": "per_device_train_batch_size", "length": "max_length", "optim": "optim"},
}
_CHECKPOINTING: dict[str, dict[str, Any]] = {
    "axolotl": {"gradient_checkpointing": True},
    "llamafactory": {"disable_gradient_checkpointing": False},
    "trl": {"gradient_checkpointing": True},
    "unsloth": {"use_gradient_checkpointing": "unsloth"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Settings to change together, in a trainer's words; what is needed at most with them and all before."""

    settings: tuple[tuple[str, Any], ...]
    peak_upper_bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigAnswer:
    """A config with what it needs on a card, and changes until it fits (none where it does)."""

    path: str
    trainer: Trainer
    config: TrainerConfig
    target: GpuTarget
    estimate: Estimate
    changes: tuple[Change, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the contract of `vramwise estimate --config --json`."""
        return {
            "version": 1,
            "path": self.path,
            "trainer_version": self.trainer.version,
            "gpu": self.target.spec.id,
            "usable_bytes": self.target.usable_bytes,
            "config": self.config.to_dict(),
            "estimate": self.estimate.to_dict(),
            "changes": [
                {
                    "settings": dict(change.settings),
                    "peak_upper_bytes": change.peak_upper_bytes,
                    "fits": change.fits,
                }
                for change in self.changes
            ],
        }


def answer(
    path: Path,
    target: GpuTarget,
    *,
    trainer: str | None = None,
    accelerate: Path | None = None,
    allow_network: bool = False,
    inspector: Inspector | None = None,
) -> ConfigAnswer:
    """Read a trainer's config and estimate it with that trainer's stack.

    Raises:
        InputError: a file cannot be read, asks for what is not planned, or names an unknown model.
    """
    config = read_config(path, target, trainer=trainer, accelerate=accelerate)
    estimator = Estimator(target, allow_network=allow_network, inspector=inspector, stack=config.stack)
    found = estimator.estimate(config.setup)
    values = dict(read_values(path))
    which = trainer_of(values, trainer)
    changes: tuple[Change, ...] = ()
    if not found.fits and accelerate is None:
        changes = tuple(_changes(values, which, config, target, allow_network, inspector))
    return ConfigAnswer(
        path=str(path), trainer=which, config=config, target=target, estimate=found, changes=changes
    )


def _changes(
    values: dict[str, Any],
    trainer: Trainer,
    config: TrainerConfig,
    target: GpuTarget,
    allow_network: bool,
    inspector: Inspector | None,
) -> Iterator[Change]:
    """Changes one after the other, each with those before it, until the config fits; what helps nothing is
    left out.
    """
    values, least = dict(values), None
    for settings in _candidates(trainer.name, config):
        tried = {**values, **settings}
        try:
            read = trainer.read(tried, auto_dtype=target.spec.dtype, gpus=target.count)
            estimator = Estimator(target, allow_network=allow_network, inspector=inspector, stack=read.stack)
            found = estimator.estimate(read.setup)
        except InputError:
            continue
        upper = found.memory.peak_upper_bytes
        if least is not None and upper >= least:
            continue
        values, least = tried, upper
        yield Change(settings=tuple(settings.items()), peak_upper_bytes=upper, fits=found.fits)
        if found.fits:
            return


def _candidates(name: str, config: TrainerConfig) -> Iterator[Mapping[str, Any]]:
    """What to try, what costs least first: speed, then what is learned, then the method."""
    setup, words = config.setup, _WORDS[name]
    if config.stack.head_tokens is None and _FUSED[name]:
        yield _FUSED[name]
    if setup.optim in ("adamw_torch", "adamw_torch_fused"):
        yield {words["optim"]: "adamw_8bit"}
    if not setup.gradient_checkpointing:
        yield _CHECKPOINTING[name]
    if setup.uses_lora and config.stack.adapter_dtype == "float32" and _NARROW[name]:
        yield _NARROW[name]
    batch, accumulation = setup.per_device_train_batch_size, setup.gradient_accumulation_steps
    while batch > 1 and batch % 2 == 0:
        batch, accumulation = batch // 2, accumulation * 2
        yield {words["batch"]: batch, "gradient_accumulation_steps": accumulation}
    if setup.method == "lora":
        yield _QUANTISED[name]
    length = setup.max_length
    while length // 2 >= _SHORTEST:
        length //= 2
        yield {words["length"]: length}
