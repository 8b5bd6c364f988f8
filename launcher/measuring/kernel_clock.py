"""What microbenchmarks measure, by device, and the clock that times it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

REPEATS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What to measure; `shapes` are (inputs, outputs) of a model's layer, `buffer_bytes` what is copied."""

    tokens: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    adapter_tokens: tuple[int, ...]
    head_dims: tuple[int, ...]
    lengths: tuple[int, ...]
    attention_tokens: int
    attention_width: int
    single: int
    dequantized: tuple[int, int]
    buffer_bytes: int
    calls: int
    batch_seconds: float
    warm_seconds: float


GPU_SIZES = Sizes(
    # Those read first that most runs use, so that a slow card's time is spent on them.
    tokens=(2048, 4096, 8192, 1024, 512),
    # Hidden and intermediate size of Llama-3.1-8B, Qwen2.5-0.5B, Qwen2.5-1.5B, Llama-3.2-3B, Qwen2.5-14B and
    # Llama-3.1-70B.
    shapes=((4096, 14336), (896, 4864), (1536, 8960), (3072, 8192), (5120, 13824), (8192, 28672)),
    adapter_tokens=(2048, 8192),
    head_dims=(64, 128),
    lengths=(1024, 4096),
    attention_tokens=8192,
    attention_width=4096,
    single=4096,
    dequantized=(4096, 14336),
    buffer_bytes=2**29,
    calls=200,
    batch_seconds=0.02,
    warm_seconds=1.0,
)
CPU_SIZES = Sizes(
    tokens=(16,),
    shapes=((64, 128), (96, 64)),
    adapter_tokens=(16,),
    head_dims=(16,),
    lengths=(16, 32),
    attention_tokens=64,
    attention_width=32,
    single=32,
    dequantized=(64, 128),
    buffer_bytes=2**16,
    calls=5,
    batch_seconds=0.001,
    warm_seconds=0.01,
)


def eager_block(device: Any, dtype: Any) -> Callable[[], object]:
    """Work whose time is the host's: four RMS norms with SiLU over one tiny row, forward and backward."""
    import torch

    weight = torch.randn(64, dtype=dtype, device=device).requires_grad_()
    hidden = torch.randn(1, 64, dtype=dtype, device=device).requires_grad_()

    def work() -> None:
        out = hidden
        for _ in range(4):
            scale = torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-6)
            out = torch.nn.functional.silu(out * scale * weight)
        torch.autograd.grad(out.sum(), (hidden, weight))

    return work


class KernelClock:
    """Times work on one device: the median of repeated batches of calls, after a warm-up."""

    def __init__(self, device: Any, sizes: Sizes) -> None:
        import torch

        self._torch = torch
        self._cuda = device.type == "cuda"
        self._sizes = sizes

    def wait(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self._cuda:
            self._torch.cuda.synchronize()

    def device_seconds(self, work: Callable[[], object]) -> float:
        """Device time of one call; calls are queued behind a pause, so that the host is not measured."""
        work()
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        once = max(time.perf_counter() - started, 1e-6)
        calls = max(1, min(20, math.ceil(self._sizes.batch_seconds / once)))
        if not self._cuda:
            return statistics.median(self._host(work, calls) for _ in range(REPEATS))
        return statistics.median(self._queued(work, calls) for _ in range(REPEATS))

    def _queued(self, work: Callable[[], object], calls: int) -> float:
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        # About 0.2 ms for each call at 2 GHz, longer than the host needs to queue one.
        self._torch.cuda._sleep(400_000 * calls)
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        self.wait()
        return float(begin.elapsed_time(end)) / 1e3 / calls

    def host_seconds(self, work: Callable[[], object]) -> float:
        """Host time of one call whose kernels take no longer than the host to launch them."""
        for _ in range(3):
            work()
        self.wait()
        return statistics.median(self._host(work, self._sizes.calls) for _ in range(REPEATS))

    def _host(self, work: Callable[[], object], calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            work()
        seconds = (time.perf_counter() - started) / calls
        self.wait()
        return max(seconds, 1e-9)
