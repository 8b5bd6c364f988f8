"""Which of torch's kernels `scaled_dot_product_attention` runs, by card, heads, mask, type and torch's
release.

Torch asks its kernels in an order and takes the first that can (torch aten/src/ATen/native/transformers/cuda/
sdp_utils.cpp: priority_order, can_use_cudnn_attention, can_use_flash_attention,
can_use_mem_efficient_attention); what none can, its products of whole score matrices do ("math").
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.base.values import dataclass
from planner.gpus.spec import NATIVE_BFLOAT16
from planner.setup.attention import gets_mask
from planner.setup.run import TrainingRun

Capability = tuple[int, int]
FLASH: Capability = (8, 0)
"""Where torch's flash and cuDNN kernels begin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchKernel:
    """A row: a kernel and what it can.

    `capabilities` are the least and the greatest it runs on, `preferred` the major ones where it is asked at
    all (null: wherever it runs). `head_dim` is the widest head that it trains, `masked` says whether it takes
    a mask, `shared_keys` whether it takes fewer key heads than query heads, `dtypes` what it computes in.
    `words` name it for people, `source` says where that stands.
    """

    name: str
    words: str
    capabilities: tuple[Capability, Capability]
    preferred: tuple[int, ...] | None
    head_dim: int
    masked: bool
    shared_keys: bool
    dtypes: tuple[str, ...]
    source: str

    def runs(self, capability: Capability, *, head_dim: int, masked: bool, shared: bool, dtype: str) -> bool:
        """Whether torch takes it, where none before it was."""
        least, most = self.capabilities
        return (
            least <= capability <= most
            and (self.preferred is None or capability[0] in self.preferred)
            and head_dim <= self.head_dim
            and (self.masked or not masked)
            and (self.shared_keys or not shared)
            and dtype in self.dtypes
            and (dtype != "bfloat16" or capability >= NATIVE_BFLOAT16 or self is TORCH_KERNELS[-1])
        )


_HALVES = ("bfloat16", "float16")
TORCH_KERNELS: tuple[TorchKernel, ...] = (
    TorchKernel(
        name="cudnn",
        words="cuDNN kernels",
        capabilities=(FLASH, (12, 1)),
        # From torch 2.11 with cuDNN 9.15.1 on (the build for CUDA 13): what an H200 ran.
        preferred=(9, 10),
        # 256 from cuDNN 9.22 on, which no tested release has.
        head_dim=128,
        masked=True,
        shared_keys=True,
        dtypes=_HALVES,
        source="sdp_utils.cpp: check_prefer_cudnn_attention, check_cudnn_tensor_shapes",
    ),
    TorchKernel(
        name="flash",
        words="flash kernels",
        capabilities=(FLASH, (12, 1)),
        preferred=None,
        # Heads of 193 to 224 cannot be trained on 8.6, 8.9 and 12.x; no model of the catalog has any.
        head_dim=256,
        masked=False,
        shared_keys=True,
        dtypes=_HALVES,
        source="sdp_utils.cpp: check_flash_attention_hardware_support, check_for_attn_mask, "
        "check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120",
    ),
    TorchKernel(
        name="memory_efficient",
        words="memory-efficient kernels",
        capabilities=((5, 0), (12, 1)),
        preferred=None,
        head_dim=65_536,
        masked=True,
        # Not before pytorch/pytorch#191085, which no tested release has.
        shared_keys=False,
        dtypes=(*_HALVES, "float32"),
        source="sdp_utils.cpp: check_mem_efficient_hardware_support, less_than_sm80_mem_efficient_dtypes",
    ),
    TorchKernel(
        name="math",
        words="products of whole score matrices",
        capabilities=((0, 0), (99, 0)),
        preferred=None,
        head_dim=65_536,
        masked=True,
        shared_keys=True,
        dtypes=(*_HALVES, "float32"),
        source="sdp_utils.cpp: select_sdp_backend",
    ),
)
"""In the order that torch asks them in."""


def torch_kernel(
    capability: Capability, *, head_dim: int, masked: bool, shared: bool, dtype: str
) -> TorchKernel:
    """The kernel that torch takes; `shared` says that fewer key heads than query heads are handed to it.

    transformers hands over shared keys as they are where there is no mask, and repeats them where there is
    one (transformers/integrations/sdpa_attention.py, use_gqa_in_sdpa).
    """
    return next(
        kernel
        for kernel in TORCH_KERNELS
        if kernel.runs(capability, head_dim=head_dim, masked=masked, shared=shared, dtype=dtype)
    )


def repeats_keys(capability: Capability, dtype: str) -> bool:
    """Whether the launcher has keys repeated to all heads before sdpa: on cards where only a kernel that
    cannot share them computes in that type, which torch would leave to whole score matrices.
    """
    return dtype == "float16" and capability < FLASH


def kernels_of(run: TrainingRun, capability: Capability) -> tuple[TorchKernel, ...]:
    """Those of a run's layers, each once, in the layers' order; none where attention is not sdpa's."""
    if run.attention != "sdpa":
        return ()
    return tuple(dict.fromkeys(_by_layer(run, capability)))


def _by_layer(run: TrainingRun, capability: Capability) -> Iterable[TorchKernel]:
    repeated = repeats_keys(capability, run.setup.dtype)
    for layer in run.model.layers:
        masked = gets_mask(run.setup, layer.sliding_window, padded=run.padded)
        yield torch_kernel(
            capability,
            head_dim=layer.head_dim,
            masked=masked,
            shared=not repeated and not masked and layer.num_attention_heads != layer.num_key_value_heads,
            dtype=run.setup.dtype,
        )
