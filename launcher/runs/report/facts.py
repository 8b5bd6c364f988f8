"""RunReport: what became of a run, gathered from its folder. Light: no torch."""

from __future__ import annotations

import dataclasses
import heapq
import json
import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from launcher.runs import supervisor
from launcher.runs.attempts import read_attempts
from launcher.runs.ends import RUN_ENDS
from launcher.runs.events import Event, MemoryEvent, iter_events
from launcher.runs.folder import RunFolder
from launcher.runs.kept import checkpoints
from launcher.runs.record import read_plan
from launcher.runs.report.advice import Advice, Adviser
from launcher.runs.report.history import AttemptSpan, History
from launcher.runs.report.serving import vllm_rank, vllm_refusal
from launcher.runs.summary import RunSummary
from launcher.runs.training_job import TrainingJob
from planner.answers.plan import Plan
from planner.base.errors import InputError
from planner.memory.breakdown import PHASES
from planner.setup.adapters import UNCOMMON

REPORT_VERSION = 1
ALIVE = ("created", "starting", "running", "stopping")


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseFigures:
    """One figure of one phase: `what` is "allocated" or "reserved" (torch's allocator) or "driver" (what the
    driver shows), on the CPU "process" (resident memory, which no plan predicts).
    """

    phase: str
    what: str
    predicted_bytes: int
    measured_bytes: int | None
    comparable: bool

    @property
    def error(self) -> float | None:
        """How much more was predicted than measured, as a share; None where the two are not comparable."""
        if not self.comparable or not self.measured_bytes:
            return None
        return self.predicted_bytes / self.measured_bytes - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationFigures:
    """An evaluation: after which step, and its loss."""

    step: int
    loss: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFigures:
    """A checkpoint that is on disk."""

    step: int
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NextStep:
    """What to do with what is there, and the line to type."""

    what: str
    command: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """The facts of a run, as report.json has them and report.md and the terminal show them.

    `seconds` is how long its processes lived, `steps` counts optimizer steps, `tokens` real tokens. Losses
    are means over the log's steps. `adapter_step` is the step whose weights are saved, the best evaluation's
    where there is evaluation. Rates are tokens a second, predicted for the plan's card. Null: unknown.
    """

    run: str
    folder: str
    state: str
    meaning: str
    reason: str
    model: str | None
    model_source: str | None
    data: str | None
    evaluation_data: str | None
    method: str | None
    setup: dict[str, Any] | None
    started: str | None
    seconds: float
    steps: int
    total_steps: int | None
    tokens: int | None
    first_loss: float | None
    last_loss: float | None
    lowest_loss: float | None
    lowest_loss_step: int | None
    evaluations: tuple[EvaluationFigures, ...]
    best_evaluation: EvaluationFigures | None
    adapter: str | None
    adapter_step: int | None
    checkpoints: tuple[CheckpointFigures, ...]
    memory: tuple[PhaseFigures, ...]
    predicted_tokens_per_second: float | None
    tokens_per_second: float | None
    gpu: str | None
    device: str | None
    data_notes: tuple[str, ...]
    warnings: tuple[str, ...]
    advice: tuple[str, ...]
    attempts: tuple[AttemptSpan, ...]
    next_steps: tuple[NextStep, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"version": REPORT_VERSION, **dataclasses.asdict(self)}


def run_report(folder: RunFolder, *, over: bool = False) -> tuple[RunReport, History]:
    """Gather the facts; the history has the loss curve. `over` says that there will be no further attempt
    though the keeper lives: it is the keeper that asks.

    Raises:
        InputError: the folder holds no job.
    """
    plan = plan_or_none(folder)
    history, summary, adviser = History(), RunSummary(), Adviser(plan)
    given: list[Advice] = []
    for event in heapq.merge(iter_events(folder.events), iter_events(folder.samples), key=_time):
        given += adviser.take(event)
        history.take(event)
        summary.take(event)
    status = supervisor.status(folder.path)
    if over and history.end is not None:
        status = dataclasses.replace(status, state=history.end.state, message=history.end.message)
    job = folder.read_job()
    lowest, best = history.lowest_loss, history.best_evaluation
    return (
        RunReport(
            run=folder.path.name,
            folder=str(folder.path),
            state=status.state,
            meaning=next((end.meaning for end in RUN_ENDS if end.state == status.state), ""),
            reason="" if status.state in ALIVE else status.message,
            **_what_was_asked(folder, job),
            started=_when(history.first_time),
            seconds=history.seconds,
            steps=status.step,
            total_steps=history.total_steps,
            tokens=history.tokens,
            first_loss=history.first_loss,
            last_loss=history.last_loss,
            lowest_loss=None if lowest is None else lowest[1],
            lowest_loss_step=None if lowest is None else lowest[0],
            evaluations=tuple(EvaluationFigures(step=e.step, loss=e.loss) for e in history.evaluations),
            best_evaluation=None if best is None else EvaluationFigures(step=best.step, loss=best.loss),
            adapter=str(folder.adapter) if folder.adapter.is_dir() else None,
            adapter_step=None if history.adapter is None else history.adapter.step,
            checkpoints=_checkpoints(folder),
            memory=() if plan is None else memory_figures(plan, summary.memory),
            predicted_tokens_per_second=None if plan is None else predicted_rate(plan),
            tokens_per_second=summary.tokens_per_second,
            gpu=None if plan is None else plan.gpu.spec.id,
            device=_text(history.environment.get("device")),
            data_notes=() if plan is None else _data_notes(plan),
            warnings=tuple(history.warnings),
            advice=tuple(advice.message for advice in given),
            attempts=tuple(history.spans()) if history.first_time is not None else (),
            next_steps=next_steps(folder, job, status.state),
        ),
        history,
    )


