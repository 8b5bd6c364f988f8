"""`python -m launcher.measuring.several PROFILE RECORDS [--cap BYTES] [--one-gpu]`, started by torchrun.

One profile on all of its GPUs, as one record with each rank's own phases. With a cap each GPU is left that
much for this process, CUDA's context and NCCL included, as if the card had no more. One run a process group:
where a rank fails, torchrun ends the others. With --one-gpu all ranks share the first GPU and talk over the
host: each rank's memory is what it would be on a GPU of its own, and nothing is said of speed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import sys
import uuid
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.measuring import one_gpu as one_gpu_module
from launcher.measuring.measured_run import MeasuredRun, load_config
from launcher.measuring.profile import Profile, read_profiles
from launcher.runs import stack
from launcher.runs.allocator import process_allocator
from launcher.training.several.ranks import Ranks, asked_ranks, join
from planner.base.errors import VramwiseError
from planner.calibration.records import Environment, MeasuredPhase, RunRecord, append_record

if TYPE_CHECKING:
    import torch

NOT_READ = -1
OUTSIDE_BYTES = 1088 * 2**20
"""What two ranks with NCCL hold outside torch's allocator each: seen on two H200 (docs/several-gpus.md)."""


class CapError(VramwiseError):
    """The rest of a card could not be held."""


@dataclass(slots=True)
class Card:
    """This rank's GPU, as the driver sees it; the CPU stands for one where there is none."""

    ranks: Ranks
    device: torch.device
    shared: bool = False
    held_bytes: int = 0
    before_bytes: int = 0
    uuid: str = ""

    @classmethod
    def take(cls, ranks: Ranks, *, shared: bool) -> Card:
        """Start CUDA on this rank's GPU; `shared`: on the first, as all ranks do."""
        import torch

        if not torch.cuda.is_available():
            return cls(ranks, torch.device("cpu"))
        from planner.gpus.detect import local_gpus

        position = 0 if shared else ranks.local_rank
        gpu = local_gpus()[position]
        device = torch.device("cuda", position)
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
        torch.cuda.synchronize()
        return cls(ranks, device, shared, before_bytes=gpu.used_bytes, uuid=gpu.uuid)

    def driver_bytes(self) -> int | None:
        """What the driver shows for this process, less what it holds for a cap."""
        if self.device.type == "cpu":
            return None
        from planner.gpus.detect import local_gpus

        gpu = next(gpu for gpu in local_gpus() if gpu.uuid == self.uuid)
        if self.shared:
            return next((one.used_bytes for one in gpu.processes if one.pid == os.getpid()), None)
        used = gpu.used_bytes
        return max(0, used - self.before_bytes - self.held_bytes)

    def cap(self, left_bytes: int) -> None:
        """Hold what is beyond `left_bytes` of the card, outside torch's allocator.

        Raises:
            CapError: the driver refuses.
        """
        import torch

        if self.device.type == "cpu":
            return
        free, total = torch.cuda.mem_get_info()
        if self.shared:
            torch.cuda.set_per_process_memory_fraction((left_bytes - OUTSIDE_BYTES) / total)
            return
        hold = free - (left_bytes - (self.driver_bytes() or 0))
        pointer = ctypes.c_uint64()
        code = ctypes.CDLL("libcuda.so.1").cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(hold))
        if code != 0:
            raise CapError(f"{hold:,} bytes could not be held (CUDA error {code})")
        self.held_bytes = hold


