"""Stack: what a trainer does with memory and dtypes beside what torch and the model do."""

from __future__ import annotations

import dataclasses

from planner.base import validate
from planner.base.errors import FieldError
from planner.base.units import DTYPE_WIDTH
from planner.base.values import dataclass
from planner.setup.parallelism import LAUNCHED, Sharding


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """A training stack, named after its trainer, as far as memory and speed depend on it.

    `packages` are those whose releases change memory or speed: records and coefficients carry their versions.
    `adapter_dtype` is what it casts adapters on a quantised base to. Its output head, `head_words` for
    people, works on tiles of `head_tokens` tokens by `head_vocabulary` entries of the vocabulary. Its
    activation offloading keeps `offload_stash` tensors on the GPU until their copies are done.
    `kept_attention` are the attention implementations whose outputs its selective checkpointing keeps,
    `sharding` says what FSDP2 shares out. `autocast` says that it runs the model in torch's autocast, so that
    products are in 16 bits whatever their weights are held in.
    """

    name: str
    packages: tuple[str, ...]
    adapter_dtype: str
    head_words: str
    head_tokens: int
    head_vocabulary: int
    offload_stash: int
    kept_attention: tuple[str, ...]
    sharding: Sharding = LAUNCHED
    autocast: bool = True

    def __post_init__(self) -> None:
        validate.text("stack", self.name)
        if not self.packages:
            raise FieldError("packages", self.packages, "at least one package")
        validate.choice("adapter_dtype", self.adapter_dtype, DTYPE_WIDTH)
        for field in ("head_tokens", "head_vocabulary", "offload_stash"):
            validate.integer(field, getattr(self, field), minimum=1, maximum=2**24)

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
PLAIN_LOOP = dataclasses.replace(TRL, name="plain loop", autocast=False)
"""A loop of transformers' and PEFT's own without a trainer, as those that others publish runs of: the head
that k-bit preparation turns into fp32 computes in fp32."""
