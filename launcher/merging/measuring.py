"""The adapter as it was trained and what a merge made of it, on the same examples: loss and logits compared.

Weights are loaded afresh for each: on processors with AVX512-BF16 the first forward pass in evaluation mode
writes bitsandbytes' 4-bit weights anew, in place (bitsandbytes/nn/modules.py, Linear4bit.forward).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.merging.adapters import adapter_name
from launcher.merging.task import MEASURED_LENGTH, MergeTask
from launcher.merging.writing import written_bytes
from launcher.training.loading.base_folder import BaseFolder
from planner.base.errors import InputError

if TYPE_CHECKING:
    import torch

    from launcher.training.dataset import Tokens

MEASURED_EXAMPLES = 32
MEASURED_TOKENS = 1024
"""Learned tokens that are compared at most: of each, 4 bytes for every word of the vocabulary are held."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A model beside the adapter as it was trained, over the learned tokens of the examples.

    `loss` is the mean over tokens, in nats; `kl` the mean divergence of its next-token distribution from the
    adapter's, in nats; `same_top` the share of tokens whose likeliest word is the same; `mean_logit` and
    `max_logit` the absolute difference of logits; `token_losses` each token's own loss.
    """

    loss: float
    kl: float
    same_top: float
    mean_logit: float
    max_logit: float
    token_losses: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """How the adapter as it was trained answers: its loss, its logits by example, and its base without it."""

    loss: float
    logits: tuple[torch.Tensor, ...]
    untrained: Comparison


@dataclass(slots=True)
class Measuring:
    """The examples, and where models are run on them.

    `free_bytes` is what weights may take of the device; what a merged model has beyond stays on disk.
    """

    task: MergeTask
    base: BaseFolder
    rows: Sequence[Tokens]
    device: torch.device
    free_bytes: int

    def reference(self) -> Reference:
        """Answers of the adapter on the base as it was loaded for training, and of that base alone."""
        import torch

        with _loaded_again(), torch.inference_mode():
            model = self._trained_model()
            dtype = _dtype(self.task.setup.dtype)
            # accelerate runs a trainer's forward pass under autocast (SFTConfig bf16, fp16).
            mixed = torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)
            with mixed:
                logits = tuple(self._logits(model, row) for row in self.rows)
                with model.disable_adapter():
                    untrained = self._compared(model, logits)
        losses = [
            loss for row, one in zip(self.rows, logits, strict=True) for loss in _losses(one, row).tolist()
        ]
        return Reference(loss=sum(losses) / len(losses), logits=logits, untrained=untrained)

    def compare(self, folder: Path, reference: Reference, *, spill: Path) -> Comparison:
        """A merged model, loaded as a server would load it.

        `spill` takes what finds no room and is in no file as the model uses it.
        """
        import torch
        from transformers import AutoModelForCausalLM

        with _loaded_again(), torch.inference_mode():
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=self._dtype_here(self.task.dtype),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                **self._placed(written_bytes(self.base), spill),
            ).eval()
            return self._compared(model, reference.logits)

    def _compared(self, model: Any, reference: Sequence[torch.Tensor]) -> Comparison:
        sums = _Sums()
        for row, other in zip(self.rows, reference, strict=True):
            sums.add(other, self._logits(model, row), row)
        return sums.comparison()

    def _logits(self, model: Any, row: Tokens) -> torch.Tensor:
        """The logits that predict the learned tokens of an example, in float32 on the CPU."""
        import torch

        ids = torch.tensor([row.input_ids], device=self.device)
        at = torch.tensor(learned_places(row), device=self.device) - 1
        logits: torch.Tensor = model(input_ids=ids, logits_to_keep=at, use_cache=False).logits[0]
        return logits.float().cpu()

    def _trained_model(self) -> Any:
        from peft import PeftModel

        from launcher.training import build
        from launcher.training.loading.quantised_experts import as_parameters

        setup = self.task.setup.replace(
            dtype=str(self._dtype_here(self.task.setup.dtype)).removeprefix("torch."),
            attn_implementation=None,
            kernels="none",
            compile="none",
            activation_memory_budget=None,
        )
        model: Any = build.load_model(setup, str(self.base.path), device=self.device, allow_download=False)
        names = []
        for index, folder in enumerate(self.task.adapters):
            names.append(adapter_name(index))
            options = {"adapter_name": names[-1], "torch_device": str(self.device)}
            if index == 0:
                with as_parameters(model):
                    model = PeftModel.from_pretrained(model, str(folder.path), **options)
            else:
                model.load_adapter(str(folder.path), **options)
        model.base_model.set_adapter(names)
        for module in model.modules():
            if hasattr(module, "set_scale"):
                for name, weight in zip(names, self.task.weights, strict=True):
                    module.set_scale(name, weight)
        model.eval()
        for module in model.modules():
            if type(module).__name__ == "Linear4bit" and hasattr(module, "quant_state"):
                module.train()  # nothing but the way that bitsandbytes computes depends on it
        return model

    def _placed(self, weights: int, spill: Path) -> dict[str, Any]:
        """Where the weights are put: all on the device, or what fits there, and the rest read as needed."""
        if weights <= self.free_bytes:
            return {"device_map": {"": self.device}}
        place = "cpu" if self.device.type == "cpu" else 0
        return {"device_map": "auto", "max_memory": {place: self.free_bytes}, "offload_folder": str(spill)}

    def _dtype_here(self, name: str) -> torch.dtype:
        """The dtype to compute in: float16 as float32 on the CPU, which has no products in it."""
        return _dtype("float32" if name == "float16" and self.device.type == "cpu" else name)


def measured_rows(task: MergeTask, base: BaseFolder, *, allow_download: bool) -> list[Tokens]:
    """Examples from all over the task's data, as they were trained, until there are enough learned tokens.

    Raises:
        InputError: the data cannot be read, or there is no tokenizer.
    """
    from launcher.training import build, dataset

    assert task.data is not None
    own = task.adapters[0].path
    place = own if (own / "tokenizer_config.json").is_file() else base.path
    tokenizer = build.load_tokenizer(str(place), allow_download=allow_download)
    data = dataset.read_dataset(task.data)
    if data.has_images:
        raise InputError(
            f"{task.data}: answers to images are not measured: --data names examples of text, or give "
            "--no-measure with --base original"
        )
    length = min(task.setup.max_length, MEASURED_LENGTH)
    usable = []
    for row in dataset.tokenised(data, tokenizer, assistant_only_loss=task.assistant_only_loss):
        cut = dataset.Tokens(row.input_ids[:length], row.labels[:length])
        if learned_places(cut):
            usable.append(cut)
    if not usable:
        raise InputError(f"{task.data}: no example has a token to learn within {length:,} tokens")
    step = max(1, len(usable) // MEASURED_EXAMPLES)
    chosen: list[Tokens] = []
    tokens = 0
    for row in usable[::step][:MEASURED_EXAMPLES]:
        if chosen and tokens + len(learned_places(row)) > MEASURED_TOKENS:
            break
        chosen.append(row)
        tokens += len(learned_places(row))
    return chosen


def better(one: Comparison, other: Comparison) -> bool:
    """Whether `one` is the better merge: of the lower loss, or nearer to the adapter where that is chance.

    A difference of losses is chance within two standard errors of its mean over the tokens.
    """
    mean, error = loss_difference(one, other)
    if abs(mean) > 2 * error:
        return mean < 0
    return one.kl <= other.kl


def loss_difference(one: Comparison, other: Comparison) -> tuple[float, float]:
    """How much higher the loss of `one` is, token by token, and the standard error of that mean."""
    values = [a - b for a, b in zip(one.token_losses, other.token_losses, strict=True)]
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, float("inf")
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, (variance / count) ** 0.5


@dataclass(slots=True)
class _Sums:
    """Sums over tokens, example by example."""

    losses: list[float] = field(default_factory=list)
    kl: float = 0.0
    same_top: int = 0
    difference: float = 0.0
    largest: float = 0.0
    words: int = 1

    def add(self, reference: torch.Tensor, logits: torch.Tensor, row: Tokens) -> None:
        self.losses += _losses(logits, row).tolist()
        expected, found = reference.log_softmax(-1), logits.log_softmax(-1)
        self.kl += float((expected.exp() * (expected - found)).sum())
        self.same_top += int((reference.argmax(-1) == logits.argmax(-1)).sum())
        apart = (reference - logits).abs()
        self.difference += float(apart.sum())
        self.largest = max(self.largest, float(apart.max()))
        self.words = logits.shape[-1]

    def comparison(self) -> Comparison:
        count = len(self.losses)
        return Comparison(
            loss=sum(self.losses) / count,
            kl=self.kl / count,
            same_top=self.same_top / count,
            mean_logit=self.difference / count / self.words,
            max_logit=self.largest,
            token_losses=tuple(self.losses),
        )


def learned_places(row: Tokens) -> list[int]:
    """Places of the tokens whose loss is taken; the first of a row is predicted by nothing."""
    from launcher.training.dataset import NOT_LEARNED

    return [place for place, label in enumerate(row.labels) if place and label != NOT_LEARNED]


def _losses(logits: torch.Tensor, row: Tokens) -> torch.Tensor:
    import torch

    wanted = torch.tensor([row.labels[place] for place in learned_places(row)])
    return torch.nn.functional.cross_entropy(logits, wanted, reduction="none")


def _dtype(name: str) -> torch.dtype:
    import torch

    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


@contextmanager
def _loaded_again() -> Iterator[None]:
    """What is loaded within is gone afterwards."""
    import torch

    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
