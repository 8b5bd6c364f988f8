"""Stack: what a trainer does with memory and dtypes beside what torch and the model do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from planner.base import validate
from planner.base.errors import FieldError
from planner.base.units import DTYPE_WIDTH
from planner.base.values import dataclass
from planner.setup.cuda_allocator import ALLOCATORS, EXPANDABLE, NATIVE
from planner.setup.parallelism import BY_ACCELERATE, LAUNCHED, Sharding


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredSpeed:
    """How many times as fast as what is forecast for TRL's kernels a stack was, where the GPU decides:
    `expected`, and at the least and at the most, wherever that was not measured. `words` say of what it is.
    """

    least: float
    expected: float
    most: float
    words: str

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.expected <= self.most:
            raise FieldError("expected", self.expected, "between least and most, all above 0")
        validate.text("words", self.words)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """A training stack, named after its trainer, as far as memory and speed depend on it.

    `packages` are those whose releases change memory or speed: records and coefficients carry their versions.
    `adapter_dtype` is what it casts adapters on a quantised base to. Its output head, `head_words` for
    people, works on tiles of `head_tokens` tokens by `head_vocabulary` entries of the vocabulary, or makes
    all logits at once where both are null. It runs with torch's `allocator`, null for the one that suits the
    machine. Its activation offloading keeps `offload_stash` tensors on the GPU until their copies are done.
    `kept_attention` are the attention implementations whose outputs its selective checkpointing keeps,
    `sharding` says what FSDP2 shares out. `autocast` says that it runs the model in torch's autocast, so that
    products are in 16 bits whatever their weights are held in. `counted` says in words what of it is counted
    otherwise than it runs: notes of every estimate with it. `measured_speed` says how fast it was beside what
    is forecast for TRL's kernels, null for those very kernels.
    """

    name: str
    packages: tuple[str, ...]
    adapter_dtype: str
    head_words: str
    head_tokens: int | None
    head_vocabulary: int | None
    offload_stash: int
    kept_attention: tuple[str, ...]
    sharding: Sharding = LAUNCHED
    allocator: str | None = None
    autocast: bool = True
    counted: tuple[str, ...] = ()
    measured_speed: MeasuredSpeed | None = None

    def __post_init__(self) -> None:
        validate.text("stack", self.name)
        if not self.packages:
            raise FieldError("packages", self.packages, "at least one package")
        validate.choice("adapter_dtype", self.adapter_dtype, DTYPE_WIDTH)
        if (self.head_tokens is None) != (self.head_vocabulary is None):
            raise FieldError("head_vocabulary", self.head_vocabulary, "null, as head_tokens, or both a size")
        for field in ("head_tokens", "head_vocabulary", "offload_stash"):
            size = getattr(self, field)
            if size is not None or field == "offload_stash":
                validate.integer(field, size, minimum=1, maximum=2**24)
        if self.allocator is not None:
            validate.choice("allocator", self.allocator, ALLOCATORS)

    @property
    def adapter_width(self) -> int:
        """Bytes of an element of an adapter on a quantised base."""
        return DTYPE_WIDTH[self.adapter_dtype]


TRL = Stack(
    name="trl",
    packages=("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate"),
    # sft_trainer.py:908-911
    adapter_dtype="bfloat16",
    head_words="TRL's tiled log-probabilities",
    # trl/kernels/chunked_logprob.py, TOKEN_CHUNK_SIZE; trainer/utils.py, _CHUNKED_LOGPROB_CHUNK_SIZE
    head_tokens=4096,
    head_vocabulary=32_768,
    # trl/models/activation_offloading.py, max_fwd_stash_size
    offload_stash=5,
    # trl/models/selective_activation_checkpointing.py, policy_fn: torch's own kernels of sdpa, and
    # flash-attn's. Flex attention and eager's products are recomputed as everything else is.
    kept_attention=("sdpa", "flash_attention_2"),
)
"""SFTTrainer of TRL 1.16, the one stack that runs are launched with."""

_WHOLE_LOGITS: dict[str, Any] = {
    "head_words": "transformers' loss over all logits",
    "head_tokens": None,
    "head_vocabulary": None,
}

TRL_SFT = replace(TRL, name="trl sft", allocator=NATIVE, sharding=BY_ACCELERATE)
"""TRL's own command line, `trl sft` of TRL 1.16: the same trainer, with torch's default allocator."""

AXOLOTL = replace(
    TRL,
    name="axolotl",
    packages=(*TRL.packages, "axolotl"),
    # PEFT's autocast_adapter_dtype, which is left at its default (loaders/adapter.py:451).
    adapter_dtype="float32",
    # core/trainers/base.py, compute_loss: transformers' own.
    **_WHOLE_LOGITS,
    # utils/__init__.py, set_pytorch_cuda_alloc_conf
    allocator=EXPANDABLE,
    sharding=BY_ACCELERATE,
)
"""Axolotl 0.21.0 without its plugins. With an adapter it takes embeddings, head and norms back to 16 bits
after PEFT's preparation (loaders/model.py:174-196), so that nothing stays upcast."""

