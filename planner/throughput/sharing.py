"""What several GPUs add to a step: transfers between them, Python around them, and waiting for the slowest.

Every GPU goes through its own micro-steps. With DDP gradients are averaged once a step; with FSDP2 each pass
gathers every unit, and gradients are sent where they are whole. TRL asks all ranks four times a micro-step
(trl/trainer/sft_trainer.py:1640-1653), so that each waits for the slowest in each.
"""

from __future__ import annotations

from typing import NamedTuple

from planner.base.values import dataclass
from planner.gpus.links import link_of
from planner.gpus.spec import GpuSpec
from planner.memory.held.shards import units_of
from planner.setup.run import TrainingRun
from planner.throughput.rates import MicroStepTime, PassSharing, Rates, micro_step_time
from planner.throughput.shared_step import SharedStep
from planner.throughput.work import StepWork

COLLECTIVE_SECONDS = 3e-5
"""A small collective between two GPUs of a machine, launched and done: 40 us for 8 bytes among eight RTX 4090
(https://github.com/NVIDIA/nccl/issues/1530)."""
ASKED_A_MICRO_STEP, ASKED_A_STEP = 4, 1
"""Small collectives of TRL's (sft_trainer.py:1640-1653; transformers trainer.py:2348-2350)."""
UNIT_SECONDS = 7e-4
"""Python of FSDP2's hooks around a unit in one pass: two H200s took 1.087 s where one took 1.038, with 32
layers, eager (Llama-3.1-8B, QLoRA r16, 4 x 2,048)."""
BUCKET_TENSOR_SECONDS = 1e-5
"""Python and copies of DDP's around a trained tensor in the last micro-step."""
HOST_SPREAD, GPU_SPREAD = 0.05, 0.01
"""Standard deviation of the times of processes for the same micro-step, as a share of it, where it waits for
the host and where it waits for the GPU: hosts' paces differ from step to step (docs/throughput.md,
"Accuracy"), GPUs' clocks less. Between the two it goes with the square of the host's share of the GPU's
time."""
WIDER_SPREAD = 2.0
"""Times the spread, at the low end of the interval: two H200s reached 0.90 and 1.00 of twice one's rate in
two runs of the same setup."""
LAST_BUCKET = 0.1
"""Share of gradients that DDP sends when the backward pass is over, at least."""


class StepTime(NamedTuple):
    """Seconds of a micro-step and of an optimizer step with all its micro-steps."""

    micro_step: float
    step: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """A step's time as expected, and at the interval's ends; what is told of it."""

    expected: StepTime
    fastest: StepTime
    slowest: StepTime
    told: SharedStep


def share_step(
    run: TrainingRun,
    gpu: GpuSpec,
    rates: Rates,
    work: StepWork,
    alone: MicroStepTime,
    alone_step: float,
    *,
    slower: float,
    host_slower: float,
) -> Shared:
    """The time of a step of several GPUs, one of which would take `alone` and `alone_step` by itself."""
    link, count = link_of(gpu.id), run.parallelism.num_processes
    rate = link.rate(count)
    optimizer = alone_step - run.setup.gradient_accumulation_steps * alone.seconds
    if run.parallelism.shards:
        # Each GPU updates its share.
        optimizer /= count
    found = [
        _step(run, rates, work, alone, optimizer, speed, spread, slower=slower, host_slower=host_slower)
        for speed, spread in ((rate.expected, 1.0), (rate.high, 0.0), (rate.low, WIDER_SPREAD))
    ]
    expected, fastest, slowest = found
    return Shared(
        expected=expected,
        fastest=fastest,
        slowest=slowest,
        told=SharedStep(
            link=link.words(count),
            received_bytes=received_bytes(run),
            bytes_per_second=rate.expected,
            bytes_per_second_low=rate.low,
            bytes_per_second_high=rate.high,
            scaling=count * alone_step / expected.step,
            waiting=max(0.0, 1.0 - alone_step / expected.step),
        ),
    )


