"""Step time of a setup on a GPU, from rates that measured runs gave, beside what published rates allow."""

from __future__ import annotations

from dataclasses import field
from functools import lru_cache

from planner.base.errors import InputError
from planner.base.json_codec import WHERE_SET
from planner.base.values import dataclass
from planner.gpus.catalog import gpu_catalog
from planner.gpus.spec import GpuSpec
from planner.models.spec import ModelSpec
from planner.setup.adapters import UNCOMMON_OPTIMIZERS
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput.by_kind import positions_of
from planner.throughput.compilation import FirstStep, first_step
from planner.throughput.eight_bit import WIDER, least_flops
from planner.throughput.intervals import published_interval, traced_interval
from planner.throughput.microbenchmarks import microbenchmarks_of, own_microbenchmarks_of
from planner.throughput.rates import (
    UNCALIBRATED,
    Rates,
    host_slower,
    known_rates,
    measured_slowdown,
    micro_step_time,
    rates_for,
    scaled_rates,
)
from planner.throughput.shared_step import SharedStep
from planner.throughput.traffic import weight_bytes
from planner.throughput.work import StepWork, step_work
from planner.throughput.work_kinds import kinds_of

# bfloat16 without hardware for it: 9.85 against 88.9 TFLOPS in float16 on a V100S, 5.14 against 39.0 on an
# RTX 2080 (https://github.com/fanghostt/transformers-benchmarks).
EMULATED_BFLOAT16 = 8.3


class NoForecastError(InputError):
    """No throughput can be given: a rate of the GPU is unknown, or a knob's time is not modelled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEstimate:
    """Time of a training step, steady state, full sequences.

    `tokens_per_second` counts all processes, the optimizer step spread over the accumulation; `_low` and
    `_high` are its interval, `roofline_tokens_per_second` what the matmuls and weights alone allow at the
    published (or a higher measured) rate, which no run exceeds. `matrix_flops` and `bytes_moved` are of one
    micro-step on one GPU. `bound_by` is "compute", "bandwidth" or "launches". `basis` says on what it rests.
    `sharing` is what several GPUs say to each other, null for one. `first_step` is the wait for the first
    step beyond a usual one, null where nothing is compiled.
    """

    seconds_per_micro_step: float
    seconds_per_optimizer_step: float
    tokens_per_second: float
    tokens_per_second_low: float
    tokens_per_second_high: float
    matrix_flops: float
    bytes_moved: float
    roofline_tokens_per_second: float
    bound_by: str
    calibrated: bool
    basis: str
    sharing: SharedStep | None = field(default=None, metadata=WHERE_SET)
    first_step: FirstStep | None = field(default=None, metadata=WHERE_SET)

    @property
    def compile_seconds(self) -> float:
        """Seconds that compilation adds to a run."""
        return 0.0 if self.first_step is None else self.first_step.seconds


def _refuse_untimed(setup: TrainingSetup) -> None:
    untimed = {
        "load_in_8bit": setup.load_in_8bit,
        f"optim {setup.optim}": setup.optim in UNCOMMON_OPTIMIZERS,
        f"peft_type {setup.peft_type}": setup.peft_type != "lora",
    }
    for named, holds in untimed.items():
        if holds:
            raise NoForecastError(f"no throughput for {named}: no run of it has been timed")


def estimate_step(run: TrainingRun, gpu: GpuSpec) -> StepEstimate:
    """Forecast a training step's time on a GPU.

    Time is, of the forward and of the backward pass, what the GPU needs (matmuls, attention, memory traffic,
    one after the other) or what the host needs to launch it, whichever is more, plus the optimizer step once
    an accumulation; with several GPUs also what they say to each other (sharing.py). A GPU without rates
    of its own gets those of a measured one, scaled by its published rates.

    Raises:
        NoForecastError: the GPU's rates are unknown, or the setup has a knob without a time model.
        NotModelledError: a knob whose work is not counted.
    """
    setup = run.setup
    _refuse_untimed(setup)
    peak, bandwidth = _limits(gpu)
    known = rates_of(gpu)
    rates, calibrated = known.rates, known.source == "runs"
    work = step_work(run)
    slower = EMULATED_BFLOAT16 if setup.dtype != "float16" and not gpu.supports_bfloat16 else 1.0
    # Rates of runs hold for their host; this machine may have measured its own.
    host = host_slower(own_microbenchmarks_of(gpu.id), rates) or 1.0
    time = micro_step_time(rates, work, slower=slower, host_slower=host)
    micro = time.seconds
    step = micro * setup.gradient_accumulation_steps + rates.optimizer_seconds(work, host_slower=host)
    shared = None
    if not run.parallelism.is_single:
        from planner.throughput.sharing import share_step

        shared = share_step(run, gpu, rates, work, time, step, slower=slower, host_slower=host)
        micro, step = shared.expected.micro_step, shared.expected.step
    tokens = run.micro_step.tokens * run.parallelism.num_processes
    flops = least_flops(run.kind, work.total_flops, run.micro_step.tokens)
    roofline = tokens / max(flops / peak, weight_bytes(run) / bandwidth)
    rate = min(tokens * setup.gradient_accumulation_steps / step, roofline)
    low, high = traced_interval(run.model, known.interval(gpu, time.bound_by))
    if setup.base_matmul != "bf16":
        low, high = low * WIDER[0], high * WIDER[1]
    if shared is not None:
        low, high = low * step / shared.slowest.step, high * step / shared.fastest.step
    times, low, high = _of_stack(run, time.bound_by, roofline / rate, (low, high))
    rate, micro, step = rate * times, micro / times, step / times
    return StepEstimate(
        seconds_per_micro_step=micro,
        seconds_per_optimizer_step=step,
        tokens_per_second=rate,
        tokens_per_second_low=rate * low,
        tokens_per_second_high=min(rate * high, roofline),
        matrix_flops=work.total_flops,
        bytes_moved=_moved_bytes(work),
        roofline_tokens_per_second=roofline,
        bound_by=time.bound_by,
        calibrated=calibrated,
        basis=_basis(gpu, known) + _of_run(run),
        sharing=None if shared is None else shared.told,
        first_step=first_step(run),
    )


def _of_stack(
    run: TrainingRun, bound_by: str, most: float, interval: tuple[float, float]
) -> tuple[float, float, float]:
    """How many times as fast a stack is as TRL's kernels, `most` at the most, and the interval about that."""
    measured, (low, high) = run.stack.measured_speed, interval
    if measured is None:
        return 1.0, low, high
    # Nobody has measured it where the host decides, or without checkpoints.
    known = bound_by != "launches" and run.setup.gradient_checkpointing
    times = min(measured.expected if known else measured.least, most)
    return times, low * measured.least / times, high * measured.most / times


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownRates:
    """Rates for a GPU and where they come from: "runs" of its own, or those of the GPU `reference`, scaled by
    "microbenchmarks" of both or by "published" rates.
    """

    rates: Rates
    source: str
    reference: str

    def interval(self, gpu: GpuSpec, bound_by: str) -> tuple[float, float]:
        """Factors on the forecast of a step that waits for "compute", "bandwidth" or "launches"."""
        if self.source == "runs":
            return self.rates.interval(bound_by)
        return UNCALIBRATED if self.source == "microbenchmarks" else published_interval(gpu, bound_by)


