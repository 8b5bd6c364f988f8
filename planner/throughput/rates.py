"""Rates: how fast one GPU and its host do each kind of work, fitted to measured runs.

Shipped rates lie in profiles/calibration/throughput, a person's own in the user data folder.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

from planner.base import validate
from planner.base.data_files import PROFILES, read_json, user_data_dir
from planner.base.errors import InputError
from planner.gpus.spec import GpuSpec
from planner.throughput.microbenchmarks import Microbenchmarks, Slowdown, microbenchmarks_of, slowdown
from planner.throughput.work import PassWork, StepWork

OVERLAP = 4.0
"""Power of the mean that joins GPU and host time: above the larger of two equal ones by 2^(1/4), 19%."""
NOT_HIDDEN = 0.35
"""Share of copies to the host, or of the GPU's work where that is less, that is not hidden behind the other:
of runs with activation_offloading, layers compiled (20261122-0cd48f03f4be, 20261122-18ef6e408250) and not."""
UNCALIBRATED = (0.65, 1.5)
"""Interval of a forecast with another GPU's rates, as factors of it; runs beside it: docs/throughput.md."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Seconds for each unit of work on one GPU (`gpu`, its catalog id) and its host.

    Of the GPU, a floating-point operation (`layer`, `head`, `adapter`, `attention`, `masked_attention`,
    `wide_masked_attention`; `single` in fp32, by TF32 where the GPU has it) and a byte (`written`: tensors
    that grow with the batch; `weight`: those that do not; `offloaded`: to the host or back; `optimizer`: an
    optimizer step's). Of the host, what PassWork counts (`launch`, `quantized_call`, `lora_call`,
    `liger_call`, `selected_launch`, `compiled_layer`, `compiled_call`), a micro-step, and an optimizer's run
    of Python (`optimizer_call`). Between `low` and `high` times the forecast lie nine in ten runs of models
    that the fit had not seen, where the GPU decides; `launch_low` and `launch_high` where the host does.
    `record_ids` are the runs behind it. The host's rates are those of one that takes `host_block_seconds` for
    the eager block of microbenchmarks (null: not known).
    """

    gpu: str
    layer_flop_seconds: float
    attention_flop_seconds: float
    masked_attention_flop_seconds: float
    wide_masked_attention_flop_seconds: float
    head_flop_seconds: float
    adapter_flop_seconds: float
    single_flop_seconds: float
    written_byte_seconds: float
    weight_byte_seconds: float
    offloaded_byte_seconds: float
    optimizer_byte_seconds: float
    launch_seconds: float
    quantized_call_seconds: float
    lora_call_seconds: float
    liger_call_seconds: float
    selected_launch_seconds: float
    eager_layer_seconds: float
    compiled_layer_seconds: float
    compiled_call_seconds: float
    micro_step_seconds: float
    optimizer_call_seconds: float
    low: float
    high: float
    launch_low: float
    launch_high: float
    record_ids: tuple[str, ...]
    host_block_seconds: float | None = None

    def __post_init__(self) -> None:
        validate.text("rates gpu", self.gpu)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_seconds") and value is not None:
                validate.number(field.name, value, minimum=0.0, maximum=10.0)
        for name in ("low", "launch_low"):
            validate.number(name, getattr(self, name), minimum=0.0, maximum=1.0)
        for name in ("high", "launch_high"):
            validate.number(name, getattr(self, name), minimum=1.0, maximum=100.0)

    def interval(self, bound_by: str) -> tuple[float, float]:
        """Factors on a forecast that waits for "compute", "bandwidth" or "launches"."""
        return (self.launch_low, self.launch_high) if bound_by == "launches" else (self.low, self.high)

    def gpu_seconds(self, work: PassWork, *, single: bool) -> tuple[float, float]:
        """GPU time of a pass: matrix work, and memory traffic."""
        if single:
            matrix = (work.layer_flops + work.head_flops) * self.single_flop_seconds
        else:
            matrix = work.layer_flops * self.layer_flop_seconds + work.head_flops * self.head_flop_seconds
        matrix += work.attention_flops * self.attention_flop_seconds
        matrix += work.masked_attention_flops * self.masked_attention_flop_seconds
        matrix += work.wide_masked_attention_flops * self.wide_masked_attention_flop_seconds
        matrix += work.adapter_flops * self.adapter_flop_seconds
        traffic = work.written_bytes * self.written_byte_seconds
        return matrix, traffic + work.weight_bytes * self.weight_byte_seconds

    def host_seconds(self, work: PassWork) -> float:
        """Host time of a pass."""
        return (
            work.launches * self.launch_seconds
            + work.quantized_calls * self.quantized_call_seconds
            + work.lora_calls * self.lora_call_seconds
            + work.liger_calls * self.liger_call_seconds
            + work.selected_launches * self.selected_launch_seconds
            + work.eager_layers * self.eager_layer_seconds
            + work.compiled_layers * self.compiled_layer_seconds
            + work.compiled_calls * self.compiled_call_seconds
        )

    def optimizer_seconds(self, work: StepWork, *, host_slower: float = 1.0) -> float:
        """Time of an optimizer step."""
        moved = work.optimizer_bytes * self.optimizer_byte_seconds
        return moved + work.optimizer_calls * self.optimizer_call_seconds * host_slower

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Rates:
        """Read the JSON form; files written before wide heads were told apart have one rate for both.

        Raises:
            InputError: the JSON is not a set of rates.
        """
        wide = "wide_masked_attention_flop_seconds"
        try:
            return cls(
                **{
                    **values,
                    wide: values.get(wide, values["masked_attention_flop_seconds"]),
                    "record_ids": tuple(values["record_ids"]),
                }
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"not throughput rates: {error}") from error


def overlapped(gpu_seconds: float, host_seconds: float) -> float:
    """Time of a micro-step: the larger of both, and more where they are alike and wait for each other."""
    larger, smaller = max(gpu_seconds, host_seconds), min(gpu_seconds, host_seconds)
    if not larger:
        return 0.0
    return float(larger * (1.0 + (smaller / larger) ** OVERLAP) ** (1.0 / OVERLAP))


def beside_copies(gpu_seconds: Any, copy_seconds: Any) -> Any:
    """Time of the GPU's work and of copies to the host beside it, of floats or of arrays of them."""
    both, apart = gpu_seconds + copy_seconds, abs(gpu_seconds - copy_seconds)
    larger, smaller = (both + apart) / 2, (both - apart) / 2
    return larger + NOT_HIDDEN * smaller