def received_bytes(run: TrainingRun) -> float:
    """Bytes that each GPU receives in an optimizer step; rings send as many."""
    count = run.parallelism.num_processes
    others = (count - 1) / count
    if run.parallelism.replicates:
        return 2 * others * run.trained.size_bytes
    units = units_of(run)
    ends = units.embedding.flat_bytes + units.head.flat_bytes + units.gathered_head_bytes
    gathered = 2 * (units.flat_bytes + ends)
    steps = run.setup.gradient_accumulation_steps
    sums = steps if run.parallelism.sharding.each_micro_step else 1
    return others * (gathered * steps + units.gradient_bytes * sums)


def slowest_of(count: int) -> float:
    """Standard deviations by which the slowest of so many equal normal times is above their mean (Blom)."""
    from statistics import NormalDist

    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def _step(
    run: TrainingRun,
    rates: Rates,
    work: StepWork,
    alone: MicroStepTime,
    optimizer: float,
    bytes_per_second: float,
    spread: float,
    *,
    slower: float,
    host_slower: float,
) -> StepTime:
    """A step over a link of that rate, where processes' times differ by so many times the usual."""
    count, steps = run.parallelism.num_processes, run.setup.gradient_accumulation_steps
    micro, last = alone.seconds, 0.0
    if run.parallelism.shards:
        sharing = _gathering(run, rates, bytes_per_second)
        time = micro_step_time(rates, work, slower=slower, host_slower=host_slower, sharing=sharing)
        micro = time.seconds + _ends(run, bytes_per_second)
    else:
        last = _averaging(run, bytes_per_second, alone.seconds)
    usual = _usual_spread(run, rates, work, host_slower=host_slower)
    micro *= 1.0 + spread * usual * slowest_of(count)
    micro += ASKED_A_MICRO_STEP * COLLECTIVE_SECONDS
    if run.parallelism.shards:
        sums = steps if run.parallelism.sharding.each_micro_step else 1
        sent = (count - 1) / count * units_of(run).gradient_bytes
        last = sums * sent / bytes_per_second * LAST_BUCKET
    return StepTime(micro, steps * micro + last + ASKED_A_STEP * COLLECTIVE_SECONDS + optimizer)


def _usual_spread(run: TrainingRun, rates: Rates, work: StepWork, *, host_slower: float) -> float:
    """HOST_SPREAD where the host takes as long as the GPU or longer, GPU_SPREAD where it takes no time."""
    passes = (work.forward, work.backward)
    gpu = sum(sum(rates.gpu_seconds(one)) for one in passes)
    host = sum(rates.host_seconds(one) for one in passes) * host_slower
    if run.parallelism.shards:
        host += 2 * len(units_of(run).layers) * UNIT_SECONDS * host_slower
    share = min(1.0, host / gpu) if gpu else 1.0
    return GPU_SPREAD + (HOST_SPREAD - GPU_SPREAD) * share**2


def _gathering(run: TrainingRun, rates: Rates, bytes_per_second: float) -> tuple[PassSharing, PassSharing]:
    """What gathering the layers adds to each pass: they arrive beside the work of the one before."""
    count, units = run.parallelism.num_processes, units_of(run)
    layers = len(units.layers)
    arriving = (count - 1) / count * units.flat_bytes / bytes_per_second + layers * COLLECTIVE_SECONDS
    # Into the buffer goes this GPU's share, out of it all of it.
    copied = units.flat_bytes * (1 + 1 / count) * rates.seconds["written_byte"]
    one = PassSharing(copied, arriving, layers * UNIT_SECONDS)
    return one, one


def _ends(run: TrainingRun, bytes_per_second: float) -> float:
    """Gathering embedding and head, which nothing hides."""
    count, units = run.parallelism.num_processes, units_of(run)
    ends = 2 * units.embedding.flat_bytes + units.head.flat_bytes + units.gathered_head_bytes
    return (count - 1) / count * ends / bytes_per_second


def _averaging(run: TrainingRun, bytes_per_second: float, micro_step: float) -> float:
    """What DDP adds to a step: gradients that are not averaged behind the last backward pass."""
    count = run.parallelism.num_processes
    whole = 2 * (count - 1) / count * run.trained.size_bytes / bytes_per_second
    # The backward pass is about two thirds of a micro-step.
    beside = micro_step * 2 / 3
    left = max(whole * LAST_BUCKET, whole - beside)
    return left + run.trained.tensor_count * BUCKET_TENSOR_SECONDS + COLLECTIVE_SECONDS
