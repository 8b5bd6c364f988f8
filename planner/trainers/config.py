"""TrainerConfig: what a trainer's file asks for. Keys: a file's keys, each taken by name and remembered."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from planner.base import validate
from planner.base.errors import FieldError, InputError
from planner.base.values import dataclass
from planner.setup.stack import Stack
from planner.setup.training_setup import OPTIMIZERS, TrainingSetup


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    """A trainer's file as a setup with that trainer's stack.

    `used` are the keys that the setup follows from, `unused` all others of the file; `notes` say what of it
    is counted otherwise than it runs. `num_train_epochs` and `learning_rate` are the file's, null where it
    leaves them to the trainer.
    """

    trainer: str
    stack: Stack
    setup: TrainingSetup
    num_train_epochs: float | None
    learning_rate: float | None
    used: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "trainer": self.trainer,
            "stack": self.stack.name,
            "setup": self.setup.to_dict(),
            "num_train_epochs": self.num_train_epochs,
            "learning_rate": self.learning_rate,
            "used": list(self.used),
            "unused": list(self.unused),
            "notes": list(self.notes),
        }


class Keys:
    """The keys of a file. What is taken counts as used if the file has it; null counts as not there."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._taken: list[str] = []
        self._implied: dict[str, Any] = {}
        self.notes: list[str] = []

    def take(self, key: str) -> Any:
        """A key's value as it is; None where it is null or not there."""
        if key in self._values and key not in self._taken:
            self._taken.append(key)
        found = self._values.get(key)
        return self._implied.get(key) if found is None else found

    def imply(self, key: str, *, value: Any) -> None:
        """A key's value that follows from others of the file, which has it not."""
        self._implied[key] = value

    def text(self, key: str, default: str | None = None) -> str | None:
        """A text.

        Raises:
            FieldError: it is something else.
        """
        value = self.take(key)
        return default if value is None else validate.text(key, value)

    def integer(self, key: str, default: int | None = None) -> int | None:
        """A whole number, which YAML may have as a text.

        Raises:
            FieldError: it is something else.
        """
        value = self.take(key)
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        return default if value is None else validate.integer(key, value, minimum=0, maximum=2**40)

    def number(self, key: str, default: float | None = None) -> float | None:
        """A number, which YAML 1.1 has as a text where it is written as 1e-4.

        Raises:
            FieldError: it is something else.
        """
        value = self.take(key)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError as error:
                raise FieldError(key, value, "a number") from error
        return default if value is None else validate.number(key, value, minimum=0.0, maximum=1e12)

    def switch(self, key: str, *, default: bool = False) -> bool:
        """True or false, which YAML may have as a text.

        Raises:
            FieldError: it is something else.
        """
        value = self.take(key)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        return default if value is None else validate.boolean(key, value)

    def names(self, key: str) -> tuple[str, ...] | None:
        """Names, as a list or with commas between them.

        Raises:
            FieldError: it is something else.
        """
        value = self.take(key)
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if value is None:
            return None
        if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
            raise FieldError(key, value, "names, as a list or with commas between them")
        return tuple(value)

    def optimizer(self, key: str, default: str, others: Mapping[str, str]) -> str:
        """An optimizer by its name in transformers; `others` are further names of those that are planned.

        Raises:
            FieldError: it is another one.
        """
        name = self.text(key, default) or default
        found = others.get(name, name)
        if found not in OPTIMIZERS:
            raise FieldError(key, name, "an optimizer that is planned: " + ", ".join(OPTIMIZERS))
        return found

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Refuse the first of the keys that is set to anything but false, zero or nothing.

        Raises:
            InputError: the key, and why its memory is not known.
        """
        for key, reason in reasons.items():
            value = self.take(key)
            if value not in (None, False, 0, "", [], {}):
                raise InputError(f"{key}: {value!r:.60} is not planned: {reason}")

    def note(self, key: str, why: str) -> bool:
        """Note what of a key that is set is counted otherwise; whether it is set."""
        value = self.take(key)
        if value in (None, False, 0, "", [], {}):
            return False
        self.notes.append(f"{key}: {why}")
        return True

    def used(self) -> tuple[str, ...]:
        """Keys of the file that were taken, in its order."""
        return tuple(str(key) for key in self._values if key in self._taken)

    def unused(self) -> tuple[str, ...]:
        """All others."""
        return tuple(str(key) for key in self._values if key not in self._taken)

    def config(self, trainer: str, stack: Stack, setup: TrainingSetup, *, epochs: str) -> TrainerConfig:
        """The file as read; `epochs` is the trainer's own key for them. Keys that nobody takes before are
        unused.

        Raises:
            InputError: epochs or learning rate are no numbers.
        """
        num_train_epochs, learning_rate = self.number(epochs), self.number("learning_rate")
        return TrainerConfig(
            trainer=trainer,
            stack=stack,
            setup=setup,
            num_train_epochs=num_train_epochs,
            learning_rate=learning_rate,
            used=self.used(),
            unused=self.unused(),
            notes=tuple(self.notes),
        )


def required(key: str, value: str | None, trainer: str) -> str:
    """A value without which there is nothing to plan.

    Raises:
        InputError: it is not there.
    """
    if value is None:
        raise InputError(f"{key} is required in a config of {trainer}")
    return value


def alpha_of(alpha: int | None, rank: int) -> int | None:
    """lora_alpha as a setup has it: null where it is twice the rank."""
    return None if alpha == 2 * rank else alpha


def by_ddp(gpus: int) -> dict[str, Any]:
    """How several GPUs share the work where nothing is said: each has the whole model."""
    return {} if gpus == 1 else {"num_processes": gpus, "distributed": "ddp"}


def positive(key: str, value: int | None) -> int:
    """A number of at least one.

    Raises:
        FieldError: it is not.
    """
    return validate.integer(key, value, minimum=1, maximum=2**24)


def schedule(setup: TrainingSetup, epochs: float, learning_rate: float) -> dict[str, Any]:
    """Batches, schedule and optimizer by the names of TrainingArguments, which trainers take over."""
    return {
        "per_device_train_batch_size": setup.per_device_train_batch_size,
        "gradient_accumulation_steps": setup.gradient_accumulation_steps,
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "optim": setup.optim,
    }


def kept_knobs(setup: TrainingSetup, trainer: str, lacking: Collection[str]) -> None:
    """Refuse a setup with knobs that a trainer does not have.

    Raises:
        InputError: the first such knob with another value than the plain one.
    """
    plain: Mapping[str, Any] = {
        "experts": "16bit",
        "compile": "none",
        "activation_memory_budget": None,
        "checkpointed_layers": None,
        "selective_checkpointing": False,
        "activation_offloading": False,
        "prepare_for_kbit_training": False,
        "kernels": "none",
        "attn_implementation": None,
        "packing": False,
    }
    for name in lacking:
        if getattr(setup, name) != plain[name]:
            raise InputError(f"{trainer} has no {name}={getattr(setup, name)}")