@lru_cache(maxsize=256)
def rates_of(gpu: GpuSpec) -> KnownRates:
    """Rates for a GPU: its own, else another's, scaled.

    Raises:
        NoForecastError: there are none to scale to it.
    """
    own = rates_for(gpu)
    if own is not None:
        return KnownRates(rates=own, source="runs", reference=gpu.id)
    return borrowed_rates(gpu)


def borrowed_rates(gpu: GpuSpec) -> KnownRates:
    """Rates of another GPU, scaled to this one: by microbenchmarks rather than published rates.

    Raises:
        NoForecastError: there are none to scale to it.
    """
    found = []
    for rates in known_rates():
        # A card outside the catalog has no published rates to scale from.
        reference = next(iter(gpu_catalog().named(rates.gpu)), None)
        if reference is None or rates.gpu == gpu.id:
            continue
        scaled = scaled_rates(gpu, reference, rates)
        if scaled is not None:
            measured = measured_slowdown(gpu, reference) is not None
            source = "microbenchmarks" if measured else "published"
            found.append(KnownRates(rates=scaled, source=source, reference=reference.id))
    if not found:
        raise NoForecastError(f"no throughput for {gpu.id}: no measured rates to scale to it")
    return min(found, key=lambda one: one.source != "microbenchmarks")


@lru_cache(maxsize=256)
def _limits(gpu: GpuSpec) -> tuple[float, float]:
    """Matrix rate and bandwidth that no run exceeds: published, or measured where that is more or unknown."""
    measured = microbenchmarks_of(gpu.id)
    peaks = [gpu.peak_matrix_flops_per_second]
    bandwidth = gpu.bandwidth_bytes_per_second
    if measured is not None:
        peaks.append(measured.peak_matrix_flops_per_second)
        bandwidth = bandwidth or max(measured.copy_bytes_per_second, measured.elementwise_bytes_per_second)
    peak = max((rate for rate in peaks if rate is not None), default=None)
    if peak is None or bandwidth is None:
        raise NoForecastError(f"no throughput for {gpu.id}: its matrix rate or bandwidth is unknown")
    return peak, bandwidth


_TRAFFIC = positions_of(*(kind.name for kind in kinds_of("pass", "traffic")))


def _moved_bytes(work: StepWork) -> float:
    """Bytes written for later kernels to read, of one micro-step."""
    forward, backward = work.forward.numbers, work.backward.numbers
    return sum([forward[at] for at in _TRAFFIC]) + sum([backward[at] for at in _TRAFFIC])


def _basis(gpu: GpuSpec, known: KnownRates) -> str:
    runs = len(known.rates.record_ids)
    if known.source == "runs":
        return f"rates fitted to {runs} runs on {gpu.id}"
    if known.source == "microbenchmarks":
        return (
            f"rates of {known.reference} ({runs} runs), scaled by microbenchmarks of both; no run on {gpu.id}"
        )
    return (
        f"rates of {known.reference} ({runs} runs) at {gpu.id}'s published rates; not calibrated on this GPU"
    )


def _of_run(run: TrainingRun) -> str:
    """What a run's forecast rests on beside rates, as the end of a basis."""
    stack = "" if run.stack.measured_speed is None else f"; {run.stack.measured_speed.words}"
    return _of_traced(run.model) + _of_eight_bit(run.setup.base_matmul) + stack


def _of_eight_bit(base_matmul: str) -> str:
    """What the forecast of 8-bit products rests on beside."""
    return "" if base_matmul == "bf16" else "; 8-bit products as measured on an H200 (docs/eight-bit.md)"


def _of_traced(model: ModelSpec) -> str:
    """What no rate was fitted to, as the end of a basis."""
    if not model.is_traced:
        return ""
    named = ", ".join(model.unseen_kernels)
    unseen = f", and {named} are counted as transformers' reference in torch runs them" if named else ""
    return f"; the model was traced, and no run of one was fitted{unseen}"


def forecast(run: TrainingRun, gpu: GpuSpec) -> StepEstimate | None:
    """Speed of a run, or None where the card's rates or a knob's time are unknown."""
    try:
        return estimate_step(run, gpu)
    except NoForecastError:
        return None