def measure(profile: Profile, ranks: Ranks, cap_bytes: int | None, *, one_gpu: bool) -> RunRecord | None:
    """Measure a profile; the record on rank 0, None on the others."""
    import torch

    card = Card.take(ranks, shared=one_gpu)
    context = (card.driver_bytes() or 0) - (torch.cuda.memory_reserved() if card.device.type == "cuda" else 0)
    if cap_bytes is not None:
        card.cap(cap_bytes)
    join(ranks, on_gpu=card.device.type == "cuda" and not one_gpu)
    if one_gpu:
        one_gpu_module.prepare()
    driver = None if card.driver_bytes() is None else lambda: card.driver_bytes() or 0
    run = MeasuredRun(profile, card.device, driver, ranks)
    outcome = run.execute()
    every = _phases_of_all(run, ranks)
    if not ranks.saves or outcome != "ok":
        return None
    setup = profile.setup
    return RunRecord(
        id=f"{datetime.now(UTC):%Y%m%d}-{uuid.uuid4().hex[:12]}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source="calibrate",
        setup=setup,
        model_parameter_count=_parameter_count(setup.model),
        environment=_environment(card),
        outcome=outcome,
        weights_bytes=run.weights_bytes,
        context_bytes=max(0, context),
        phases=tuple(_largest(phases) for phases in zip(*every, strict=True)),
        step_seconds=() if one_gpu else tuple(round(seconds, 5) for seconds in run.step_seconds),
        update_seconds=() if one_gpu else tuple(round(seconds, 5) for seconds in run.update_seconds),
        tokens_per_second=None if one_gpu else run.tokens_per_second,
        predicted=None,
        useful_tokens_per_second=None if one_gpu else run.useful_tokens_per_second,
        lengths=tuple(sorted(Counter(profile.lengths).items())),
        padded=profile.mixes_lengths,
        random_weights=True,
        memory_cap_bytes=cap_bytes,
        allocator=process_allocator(os.environ),
        ranks=every,
    )


def _parameter_count(model: str) -> int:
    import torch

    from launcher.training.loading.skeleton import empty_model

    return sum(
        parameter.numel() for parameter in empty_model(load_config(model), torch.bfloat16).parameters()
    )


def _phases_of_all(run: MeasuredRun, ranks: Ranks) -> tuple[tuple[MeasuredPhase, ...], ...]:
    own: list[int] = []
    for phase in run.phases:
        driver = NOT_READ if phase.process_bytes is None else phase.process_bytes
        own += [phase.allocated_bytes, phase.reserved_bytes, driver]
    return tuple(
        tuple(
            MeasuredPhase(
                name=phase.name,
                allocated_bytes=told[3 * index],
                reserved_bytes=told[3 * index + 1],
                process_bytes=None if told[3 * index + 2] == NOT_READ else told[3 * index + 2],
            )
            for index, phase in enumerate(run.phases)
        )
        for told in ranks.exchange(*own)
    )


def _largest(phases: tuple[MeasuredPhase, ...]) -> MeasuredPhase:
    driver = [phase.process_bytes for phase in phases if phase.process_bytes is not None]
    return MeasuredPhase(
        name=phases[0].name,
        allocated_bytes=max(phase.allocated_bytes for phase in phases),
        reserved_bytes=max(phase.reserved_bytes for phase in phases),
        process_bytes=max(driver, default=None),
    )


def _environment(card: Card) -> Environment:
    import torch

    versions = stack.versions()
    if card.shared:
        versions = (*versions, ("torch.distributed", "gloo, all ranks on one GPU"))
    if card.device.type == "cpu":
        return Environment(
            gpu_name="cpu",
            gpu_id="cpu",
            compute_capability=(0, 0),
            total_bytes=0,
            driver="none",
            python=platform.python_version(),
            versions=versions,
        )
    from planner.gpus.detect import local_gpus

    properties = torch.cuda.get_device_properties(card.device)
    return Environment(
        gpu_name=properties.name,
        gpu_id=next(gpu.spec.id for gpu in local_gpus() if gpu.uuid == card.uuid),
        compute_capability=(properties.major, properties.minor),
        total_bytes=properties.total_memory,
        driver=f"CUDA {torch.version.cuda}",
        python=platform.python_version(),
        versions=versions,
    )


def main(arguments: list[str]) -> int:
    """Measure the profile of the file named and append its record; returns the exit code."""
    import torch.distributed as dist

    parser = argparse.ArgumentParser()
    parser.add_argument("profile", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("--cap", type=int)
    parser.add_argument("--one-gpu", action="store_true")
    asked = parser.parse_args(arguments)
    ranks = asked_ranks()
    (profile,) = read_profiles(asked.profile)
    record = measure(profile, ranks, asked.cap, one_gpu=asked.one_gpu)
    failed = ranks.saves and record is None
    if record is not None:
        append_record(asked.records, record)
        print(json.dumps({"event": "recorded", "id": record.id}), flush=True)
    if not ranks.alone:
        dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