class MicroStepTime(NamedTuple):
    """Seconds of a micro-step, and what most of it waits for: "compute", "bandwidth" or "launches"."""

    seconds: float
    bound_by: str


def micro_step_time(
    rates: Rates, work: StepWork, *, slower: float = 1.0, host_slower: float = 1.0
) -> MicroStepTime:
    """Time of a micro-step; `slower` is a factor on matrix work, `host_slower` on the host's.

    The host waits for the GPU between forward and backward: TRL reads the loss's token accuracy there
    (trl/trainer/sft_trainer.py:1643-1644).
    """
    seconds = rates.micro_step_seconds * host_slower
    matrix = moved = host = 0.0
    for part in (work.forward, work.backward):
        computed, written = rates.gpu_seconds(part, single=work.single)
        computed *= slower
        copied = work.offloaded_bytes * rates.offloaded_byte_seconds
        written += beside_copies(computed + written, copied) - (computed + written)
        launched = rates.host_seconds(part) * host_slower
        seconds += overlapped(computed + written, launched)
        matrix, moved, host = matrix + computed, moved + written, host + launched
    if host >= matrix + moved:
        return MicroStepTime(seconds, "launches")
    return MicroStepTime(seconds, "compute" if matrix >= moved else "bandwidth")


@lru_cache(maxsize=1)
def known_rates() -> tuple[Rates, ...]:
    """All rates on this machine, the user's own first.

    Raises:
        InputError: a file cannot be read.
    """
    found = []
    for folder in (user_data_dir(), PROFILES):
        for path in sorted((folder / "calibration" / "throughput").glob("*.json")):
            found.append(read_json(path, Rates.from_dict))
    return tuple(found)