def _time(event: Event) -> float:
    return event.time


def predicted_rate(plan: Plan) -> float | None:
    """Forecast of the rate that events count: the data's own tokens; of full sequences without data."""
    if plan.duration is not None and plan.duration.useful_tokens_per_second is not None:
        # TRL leaves padding out of its count too, but for the little that packed rows have.
        return plan.duration.useful_tokens_per_second
    return None if plan.speed is None else plan.speed.tokens_per_second


def plan_or_none(folder: RunFolder) -> Plan | None:
    """The plan; None where there is none or it is damaged: a report is made all the same."""
    try:
        return read_plan(folder)
    except InputError:
        return None


def _what_was_asked(folder: RunFolder, job: TrainingJob) -> dict[str, Any]:
    try:
        attempts = read_attempts(folder.attempts)
    except InputError:
        attempts = []
    setup = attempts[-1].setup if attempts else job.setup
    split = job.eval_split
    part = (
        None if split is None else f"{split:.3g} of the data" if split < 1 else f"{split:g} of its examples"
    )
    return {
        "model": setup.model,
        "model_source": job.model_source,
        "data": job.data_path,
        "evaluation_data": job.eval_data_path or part,
        "method": setup.method,
        "setup": setup.to_dict(),
    }


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _checkpoints(folder: RunFolder) -> tuple[CheckpointFigures, ...]:
    """Those on disk, by step; a name that is not a checkpoint's is none."""
    root = folder.checkpoints
    return tuple(
        CheckpointFigures(step=step, path=str(checkpoints.path_of(root, step)))
        for step in checkpoints.steps(root)
    )


def memory_figures(plan: Plan, measured: dict[str, MemoryEvent]) -> tuple[PhaseFigures, ...]:
    """What was planned of each phase beside what was measured."""
    on_gpu = any(event.allocated_bytes is not None for event in measured.values())
    rows = []
    for phase in sorted(plan.memory.phases, key=lambda one: PHASES.index(one.name)):
        seen = measured.get(phase.name)
        shown = ("allocated", "reserved", "driver") if on_gpu else ("process",)
        for what in shown:
            name = f"{what if on_gpu and what != 'driver' else 'process'}_bytes"
            rows.append(
                PhaseFigures(
                    phase=phase.name,
                    what=what,
                    predicted_bytes=getattr(phase, name),
                    measured_bytes=None if seen is None else getattr(seen, name),
                    comparable=on_gpu,
                )
            )
    return tuple(rows)


def _data_notes(plan: Plan) -> tuple[str, ...]:
    """What of the data was cut, dropped, left out or has nothing to learn, as the plan counted it."""
    data = plan.data
    if data is None:
        return ()
    notes = list(data.notes)
    if data.truncated_tokens:
        notes.insert(
            0,
            f"{data.truncated_examples:,} of {data.examples:,} examples are longer than "
            f"{plan.setup.max_length:,} tokens: {data.truncated_tokens:,} tokens are cut or dropped",
        )
    if data.left_out:
        notes.append(f"keys of which nothing is made: {', '.join(data.left_out)}")
    return tuple(notes)


def next_steps(folder: RunFolder, job: TrainingJob, state: str) -> tuple[NextStep, ...]:
    """Lines to type, quoted for a shell."""
    runs, name = str(folder.path.parent), folder.path.name

    def line(*words: str) -> str:
        return shlex.join(words)

    found = []
    if state not in ("finished", *ALIVE) and _checkpoints(folder):
        found.append(
            NextStep(
                what="go on from the last checkpoint",
                command=line("vramwise", "runs", "resume", name, "--runs", runs),
            )
        )
    if any(getattr(job.setup, name) != usual for name, usual in UNCOMMON):
        return tuple(found)  # neither a merge nor vLLM takes what lies beside the adapter
    if folder.adapter.is_dir() and job.setup.uses_lora:
        found.append(
            NextStep(what="merge it into its base", command=line("vramwise", "merge", str(folder.path)))
        )
        if _served_unmerged(folder, job):
            found.append(
                NextStep(
                    what="serve it beside its base",
                    command=line(
                        *("vllm", "serve", job.model_source, "--enable-lora"),
                        *("--max-lora-rank", str(vllm_rank(job.setup.lora_r))),
                        *("--lora-modules", f"{name}={folder.adapter}"),
                    ),
                )
            )
    elif folder.adapter.is_dir():
        found.append(NextStep(what="serve it", command=line("vllm", "serve", str(folder.adapter))))
    return tuple(found)


def _served_unmerged(folder: RunFolder, job: TrainingJob) -> bool:
    """Whether vLLM is known to take the run's adapter as it is."""
    try:
        config = json.loads((folder.adapter / "adapter_config.json").read_text(encoding="utf-8"))
        on_experts = bool(config.get("target_parameters"))
    except (OSError, ValueError, AttributeError):
        on_experts = False
    refusal = vllm_refusal(
        use_dora=job.setup.use_dora, on_experts=on_experts, patterned=False, rank=job.setup.lora_r
    )
    return refusal is None
