"""Whether a record that somebody sends can be so, and how it lies beside what is expected of its setup."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from planner.base.errors import InputError, NotModelledError
from planner.base.values import dataclass
from planner.calibration.exchange import is_public
from planner.calibration.records import RunRecord
from planner.gpus.catalog import MEMORY_TOLERANCE, gpu_catalog
from planner.gpus.spec import GpuSpec
from planner.memory.estimate import estimate_memory
from planner.models.catalog import catalog_id, load_shipped
from planner.models.spec import ModelSpec
from planner.setup.run import TrainingRun
from planner.throughput.roofline import forecast

STEADY_FROM = 2
"""Steps that a rate leaves out: the first ones load kernels."""
RATE_TOLERANCE = 0.25
"""How far a rate may be from what its own steps take: those of the run vary."""
WORST_ALLOCATED = 0.0222
"""The largest held-out error of allocated bytes (`vramwise accuracy`); a larger one has a reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """A measured figure beside what is expected of the setup on that card, in its unit."""

    figure: str
    expected: float
    measured: float

    @property
    def error(self) -> float:
        """How much more is expected than was measured, as a share."""
        return self.expected / self.measured - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedRecord:
    """A record with what cannot be so (`faults`: none makes it plausible), what is worth a look, and its
    figures beside the expected ones (none where its rows may be shorter than its length).

    `is_fitted` says that it is of the kind that coefficients and rates are fitted to.
    """

    id: str
    gpu: str
    model: str
    faults: tuple[str, ...]
    looks: tuple[str, ...]
    figures: tuple[Beside, ...]
    is_fitted: bool


def check_record(record: RunRecord) -> CheckedRecord:
    """Check one record."""
    here, setup = record.environment, record.setup
    gpu, model = _gpu(record), _model(record)
    faults = faults_of(record)
    figures = () if faults or gpu is None or model is None else tuple(_beside(record, model, gpu))
    return CheckedRecord(
        id=record.id,
        gpu=here.gpu_id,
        model=setup.model,
        faults=faults,
        looks=tuple(_looks(record, gpu, figures)),
        figures=figures,
        is_fitted=record.fills_its_length and record.outcome == "ok" and setup.num_processes == 1,
    )


def faults_of(record: RunRecord) -> tuple[str, ...]:
    """What of a record cannot be so."""
    found = [*_bytes(record), *_rates(record), *_card(record, _gpu(record))]
    model = _model(record)
    if model is None:
        found.append(f"model {record.setup.model!r:.40}: not in the catalog")
    elif model.parameter_count != record.model_parameter_count:
        stated = f"model_parameter_count {record.model_parameter_count:,}"
        found.append(f"{stated}: {model.id} has {model.parameter_count:,}")
    return tuple(found)


def _gpu(record: RunRecord) -> GpuSpec | None:
    return gpu_catalog().match_driver(record.environment.gpu_name, record.environment.total_bytes)


def _model(record: RunRecord) -> ModelSpec | None:
    known = catalog_id(record.setup.model)
    return None if known is None else load_shipped(known)


def _bytes(record: RunRecord) -> Iterator[str]:
    """What of the bytes contradicts itself."""
    total = record.environment.total_bytes
    if not record.phases:
        yield "no phase was measured"
    for phase in record.phases:
        if phase.allocated_bytes > phase.reserved_bytes:
            yield f"{phase.name}: more allocated than reserved"
        if phase.process_bytes is not None and record.isolated and phase.reserved_bytes > phase.process_bytes:
            yield f"{phase.name}: more reserved than the driver shows"
        if max(phase.reserved_bytes, phase.process_bytes or 0) > total:
            yield f"{phase.name}: more than the card has"
        if record.memory_cap_bytes is not None and phase.reserved_bytes > record.memory_cap_bytes:
            yield f"{phase.name}: more reserved than the cap of the allocator"
    step = record.phase("step")
    if step is not None and step.allocated_bytes < record.weights_bytes:
        yield "step: less allocated than the weights"
    if record.outcome == "ok" and step is None:
        yield "no step was measured"


def _rates(record: RunRecord) -> Iterator[str]:
    """What of the times contradicts itself."""
    if any(seconds <= 0 for seconds in (*record.step_seconds, *record.update_seconds)):
        yield "a step took no time"
        return
    rate, steady = record.tokens_per_second, record.step_seconds[STEADY_FROM:]
    if rate is None or not steady or not record.fills_its_length:
        return
    setup = record.setup
    tokens = setup.max_length * setup.effective_batch_size
    own = tokens / statistics.median(steady)
    if abs(rate / own - 1) > RATE_TOLERANCE:
        yield f"tokens_per_second {rate:,.0f}: its steps of {tokens:,} tokens make it {own:,.0f}"


def _card(record: RunRecord, gpu: GpuSpec | None) -> Iterator[str]:
    """What of the card is not the catalog's."""
    here = record.environment
    if gpu is None:
        named = next((one for one in gpu_catalog() if one.id == here.gpu_id), None)
        if named is not None:
            yield (
                f"gpu_id {here.gpu_id}: {here.gpu_name} with {here.total_bytes:,} bytes is not that card "
                f"(within {MEMORY_TOLERANCE:.0%})"
            )
        return
    if gpu.id != here.gpu_id:
        yield f"gpu_id {here.gpu_id}: {here.gpu_name} is {gpu.id}"
    if gpu.compute_capability != here.compute_capability:
        asked, known = (".".join(map(str, one)) for one in (here.compute_capability, gpu.compute_capability))
        yield f"compute_capability {asked}: {gpu.id} has {known}"


def _beside(record: RunRecord, model: ModelSpec, gpu: GpuSpec) -> Iterator[Beside]:
    """Figures of a step whose rows were as long as the setup says."""
    step = record.phase("step")
    if step is None or not record.fills_its_length:
        return
    run = TrainingRun(setup=record.setup.replace(model=model.id), model=model, padded=record.padded)
    try:
        expected = estimate_memory(run, gpu=gpu, allocator=record.allocator)
    except NotModelledError:
        return
    yield Beside(figure="allocated", expected=expected.allocated_bytes, measured=step.allocated_bytes)
    yield Beside(figure="reserved", expected=expected.reserved_bytes, measured=step.reserved_bytes)
    if step.process_bytes is not None and record.isolated:
        yield Beside(figure="process", expected=expected.process_bytes, measured=step.process_bytes)
    speed = forecast(run, gpu)
    if speed is not None and record.tokens_per_second:
        yield Beside(figure="tokens/s", expected=speed.tokens_per_second, measured=record.tokens_per_second)


def _looks(record: RunRecord, gpu: GpuSpec | None, figures: tuple[Beside, ...]) -> Iterator[str]:
    """What no rule forbids, and a person should see."""
    if gpu is None:
        yield f"{record.environment.gpu_name} is not in the catalog: CONTRIBUTING.md says what a card needs"
    if not is_public(record):
        yield "it is not in the form that `vramwise records export` writes"
    if not record.fills_its_length:
        yield "its rows may be shorter than max_length: it is compared, and nothing is fitted to it"
    for one in figures:
        if one.figure == "allocated" and abs(one.error) > WORST_ALLOCATED:
            yield f"allocated is {one.error:+.1%} off, beyond any run so far: another release, or other rows?"


def read_for_check(values: object) -> RunRecord:
    """A record of JSON.

    Raises:
        InputError: it is not one.
    """
    if not isinstance(values, dict):
        raise InputError("not a run record: not a JSON object")
    return RunRecord.from_dict(values)
