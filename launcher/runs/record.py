"""What a run's events measured: its phases, and the RunRecord made of them. Light: no torch."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from launcher.runs.attempts import read_attempts
from launcher.runs.events import StartEvent
from launcher.runs.folder import RunFolder
from launcher.runs.summary import RunSummary, summarize
from planner.answers.plan import Plan
from planner.base.data_files import user_data_dir, write_atomically
from planner.base.errors import InputError
from planner.calibration.records import Environment, MeasuredPhase, Predicted, RunRecord, append_record
from planner.gpus.catalog import gpu_catalog
from planner.setup.cuda_allocator import NATIVE

RECORDS_FILE = "train.jsonl"


def read_plan(folder: RunFolder) -> Plan | None:
    """The run's plan; None for a job made by hand.

    Raises:
        InputError: plan.json is not a plan.
    """
    try:
        values = json.loads(folder.plan.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder.plan}: not a readable plan ({error})") from error
    return Plan.from_dict(values)


def whole_plan(folder: RunFolder) -> Plan | None:
    """A run's plan; None for a job made by hand, or where the file is damaged."""
    try:
        return read_plan(folder)
    except InputError:
        return None


def store_record(folder: RunFolder, outcome: str, summary: RunSummary | None = None) -> RunRecord | None:
    """Write record.json and add the record to the person's own; None when the run was not on a GPU.

    Raises:
        InputError: plan.json is not a plan.
    """
    record = make_record(folder, outcome, summary)
    if record is not None:
        write_atomically(folder.record, json.dumps(record.to_dict(), indent=2) + "\n")
        append_record(user_data_dir() / "runs" / RECORDS_FILE, record)
    return record


def make_record(folder: RunFolder, outcome: str, summary: RunSummary | None = None) -> RunRecord | None:
    """Make the record of a run from its files; None when it was not on a GPU or measured nothing.

    `summary` is that of the events, where they have been read already.

    Raises:
        InputError: plan.json is not a plan.
    """
    found = summarize(folder.events) if summary is None else summary
    start = found.start
    phases = tuple(
        MeasuredPhase(
            name=name,
            allocated_bytes=event.allocated_bytes,
            reserved_bytes=event.reserved_bytes,
            process_bytes=event.process_bytes,
        )
        for name, event in found.memory.items()
        if event.allocated_bytes is not None and event.reserved_bytes is not None
    )
    environment = None if start is None else _environment(start)
    if start is None or environment is None or not phases:
        return None
    weights, context = start.environment.get("weights_bytes"), start.environment.get("context_bytes")
    plan = read_plan(folder)
    if not isinstance(weights, int) or not isinstance(context, int) or plan is None:
        return None
    attempts = read_attempts(folder.attempts)
    setup = attempts[-1].setup if attempts else folder.read_job().setup
    return RunRecord(
        id=folder.path.name,
        created=datetime.fromtimestamp(start.time, UTC).isoformat(timespec="seconds"),
        source="train",
        setup=setup,
        model_parameter_count=plan.model.parameter_count,
        environment=environment,
        outcome=outcome,
        weights_bytes=weights,
        context_bytes=context,
        phases=phases,
        step_seconds=tuple(found.step_seconds.kept),
        tokens_per_second=found.tokens_per_second,
        predicted=_predicted(plan) if setup == plan.setup else None,
        allocator=str(start.environment.get("allocator", NATIVE)),
        ranks=_each_rank(found, setup.num_processes),
        padded=setup.per_device_train_batch_size > 1 and not setup.packing,
        first_step_seconds=found.first_step_seconds,
    )


def _each_rank(found: RunSummary, count: int) -> tuple[tuple[MeasuredPhase, ...], ...]:
    """Each rank's own phases, where there are several and all were told."""
    told = [(name, event.ranks) for name, event in found.memory.items() if len(event.ranks) == count]
    if count == 1 or not told:
        return ()
    return tuple(
        tuple(
            MeasuredPhase(
                name=name,
                allocated_bytes=ranks[str(rank)][0],
                reserved_bytes=ranks[str(rank)][1],
                process_bytes=ranks[str(rank)][2] if ranks[str(rank)][2] >= 0 else None,
            )
            for name, ranks in told
        )
        for rank in range(count)
    )


def _environment(start: StartEvent) -> Environment | None:
    facts = start.environment
    name, capability, total = (facts.get(key) for key in ("device", "compute_capability", "gpu_total_bytes"))
    if not isinstance(name, str) or not isinstance(capability, str) or not isinstance(total, int):
        return None
    major, _, minor = capability.partition(".")
    gpu = gpu_catalog().match_driver(name, total)
    known = ("device", "python", "cuda", "cpu_threads", "compute_capability", "allocator")
    versions = tuple(
        (key, value) for key, value in facts.items() if key not in known and isinstance(value, str)
    )
    return Environment(
        gpu_name=name,
        gpu_id=name if gpu is None else gpu.id,
        compute_capability=(int(major), int(minor)),
        total_bytes=total,
        driver=f"CUDA {facts.get('cuda')}",
        python=str(facts.get("python")),
        versions=versions,
    )


def _predicted(plan: Plan) -> Predicted:
    memory = plan.memory
    return Predicted(
        allocated_bytes=memory.allocated_bytes,
        reserved_bytes=memory.reserved_bytes,
        process_bytes=memory.process_bytes,
        process_upper_bytes=memory.process_upper_bytes,
        coefficients=memory.basis.coefficients,
    )