def rates_for(gpu: GpuSpec) -> Rates | None:
    """The rates fitted on that GPU; None if there are none."""
    return next((rates for rates in known_rates() if rates.gpu == gpu.id), None)


_NOTHING_MEASURED = Slowdown(**dict.fromkeys((field.name for field in fields(Slowdown)), None))


def scaled_rates(gpu: GpuSpec, reference: GpuSpec, rates: Rates) -> Rates | None:
    """Rates of a GPU whose training nobody has measured: the reference's efficiencies at this one's rates.

    Each kind of work scales with what microbenchmarks of both GPUs reached. Where one has none, matrix work
    scales with the rate of a large matmul if that was measured on both (0.61 to 1.13 of the published rate
    over the cards of profiles/gpus.toml), else with the published rate; traffic with the published bandwidth;
    the host is taken to be alike. None where a rate is unknown.
    """
    slower = measured_slowdown(gpu, reference)
    matrix = slower.matrix if slower and slower.matrix else _published_matrix(gpu, reference)
    traffic = slower.elementwise if slower and slower.elementwise else _published_traffic(gpu, reference)
    if matrix is None or traffic is None:
        return None
    found = slower or _NOTHING_MEASURED
    launch = host_slower(microbenchmarks_of(gpu.id), rates) or found.launch or 1.0
    call = launch if rates.host_block_seconds else found.quantized_call or launch
    factors = {
        "layer_flop_seconds": matrix,
        "attention_flop_seconds": found.attention or matrix,
        "masked_attention_flop_seconds": found.attention or matrix,
        "wide_masked_attention_flop_seconds": found.attention or matrix,
        "head_flop_seconds": matrix,
        "adapter_flop_seconds": found.adapter or matrix,
        "single_flop_seconds": found.single or matrix,
        "written_byte_seconds": traffic,
        "weight_byte_seconds": found.dequantized or traffic,
        "offloaded_byte_seconds": found.host_copy or 1.0,
        "optimizer_byte_seconds": traffic,
        "launch_seconds": launch,
        "quantized_call_seconds": call,
        "lora_call_seconds": call,
        "liger_call_seconds": launch,
        "selected_launch_seconds": launch,
        "eager_layer_seconds": launch,
        "compiled_layer_seconds": launch,
        "compiled_call_seconds": call,
        "micro_step_seconds": launch,
        "optimizer_call_seconds": launch,
    }
    values = rates.to_dict() | {"gpu": gpu.id}
    if rates.host_block_seconds is not None:
        values["host_block_seconds"] = launch * rates.host_block_seconds
    for name, factor in factors.items():
        values[name] *= factor
    return Rates.from_dict(values)


def host_slower(measured: Microbenchmarks | None, rates: Rates) -> float | None:
    """How many times as long as the rates' host the measured one takes for the eager block of
    microbenchmarks; None where either is not known.
    """
    if measured is None or rates.host_block_seconds is None:
        return None
    return measured.eager_block_seconds / rates.host_block_seconds


def measured_slowdown(gpu: GpuSpec, reference: GpuSpec) -> Slowdown | None:
    """What microbenchmarks say of two GPUs; None where one has none."""
    mine, theirs = microbenchmarks_of(gpu.id), microbenchmarks_of(reference.id)
    return None if mine is None or theirs is None else slowdown(mine, theirs)


def _published_matrix(gpu: GpuSpec, reference: GpuSpec) -> float | None:
    peaks = (gpu.measured_matrix_flops_per_second, reference.measured_matrix_flops_per_second)
    if None in peaks:
        peaks = (gpu.matrix_flops_per_second, reference.matrix_flops_per_second)
    return None if peaks[0] is None or peaks[1] is None else peaks[1] / peaks[0]


def _published_traffic(gpu: GpuSpec, reference: GpuSpec) -> float | None:
    rates = (gpu.bandwidth_bytes_per_second, reference.bandwidth_bytes_per_second)
    return None if rates[0] is None or rates[1] is None else rates[1] / rates[0]
