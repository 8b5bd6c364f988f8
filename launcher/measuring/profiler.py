"""Measure setups on this GPU with random weights of the published shapes: setup -> RunRecord.

Several setups can share a process: `reset` frees what the stack keeps between runs and refuses to go on when
anything is left (that it gives the figures of a process alone: docs/memory-model.md). Run
`python -m launcher.measuring.profiler` for one child process of `vramwise calibrate`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import platform
import sys
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from launcher.measuring.kernel_clock import GPU_SIZES, KernelClock, eager_block
from launcher.measuring.measured_run import MeasuredRun
from launcher.measuring.profile import Profile, read_profiles
from launcher.runs import stack
from launcher.runs.allocator import process_allocator
from planner.base.errors import InputError, VramwiseError
from planner.calibration.records import Environment, Predicted, RunRecord, append_record
from planner.gpus.detect import LocalGpu, local_gpus
from planner.memory import estimate_memory
from planner.models.catalog import resolve_model
from planner.setup.cuda_allocator import machine_allocator
from planner.setup.run import TrainingRun

LEFT_OVER_LIMIT_BYTES = 2**20


class NotCleanError(VramwiseError):
    """A run left memory behind, so the next one in this process would not be measured truly."""


class Profiler:
    """Runs profiles on the first visible GPU of this process."""

    def __init__(self) -> None:
        self._gpu: LocalGpu = local_gpus()[0]
        self._before_bytes = self._gpu.used_bytes
        import torch

        torch.cuda.init()
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        self._device = torch.device("cuda", 0)
        self._context_bytes = self._driver_bytes() - torch.cuda.memory_reserved()
        self._runs = 0
        self._patched = False
        self.losses: tuple[float, ...] = ()
        """Of the last run's steps."""
        self.environment = self._describe()

    def measure(self, profile: Profile) -> RunRecord:
        """Build, train and measure one setup; out of memory is an outcome, not an error.

        Raises:
            NotCleanError: memory is left from the run before.
            InputError: the setup cannot be run here.
        """
        import torch

        self.reset()
        if profile.memory_cap_bytes is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(profile.memory_cap_bytes / total)
        self._refuse_patched(profile)
        allocator = process_allocator(os.environ)
        if allocator != (profile.allocator or machine_allocator()):
            raise NotCleanError("this process's allocator is not the one to measure with")
        blocks = [self._host_block()]
        self._context_bytes = self._driver_bytes() - torch.cuda.memory_reserved()
        run = MeasuredRun(profile, self._device, self._driver_bytes)
        try:
            outcome = run.execute()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        if outcome == "ok":
            blocks.append(self._host_block())
        record = self._record(profile, run, outcome, fmean(blocks))
        self.losses = run.losses
        del run
        self._runs += 1
        return record

    def _host_block(self) -> float:
        """How fast the host is at this moment: others may be at work on it."""
        import torch

        clock = KernelClock(self._device, GPU_SIZES)
        seconds = clock.host_seconds(eager_block(self._device, torch.float32))
        torch.cuda.empty_cache()
        return seconds

    def reset(self) -> None:
        """Free what earlier runs left: cached blocks, cuBLAS workspaces, compiled code, offloaded tensors,
        bitsandbytes' registry and its managed memory.

        Raises:
            NotCleanError: more than a rounding is still allocated.
        """
        import torch

        # A run that ended by an error has left what it froze out of collection's reach.
        gc.unfreeze()
        torch._dynamo.reset()
        self._drop_offloaded()
        gc.collect()
        self._forget_embeddings()
        self._free_managed()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated()
        if left > LEFT_OVER_LIMIT_BYTES:
            raise NotCleanError(f"{left:,} bytes are left on the GPU from an earlier run in this process")

    @staticmethod
    def _forget_embeddings() -> None:
        """bitsandbytes keeps every embedding it was told about, and its model with it, for ever."""
        from bitsandbytes.optim import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        manager.module_weight_config_triple = []
        manager.pid2config = {}
        manager.index2config = {}

    @staticmethod
    def _drop_offloaded() -> None:
        """TRL's activation offloading holds the last step's tensors, and an engine callback holds it."""
        from trl.models.activation_offloading import OffloadActivations

        for found in gc.get_objects():
            if type(found) is OffloadActivations:
                for held in (found.tracker, found.fwd_stash, found.bwd_tensor_stash, found.bwd_ev_stash):
                    held.clear()
                found.curr_autograd_node = None

    @staticmethod
    def _free_managed() -> None:
        """bitsandbytes never frees the managed memory of paged optimizers: their tensors do not own it."""
        from bitsandbytes.functional import GlobalPageManager

        manager = GlobalPageManager.get_instance()
        if not manager.paged_tensors:
            return
        driver = ctypes.CDLL("libcuda.so.1")
        for tensor in manager.paged_tensors:
            code = driver.cuMemFree_v2(ctypes.c_uint64(tensor.data_ptr()))
            if code != 0:
                raise NotCleanError(
                    f"managed memory of an earlier run could not be freed (CUDA error {code})"
                )
        manager.paged_tensors = []

    def _refuse_patched(self, profile: Profile) -> None:
        """Liger patches whole modules of transformers: a run without it needs a process that never had it.

        Raises:
            NotCleanError: an earlier run in this process used Liger's kernels.
        """
        if self._patched and profile.setup.kernels == "none":
            raise NotCleanError("an earlier run in this process has put Liger's kernels into transformers")
        self._patched = self._patched or profile.setup.kernels == "liger"

    def _driver_bytes(self) -> int:
        used = next(gpu.used_bytes for gpu in local_gpus() if gpu.uuid == self._gpu.uuid)
        return max(0, used - self._before_bytes)

    def _describe(self) -> Environment:
        import torch

        properties = torch.cuda.get_device_properties(0)
        return Environment(
            gpu_name=properties.name,
            gpu_id=self._gpu.spec.id,
            compute_capability=(properties.major, properties.minor),
            total_bytes=properties.total_memory,
            driver=_driver_version(),
            python=platform.python_version(),
            versions=stack.versions(),
        )

    def _record(
        self, profile: Profile, run: MeasuredRun, outcome: str, host_block_seconds: float
    ) -> RunRecord:
        setup = profile.setup
        model = resolve_model(setup.model)
        return RunRecord(
            id=f"{datetime.now(UTC):%Y%m%d}-{uuid.uuid4().hex[:12]}",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            source="calibrate",
            setup=setup,
            model_parameter_count=model.parameter_count,
            environment=self.environment,
            outcome=outcome,
            weights_bytes=run.weights_bytes,
            context_bytes=self._context_bytes,
            phases=tuple(run.phases),
            step_seconds=tuple(round(seconds, 5) for seconds in run.step_seconds),
            update_seconds=tuple(round(seconds, 5) for seconds in run.update_seconds),
            tokens_per_second=run.tokens_per_second,
            predicted=_predict(profile),
            useful_tokens_per_second=run.useful_tokens_per_second,
            lengths=tuple(sorted(Counter(profile.lengths).items())),
            padded=profile.mixes_lengths,
            random_weights=True,
            isolated=self._runs == 0,
            memory_cap_bytes=profile.memory_cap_bytes,
            allocator=process_allocator(os.environ),
            host_block_seconds=round(host_block_seconds, 7),
            first_step_seconds=None if run.first_step_seconds is None else round(run.first_step_seconds, 3),
        )


