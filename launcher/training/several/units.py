"""FSDP2's units: what of a model is sharded together, what every rank holds whole, and in which dtypes.

torch's own `fully_shard`, called where the weights are loaded, layer by layer; accelerate takes a model that
is sharded already as it is (accelerate/utils/fsdp_utils.py, fsdp2_prepare_model). What differs from the units
that accelerate would make is told in docs/several-gpus.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from launcher.training.several.constants import share_constants
from planner.setup.training_setup import TrainingSetup


@dataclass(frozen=True, slots=True)
class Units:
    """Makes units of modules: shards them over the mesh and frees what was whole."""

    mesh: DeviceMesh
    policy: MixedPrecisionPolicy

    @classmethod
    def of(cls, setup: TrainingSetup, mesh: DeviceMesh, compute: torch.dtype) -> Units:
        """The units of a setup.

        The parameters are computed with in `compute`, gradients are summed over the ranks in the dtype that
        one GPU would have them in, and no output is cast: a loss in float32 stays so.
        """
        if compute == torch.float32:
            return cls(mesh, MixedPrecisionPolicy())
        reduce = torch.float32 if setup.method == "lora" else compute
        return cls(mesh, MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, output_dtype=None))

    def layer(self, layer: torch.nn.Module) -> None:
        """Make a decoder layer a unit, its quantisation constants with it, gathered whenever it runs."""
        share_constants(layer)
        fully_shard(
            layer,
            mesh=self.mesh,
            reshard_after_forward=True,
            mp_policy=self.policy,
            ignored_params=self._whole(layer),
        )

    def trained_ends(
        self, embedding: torch.nn.Module, norm: torch.nn.Module | None, head: torch.nn.Module
    ) -> None:
        """Make units of a trained embedding and of the norm and head behind the layers.

        Norm and head stay gathered from the forward to the backward pass, as in accelerate's own units: the
        norm's forward gathers the head too, which TRL reads without calling it (trl/trainer/utils.py).
        """
        tied = getattr(embedding, "weight", None) is getattr(head, "weight", None)
        last = [one for one in (norm, embedding if tied else None, head) if one is not None]
        if not tied:
            fully_shard(embedding, mesh=self.mesh, reshard_after_forward=True, mp_policy=self.policy)
        fully_shard(last, mesh=self.mesh, reshard_after_forward=False, mp_policy=self.policy)

    def root(self, model: torch.nn.Module, whole: set[torch.nn.Parameter]) -> None:
        """Make the rest a unit; parameters in `whole` are held by every rank."""
        fully_shard(model, mesh=self.mesh, mp_policy=self.policy, ignored_params=whole | self._whole(model))

    def _whole(self, module: torch.nn.Module) -> set[torch.nn.Parameter]:
        """Frozen parameters that gathering would round: those of another dtype than is computed with."""
        dtype = self.policy.param_dtype
        if dtype is None:
            return {p for p in module.parameters() if not p.is_floating_point()}
        return {p for p in module.parameters() if not p.requires_grad and p.dtype != dtype}