LLAMA_FACTORY = replace(
    TRL,
    name="llamafactory",
    packages=(*TRL.packages, "llamafactory"),
    # model/adapter.py:313-325: trainable parameters are cast to float32 unless pure_bf16.
    adapter_dtype="float32",
    # train/sft/trainer.py:162: transformers' own.
    **_WHOLE_LOGITS,
    # launcher.py:82 asks for the other one where torchrun starts several processes.
    allocator=NATIVE,
)
"""LLaMA-Factory 0.9.5 on one GPU. It prepares nothing for k-bit training; norms and head stay in 16 bits
unless upcast_layernorm or upcast_lmhead_output ask for it (model/model_utils/checkpointing.py:151, :180)."""

UNSLOTH = replace(
    TRL,
    name="unsloth",
    packages=(*TRL.packages, "unsloth", "unsloth_zoo"),
    # unsloth_zoo/training_utils.py:411-418, :442-452: lora_A and lora_B are cast to float32.
    adapter_dtype="float32",
    # unsloth_zoo/__init__.py:322-330
    allocator=EXPANDABLE,
    # benchmarks/results/rivals.json: batch 8 1.36 times, 16 1.37 times what is forecast for the same setup.
    # Nothing says that its kernels are slower anywhere than those that they replace, nor that they gain as
    # much on another card or model, without checkpoints, or where the host decides.
    measured_speed=MeasuredSpeed(
        least=1.0,
        expected=1.36,
        most=1.4,
        words="Unsloth ran 1.36 times as fast on an H100 (llama-3.1-8b, checkpointed, batch 8 and 16), which "
        "is not known of other cards, models and ways",
    ),
    counted=(
        "layers are counted as TRL runs them: Unsloth's own kernels keep less "
        "(two measured runs, checkpointed, took 10 and 16% less than is said)",
        "its loss works in chunks of half of the memory that is free, at most 4 GiB "
        "(unsloth_zoo/fused_losses/cross_entropy_loss.py:229-252), counted as TRL's tiles: "
        "the driver may show more, and it still fits",
    ),
)
"""Unsloth 2026.10.9, FastLanguageModel on one GPU: an upper bound. Its kernels are Triton's and run on a GPU
alone, so that its layers cannot be traced on a CPU; benchmarks/results/rivals.json has two runs of it."""

STACKS = (TRL, TRL_SFT, AXOLOTL, LLAMA_FACTORY, UNSLOTH)

PLAIN_LOOP = replace(TRL, name="plain loop", autocast=False)
"""A loop of transformers' and PEFT's own without a trainer, as those that others publish runs of: the head
that k-bit preparation turns into fp32 computes in fp32."""