def _predict(profile: Profile) -> Predicted | None:
    from planner.base.errors import NotModelledError

    model = resolve_model(profile.setup.model)
    gpu = local_gpus()[0].spec
    try:
        breakdown = estimate_memory(
            TrainingRun(setup=profile.setup, model=model, padded=profile.mixes_lengths),
            gpu=gpu,
            replay=True,
            allocator=process_allocator(os.environ),
        )
    except NotModelledError:
        return None
    return Predicted(
        allocated_bytes=breakdown.allocated_bytes,
        reserved_bytes=breakdown.reserved_bytes,
        process_bytes=breakdown.process_bytes,
        process_upper_bytes=breakdown.process_upper_bytes,
        coefficients=breakdown.basis.coefficients,
    )


def _driver_version() -> str:
    import torch

    return f"CUDA {torch.version.cuda}"


def run_profiles(profiles: Sequence[Profile], output: Path, *, seconds: float = math.inf) -> int:
    """Measure profiles one after the other in this process, appending each record as it comes.

    Says on stdout, a JSON line each: {"event": "started", "index"} and {"event": "ended", "index", "outcome",
    "seconds", "message"}; a setup that cannot run here has the outcome "refused". No run is started that
    would, at the pace of the slowest so far, end after `seconds`. Returns how many were recorded.
    """
    begun = time.monotonic()
    profiler = Profiler()
    recorded, slowest = 0, 0.0
    for index, profile in enumerate(profiles):
        started = time.monotonic()
        if started - begun + slowest > seconds:
            break
        _say(event="started", index=index)
        try:
            record = profiler.measure(profile)
        except InputError as error:
            _say(event="ended", index=index, outcome="refused", seconds=0.0, message=str(error))
            continue
        append_record(output, record)
        recorded += 1
        took = time.monotonic() - started
        slowest = max(slowest, took)
        _say(event="ended", index=index, outcome=record.outcome, seconds=round(took, 2), message=record.id)
    return recorded


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    run_profiles(read_profiles(Path(sys.argv[1])), Path(sys.argv[2]), seconds=float(sys.argv[3]))
