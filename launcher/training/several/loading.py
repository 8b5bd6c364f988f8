"""The weights of a run, loaded as its ranks hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from launcher.runs.training_job import TrainingJob
from launcher.training import build
from launcher.training.loading.base_folder import find_base
from launcher.training.loading.skeleton import Group, Skeleton, model_config
from launcher.training.several.sharded_model import Slot
from launcher.training.several.sharding import sharded_model
from planner.base.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_for_ranks(job: TrainingJob, device: torch.device) -> PreTrainedModel | torch.nn.Module:
    """The model of a job: whole on each GPU, or sharded with its adapters while it is read.

    Raises:
        InputError: it is not there, or its weights are not safetensors.
    """
    setup = job.setup
    if setup.distributed != "fsdp":
        return build.load_model(setup, job.model_source, device=device, allow_download=job.allow_download)
    base = find_base(job.model_source, allow_download=job.allow_download)
    filling = CheckpointFilling(
        Skeleton(base, build.torch_dtype(setup), build.quantization_config(setup), device)
    )
    try:
        return sharded_model(setup, model_config(base), filling, device=device, seed=job.seed)
    finally:
        filling.skeleton.close()


class CheckpointFilling:
    """Fills a hollow model from a base's safetensors, a few tensors at a time, by transformers' own loader.

    The files are mapped, so that all processes share the pages; a tensor that stays on the host in the dtype
    of its file is such a page.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self._groups = {name: group for group in skeleton.groups for name in group.parameters}

    def __call__(self, slots: Sequence[Slot], device: torch.device) -> dict[str, torch.nn.Parameter]:
        """Load the parameters of these places.

        Raises:
            InputError: the base has no such weight.
        """
        found: dict[str, torch.nn.Parameter] = {}
        for slot in slots:
            if slot.name in found:
                continue
            group = self._group(slot.name)
            for name, value in self.skeleton.load_onto(group, device).items():
                found[name] = value
        return found

    def _group(self, name: str) -> Group:
        group = self._groups.get(name)
        if group is None:
            raise InputError(f"{self.skeleton.base.name}: it has no weight {name}")
        return group
