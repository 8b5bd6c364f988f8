"""What a merge needs of the host's memory and disk, said and compared with what is there before it starts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from launcher.merging.task import MergeTask
from launcher.merging.writing import written_bytes
from launcher.training.loading.base_folder import BaseFolder
from launcher.training.loading.skeleton import Skeleton
from planner.base.errors import InputError
from planner.base.units import FP32
from planner.models.storage import ABSMAX_WIDTH, NESTED_BLOCK, QUANTIZATION_BLOCK
from planner.text.figures import gib

PROCESS_BYTES = 900 * 2**20
"""Python with torch, transformers and PEFT imported."""
MERGED_ELEMENT_BYTES = 20
"""Bytes of an element while its tensor is merged: as stored, as loaded, in float32 with the change beside it
and their sum, rounded, and cut as the checkpoint has it."""
OTHER_ELEMENT_BYTES = 10
"""Of one that no adapter changes: as stored, as loaded, and cut; or quantised and back."""
DORA_ELEMENT_BYTES = 12
"""More of them with DoRA, whose norm and magnitude are taken of the whole weight."""
COMPUTED = 1.15
"""Of a model's bytes while it answers: activations of one example, and what the allocator leaves unused."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Bytes: of host memory while shards are written, of the models that are measured, and of disk.

    `answers_bytes` are the logits that are compared, `trained_bytes` the base as it was trained with its
    adapter, `merged_bytes` the merged model, of which what finds no room is read from disk as it is used.
    """

    writing_bytes: int
    answers_bytes: int
    trained_bytes: int
    merged_bytes: int
    disk_bytes: int

    @property
    def host_bytes(self) -> int:
        """Host memory without which nothing starts, where models are measured on the CPU."""
        return max(self.writing_bytes, PROCESS_BYTES + self.answers_bytes + self.trained_bytes)

    @property
    def roomy_bytes(self) -> int:
        """Host memory with which no weight has to be read twice."""
        return max(self.host_bytes, PROCESS_BYTES + self.answers_bytes + self.merged_bytes)


def needs_of(
    task: MergeTask,
    base: BaseFolder,
    skeleton: Skeleton,
    *,
    adapted: frozenset[str],
    shard_bytes: int,
    tokens: int,
) -> Needs:
    """What a task needs: `adapted` parameters are merged, `tokens` compared, none for no measuring."""
    weights = written_bytes(base)
    adapters = sum(one.elements for one in task.adapters) * FP32
    dora = any(one.config.use_dora for one in task.adapters)
    merged = MERGED_ELEMENT_BYTES + (DORA_ELEMENT_BYTES if dora else 0)
    merging = max(
        sum(base.tensors[name].elements for name in group.sources)
        * (merged if adapted.intersection(group.parameters) else OTHER_ELEMENT_BYTES)
        for group in skeleton.groups
    )
    shard = min(shard_bytes, weights)
    words = int(skeleton.model.config.get_text_config().vocab_size)
    # The adapter's answers are kept while another model's are made, a distribution for each token.
    compared = 3 * tokens * words * FP32
    trained = (
        _quantized_bytes(skeleton)
        if task.quantized
        else weights * (2 if task.setup.dtype == "float32" else 1)
    )
    return Needs(
        writing_bytes=PROCESS_BYTES + 2 * adapters + shard + merging,
        answers_bytes=compared,
        trained_bytes=int(trained * COMPUTED) + adapters if tokens else 0,
        merged_bytes=int(weights * COMPUTED) if tokens else 0,
        disk_bytes=weights * len(task.kinds),
    )


def _quantized_bytes(skeleton: Skeleton) -> int:
    """Bytes of the base as bitsandbytes holds it, with the constants of its blocks; the rest in 16 bits."""
    if skeleton.base.checkpoint is not None:
        return sum(one.held_bytes or 2 * one.elements for one in skeleton.base.tensors.values())
    config = skeleton.quantization
    assert config is not None
    constant = ABSMAX_WIDTH
    element = 0.5 + constant / QUANTIZATION_BLOCK
    if config.load_in_8bit:
        element = 1.0
    elif config.bnb_4bit_use_double_quant:
        element = 0.5 + (1 + constant / NESTED_BLOCK) / QUANTIZATION_BLOCK
    total = 0.0
    for group in skeleton.groups:
        elements = sum(skeleton.base.tensors[name].elements for name in group.sources)
        in_four_bits = any(skeleton.is_quantized(name) for name in group.parameters)
        total += elements * (element if in_four_bits else 2)
    return int(total)


def available_host_bytes() -> int:
    """Host memory that is free to take: the machine's, or what a container's limit leaves of it."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used))


def refuse_too_little(needs: Needs, output: Path, *, on_gpu: bool) -> None:
    """Compare needs with this machine.

    Raises:
        InputError: there is too little memory or disk; one line that says what would do with less.
    """
    disk = shutil.disk_usage(_existing(output)).free
    if needs.disk_bytes > disk:
        raise InputError(
            f"{output}: {gib(needs.disk_bytes)} of disk are needed and {gib(disk)} are free; --base writes "
            "one model instead of two, -o names another place"
        )
    memory = available_host_bytes()
    if needs.writing_bytes > memory:
        raise InputError(
            f"{gib(needs.writing_bytes)} of host memory are needed and {gib(memory)} are free; "
            "--max-shard-size makes it less"
        )
    if not on_gpu and needs.host_bytes > memory:
        raise InputError(
            f"{gib(needs.host_bytes)} of host memory are needed to measure and {gib(memory)} are free; "
            f"--no-measure with --base needs {gib(needs.writing_bytes)}"
        )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
