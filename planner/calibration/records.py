"""RunRecord: what one run was measured to need, with its environment; and the store of records.

Records are facts: they are appended, never edited. Shipped ones lie in profiles/runs, a user's own in the
user data folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from planner.base import validate
from planner.base.data_files import PROFILES, user_data_dir
from planner.base.errors import FieldError, InputError
from planner.base.values import dataclass
from planner.models.spec import ModelSpec
from planner.setup.cuda_allocator import ALLOCATORS, NATIVE
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

RECORD_SCHEMA_VERSION = 1
SOURCES = ("calibrate", "train")
OUTCOMES = ("ok", "oom")
MEASURED_PHASES = ("load", "step", "evaluation", "save")


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Where a run was measured. `gpu_id` is the catalog's id, `gpu_name` the driver's name.

    `versions` are (package, version) pairs of the training stack.
    """

    gpu_name: str
    gpu_id: str
    compute_capability: tuple[int, int]
    total_bytes: int
    driver: str
    python: str
    versions: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        validate.text("gpu_name", self.gpu_name)
        validate.integer("total_bytes", self.total_bytes, minimum=0, maximum=2**44)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredPhase:
    """Peak of a phase as measured; `process_bytes` is the driver's figure at its end, null when not read."""

    name: str
    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int | None

    def __post_init__(self) -> None:
        validate.choice("phase", self.name, MEASURED_PHASES)
        for field in ("allocated_bytes", "reserved_bytes"):
            validate.integer(field, getattr(self, field), minimum=0, maximum=2**44)


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """What the memory model said before the run, with the coefficients it used."""

    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int
    process_upper_bytes: int
    coefficients: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """One measured run.

    `id` names it, `created` is UTC in ISO form, `padded` whether batches mixed lengths, `random_weights`
    whether the weights were random (same memory and speed). `weights_bytes` is allocated after loading,
    `context_bytes` what the driver showed above reserved memory after CUDA's start. `step_seconds` are
    optimizer steps in order, `update_seconds` what of each came after its last backward pass (none where not
    timed); `tokens_per_second` is steady state, from the third step on. `memory_cap_bytes`
    is the limit torch's allocator was given, null for none; `isolated` whether the run had a process alone.
    `lengths` are the (tokens, examples) of the data where a measured run had real lengths: then
    `tokens_per_second` counts padding too, and `useful_tokens_per_second` the examples' own tokens.
    `allocator` is torch's, as planner/setup/cuda_allocator.py names it. `host_block_seconds` is how long the
    host took, around the run, for what microbenchmarks call the eager block (null: not timed). `tf32` says
    that products in float32 could use it, as the launcher lets them. Of a run on several GPUs `phases` has
    the largest figures of all, `ranks` each GPU's own, and rates are those of all together.
    `first_step_seconds` is the wait from the beginning of training to the end of its first step, with what is
    compiled and compared before it (null: not timed).
    """

    id: str
    created: str
    source: str
    setup: TrainingSetup
    model_parameter_count: int
    environment: Environment
    outcome: str
    weights_bytes: int
    context_bytes: int
    phases: tuple[MeasuredPhase, ...]
    step_seconds: tuple[float, ...]
    tokens_per_second: float | None
    predicted: Predicted | None
    padded: bool = False
    random_weights: bool = False
    isolated: bool = True
    memory_cap_bytes: int | None = None
    update_seconds: tuple[float, ...] = ()
    lengths: tuple[tuple[int, int], ...] = ()
    useful_tokens_per_second: float | None = None
    allocator: str = NATIVE
    host_block_seconds: float | None = None
    tf32: bool = True
    ranks: tuple[tuple[MeasuredPhase, ...], ...] = ()
    first_step_seconds: float | None = None
    schema_version: int = RECORD_SCHEMA_VERSION

    def __post_init__(self) -> None:
        validate.text("record id", self.id)
        validate.choice("source", self.source, SOURCES)
        validate.choice("outcome", self.outcome, OUTCOMES)
        validate.choice("allocator", self.allocator, ALLOCATORS)
        if self.schema_version != RECORD_SCHEMA_VERSION:
            raise FieldError("schema_version", self.schema_version, str(RECORD_SCHEMA_VERSION))

    @property
    def fills_its_length(self) -> bool:
        """Whether every row was known to be as long as the setup says, so that models can be fitted. Packed
        rows are, whatever their examples' lengths.
        """
        return self.source == "calibrate" and (self.setup.packing or not self.lengths)

    def run(self, model: ModelSpec) -> TrainingRun:
        """What was measured, on the model that the setup names."""
        return TrainingRun(setup=self.setup, model=model, padded=self.padded)

    def phase(self, name: str) -> MeasuredPhase | None:
        """A measured phase by name; None when it was not measured."""
        return next((phase for phase in self.phases if phase.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "setup": self.setup.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunRecord:
        """Read the JSON form.

        Raises:
            InputError: the JSON is not a run record.
        """
        try:
            rest = dict(values)
            environment = dict(rest.pop("environment"))
            environment["versions"] = tuple((k, v) for k, v in environment["versions"])
            environment["compute_capability"] = tuple(environment["compute_capability"])
            predicted = rest.pop("predicted")
            return cls(
                setup=TrainingSetup.from_dict(rest.pop("setup")),
                environment=Environment(**environment),
                phases=tuple(MeasuredPhase(**phase) for phase in rest.pop("phases")),
                step_seconds=tuple(rest.pop("step_seconds")),
                lengths=tuple((length, count) for length, count in rest.pop("lengths", ())),
                update_seconds=tuple(rest.pop("update_seconds", ())),
                ranks=tuple(
                    tuple(MeasuredPhase(**phase) for phase in rank) for rank in rest.pop("ranks", ())
                ),
                predicted=Predicted(**predicted) if predicted is not None else None,
                **rest,
            )
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"not a run record: {error}") from error


def record_folders() -> tuple[Path, ...]:
    """Folders of records: the shipped ones, then the user's."""
    return (PROFILES / "runs", user_data_dir() / "runs")


def append_record(path: Path, record: RunRecord) -> None:
    """Append one record in one write, so that a crash leaves whole lines only."""
    line = json.dumps(record.to_dict(), separators=(",", ":"), allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_records(path: Path) -> Iterator[RunRecord]:
    """Records of one file; a last line without its end (a crash while writing) is left out.

    Raises:
        InputError: a line is not a record; the message names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from error
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            yield RunRecord.from_dict(json.loads(line))
        except (ValueError, InputError) as error:
            raise InputError(f"{path} line {number}: {error}") from error


def all_records() -> tuple[RunRecord, ...]:
    """Every record that is shipped or the user's own, each id once."""
    found: dict[str, RunRecord] = {}
    for folder in record_folders():
        if folder.is_dir():
            for path in sorted(folder.glob("*.jsonl")):
                for record in read_records(path):
                    found.setdefault(record.id, record)
    return tuple(found.values())
