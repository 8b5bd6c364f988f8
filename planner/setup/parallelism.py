"""Parallelism: how many GPUs a run has, and how they share its work."""

from __future__ import annotations

from collections.abc import Sequence

from planner.base.values import dataclass

DDP, FSDP = "ddp", "fsdp"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How a stack sets FSDP2 up.

    `constants` says that quantisation constants are shared out with the weights; `ends` that a frozen
    embedding and output head are, the head gathered whole for the loss: else the head is whole on every GPU
    and the embedding in the host's memory (tied, both are one tensor on every GPU). `masters` says that
    weights that are trained in full are held in fp32, `each_micro_step` that gradients are summed over the
    GPUs in each of them: else they are whole on every GPU until the last. Methods in `reduced_in_fp32` add
    gradients up in fp32, the others in the dtype that is computed in.
    """

    constants: bool
    ends: bool
    masters: bool
    each_micro_step: bool
    reduced_in_fp32: tuple[str, ...]


LAUNCHED = Sharding(
    constants=True, ends=False, masters=False, each_micro_step=True, reduced_in_fp32=("lora",)
)
"""As runs are launched (docs/several-gpus.md, "What each GPU holds")."""
BY_ACCELERATE = Sharding(constants=False, ends=True, masters=True, each_micro_step=False, reduced_in_fp32=())
"""As accelerate 1.15 does without the launcher (utils/fsdp_utils.py, fsdp2_prepare_model; the head is
gathered by trl/trainer/utils.py): what runs were measured with before there was one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallelism:
    """`num_processes` GPUs, one process each; `strategy` is "ddp" or "fsdp", null for one GPU.

    With DDP every GPU holds all of the model, and gradients are averaged. With FSDP2 every tensor is cut
    along its first dimension, a share a GPU, and gathered where it is computed with.
    """

    num_processes: int
    strategy: str | None
    sharding: Sharding = LAUNCHED

    @property
    def is_single(self) -> bool:
        """Whether one GPU does it all."""
        return self.num_processes == 1

    @property
    def replicates(self) -> bool:
        """Whether every GPU holds everything, with buckets in which gradients are averaged (DDP)."""
        return self.strategy == DDP and not self.is_single

    @property
    def shards(self) -> bool:
        """Whether weights, gradients and optimizer states are shared out (FSDP2)."""
        return self.strategy == FSDP and not self.is_single

    def share(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a GPU's share of a tensor, the first GPU's, which has most.

        torch.distributed.fsdp pads the first dimension up to a multiple of the GPUs (_fsdp_param.py,
        _init_sharded_param).
        """
        if not self.shards:
            return tuple(shape)
        return (-(-shape[0] // self.num_processes), *shape[1:])

    def gathered(self, elements_of_share: int) -> int:
        """Elements of a tensor that was gathered, padding included."""
        return elements_of_share * self.num_processes if self.shards else elements_of_share
