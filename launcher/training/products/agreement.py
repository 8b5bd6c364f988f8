"""Right before fast: one layer as it will run, compiled or with 8-bit products, beside the layer as it is.

Before the first step one decoder layer is given what the run's own first micro-batch gives it. Its output and
its gradients, of the input and of what is trained in it, are computed both ways. Where they differ by more
than rounding does, all layers run plain from there on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from launcher.training.products.base_linear import plain_products, use_plain
from launcher.training.rehearsal import nothing_kept, targets
from planner.models.storage import EIGHT_BIT_MULTIPLE
from planner.setup.training_setup import TrainingSetup

if TYPE_CHECKING:
    from launcher.training.callbacks import LaunchedTrainer

Sides = Mapping[str, float]
LIMITS: dict[str, Sides] = {
    "bf16": {"output": 0.04, "input gradient": 0.04, "adapter gradient": 0.06},
    "fp8_backward": {"output": 0.04, "input gradient": 0.25, "adapter gradient": 0.3},
    "fp8": {"output": 0.2, "input gradient": 0.3, "adapter gradient": 0.4},
}
"""Norm of the difference over the norm, above which layers disagree. Rounding alone: bfloat16 0.3 to 1.5%, a
product of two e4m3 matrices 3.7% (tests/stack/test_eight_bit.py), of which a layer has seven in a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far a layer as it runs lies from the plain one, by side: norm of the difference over the norm."""

    differences: Sides
    limits: Sides

    @property
    def found(self) -> bool:
        """Whether every side is within its limit; a difference that is no number is not."""
        return all(self.differences[side] <= limit for side, limit in self.limits.items())

    def in_words(self) -> str:
        """The sides beyond their limits, or all of them."""
        beyond = [side for side, limit in self.limits.items() if not self.differences[side] <= limit]
        shown = beyond or list(self.limits)
        return ", ".join(f"{side} by {self.differences[side]:.1%}" for side in shown)


class LayerCheck(TrainerCallback):  # type: ignore[misc]
    """Compares a layer before the first step, and has all run plain where they disagree.

    `say` is given a sentence where they agree, `warn` where they do not. Must come after the callbacks that
    change how layers are run. Not for layers that FSDP2 shards, whose hooks gather for whole passes.
    """

    def __init__(
        self,
        trainer: LaunchedTrainer,
        base_matmul: str,
        *,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._trainer, self._base_matmul, self._say, self._warn = trainer, base_matmul, say, warn

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare one layer, on what the first rows of the data give it."""
        trainer, begun = self._trainer, time.monotonic()
        layers = _layers(trainer.model)
        found = self._compare(args, layers[len(layers) // 2])
        if trainer.ranks.any(found is None):
            self._say(
                "no layer is compared with the plain one: both ways at once take more memory than there is"
            )
            return
        assert found is not None
        if trainer.ranks.any(not found.found):
            for one in layers:
                run_plain(one)
            why = "" if found.found else f" ({found.in_words()})"
            self._warn(
                f"a layer as it would run differs from the plain one{why}: all layers run plain, slower"
            )
            return
        took = time.monotonic() - begun
        self._say(f"a layer agrees with the plain one ({found.in_words()}; {took:.0f} s)")

    def _compare(self, args: TrainingArguments, layer: nn.Module) -> Agreement | None:
        """A layer in the middle compared; None where memory is too short for it.

        Those at the ends are unlike the others: what enters the first may ask for no gradient, and all of
        them may keep 16-bit products.
        """
        trainer = self._trainer
        # Packed rows are one, padded to the length of all.
        count = 1 if args.packing else args.per_device_train_batch_size
        rows = [trainer.train_dataset[index % len(trainer.train_dataset)] for index in range(count)]
        trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        batch, limits = trainer.data_collator(rows), LIMITS[self._base_matmul]
        try:
            with nothing_kept(trainer), _compared(layer, limits):
                SFTTrainer.training_step(trainer, trainer.model_wrapped, batch, targets(rows))
        except _ComparedError as compared:
            return compared.found
        except torch.OutOfMemoryError:
            return None
        raise AssertionError("the layer was not called")


def check_layers(trainer: LaunchedTrainer, setup: TrainingSetup, say: Callable[[str], None]) -> None:
    """Have a run's layers compared where they are changed, and warn of those that keep 16-bit products."""
    if trainer.left_in_16bit:
        trainer.tell(
            f"{len(trainer.left_in_16bit)} linear layers keep 16-bit products, for 8-bit ones take sizes in "
            f"multiples of {EIGHT_BIT_MULTIPLE}: {', '.join(trainer.left_in_16bit[:3])}"
        )
    if setup.compile != "none" and not trainer.shards:
        trainer.add_callback(LayerCheck(trainer, setup.base_matmul, say=say, warn=trainer.tell))


class _ComparedError(Exception):
    """Ends the forward pass once the layer was compared."""

    def __init__(self, found: Agreement) -> None:
        super().__init__()
        self.found = found


@contextmanager
def _compared(layer: nn.Module, limits: Sides) -> Iterator[None]:
    """Have the layer compared as soon as it is called, which ends the pass by _ComparedError.

    What calls a compiled module is replaced: a hook would be compiled with it.
    """
    compiled = layer._compiled_call_impl

    def compare(*given: Any, **named: Any) -> None:
        layer._compiled_call_impl = compiled
        raise _ComparedError(agreement(layer, given, named, limits))

    layer._compiled_call_impl = compare
    try:
        yield
    finally:
        layer._compiled_call_impl = compiled


def _layers(model: nn.Module) -> list[nn.Module]:
    from launcher.training.callbacks import decoder_layers

    return decoder_layers(model)


def run_plain(layer: nn.Module) -> None:
    """Have a layer run uncompiled with plain products from here on."""
    layer._compiled_call_impl = None
    use_plain(layer)


def agreement(layer: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any], limits: Sides) -> Agreement:
    """Compare a layer as it runs with the plain one on what it is given; gradients are left as they were.

    Dropout is left out: the two would draw other masks.
    """
    dropouts = [one for one in layer.modules() if isinstance(one, nn.Dropout) and one.training]
    for one in dropouts:
        one.eval()
    try:
        fast = _both_passes(layer, given, named)
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(plain_products(layer))
            plain = _both_passes(layer, given, named)
    finally:
        for one in dropouts:
            one.train()
    return Agreement(
        differences={side: _difference(fast[side], plain[side]) for side in limits}, limits=limits
    )


def _both_passes(
    layer: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]
) -> dict[str, list[torch.Tensor]]:
    """What a layer adds to its input, that input's gradient, and those of what is trained in it.

    The residual stream passes a layer unchanged and would hide what differs: it is taken off.
    """
    hidden = given[0].detach().requires_grad_(given[0].requires_grad)
    trained = [one for one in layer.parameters() if one.requires_grad]
    with torch.enable_grad():
        output = layer(hidden, *given[1:], **named)
        output = output[0] if isinstance(output, tuple) else output
        generator = torch.Generator(device=output.device).manual_seed(0)
        upstream = torch.empty_like(output).normal_(generator=generator)
        wanted = [*([hidden] if hidden.requires_grad else []), *trained]
        gradients = list(torch.autograd.grad(output, wanted, upstream, allow_unused=True))
    found = {"output": [output.detach().float() - hidden.detach().float()]}
    found["input gradient"] = [gradients.pop(0).float() - upstream.float()] if hidden.requires_grad else []
    found["adapter gradient"] = [one.float() for one in gradients if one is not None]
    return found


def _difference(fast: list[torch.Tensor], plain: list[torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors together; 0 where there is nothing to compare."""
    if len(fast) != len(plain):
        return math.inf
    apart = sum(float((one - other).square().sum()) for one, other in zip(fast, plain, strict=True))
    size = sum(float(one.square().sum()) for one in plain)
    if size == 0.0:
        return 0.0 if apart == 0.0 else math.inf
    return math.sqrt(apart / size)
