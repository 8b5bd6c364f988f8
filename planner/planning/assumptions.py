"""Everything of a plan that was chosen without being asked, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator

from planner.answers.plan import DataSummary, Schedule
from planner.gpus.target import GpuTarget
from planner.planning.choosing import Chosen
from planner.setup import defaults
from planner.setup.cuda_allocator import EXPANDABLE, EXPANDABLE_SETTING, NATIVE, VARIABLE, planned_allocator
from planner.setup.objective import SFT
from planner.setup.parallelism import DDP, FSDP
from planner.setup.request import DEFAULT_EFFECTIVE_BATCH_SIZE, DEFAULT_RANK, PlanRequest
from planner.setup.training_setup import TrainingSetup

_MEMORY_OF = {
    EXPANDABLE: (
        f"memory with torch's expandable segments, which the launcher sets: {VARIABLE}={EXPANDABLE_SETTING}"
    ),
    NATIVE: "memory with torch's default allocator, which a run started here has",
}


_WAYS = {DDP: "DDP: every GPU holds all of the model", FSDP: "FSDP2: GPUs share the model's weights"}


def assumptions(
    request: PlanRequest,
    target: GpuTarget,
    setup: TrainingSetup,
    schedule: Schedule,
    data: DataSummary | None,
    chosen: Chosen,
) -> tuple[str, ...]:
    """The sentences, in the order of the setup's knobs."""
    found = list(target.notes)
    fixed = request.fixed
    if setup.num_processes > 1 and "distributed" not in fixed:
        found.append(f"{_WAYS[setup.distributed or DDP]}, chosen among one GPU, DDP and FSDP2")
    if "max_length" not in fixed:
        found.append(_length(setup, data))
    if setup.uses_lora and "lora_r" not in fixed:
        found.append(_rank(setup, chosen, data))
    found += _batch(request, setup, schedule)
    if "dtype" not in fixed and setup.dtype == "float16":
        found.append(f"float16, because {target.spec.name} only emulates bfloat16")
    if request.learning_rate is None:
        by = (
            "method and model size" if setup.objective.rates is None else f"method, as TRL shows {setup.task}"
        )
        found.append(f"learning rate {schedule.learning_rate:g} by {by}")
    found.append(_MEMORY_OF[planned_allocator()])
    if setup.objective is not SFT:
        found.append("every sequence is full, none of it a prompt's; time is for one million tokens")
        return tuple(found)
    if data is None:
        found.append("every sequence is full; time is for one million tokens (--data for yours)")
        return tuple(found)
    if data.estimated:
        found.append("token counts are estimated from the text's size, at 4 bytes a token")
    elif data.longest < setup.max_length and not setup.packing:
        found.append(f"memory is for the longest example, {data.longest:,} tokens")
    if request.num_train_epochs is None:
        found.append(f"{schedule.num_train_epochs:g} epochs, the usual number")
    return tuple(found)


def _length(setup: TrainingSetup, data: DataSummary | None) -> str:
    if data is None:
        return f"length {setup.max_length:,} tokens: no data was given"
    share = data.truncated_tokens / data.total_tokens
    lost = f"{data.truncated_tokens:,} tokens ({share:.2%}) of the rest are cut"
    if data.covered_percent < defaults.COVERAGE_PERCENT:
        return (
            f"length {setup.max_length:,} tokens, which covers {data.covered_percent:.3g}% of the examples: "
            f"{defaults.COVERAGE_PERCENT:g}% do not fit; {lost}"
        )
    text = f"length {setup.max_length:,} tokens, to cover {defaults.COVERAGE_PERCENT:g}% of the examples"
    return f"{text}; {lost}" if data.truncated_tokens else text


def _rank(setup: TrainingSetup, chosen: Chosen, data: DataSummary | None) -> str:
    rank = f"rank {setup.lora_r}"
    if setup.lora_r < DEFAULT_RANK:
        return f"{rank}: adapters on all experts at rank {DEFAULT_RANK}, the usual start, do not fit"
    if data is None:
        return f"{rank}, the usual start"
    if chosen.wished_rank > setup.lora_r:
        return f"{rank}: the data would fill rank {chosen.wished_rank}, which does not fit or is slower"
    if setup.lora_r > DEFAULT_RANK:
        return f"{rank}, for the adapter to hold what the data says ({defaults.RANK_RULE})"
    return f"{rank}, the usual start, which holds what the data says ({defaults.RANK_RULE})"


def _batch(request: PlanRequest, setup: TrainingSetup, schedule: Schedule) -> Iterator[str]:
    asked, usual = schedule.effective_batch_size, request.effective_batch_size is None
    if schedule.examples_per_row is not None:
        rows = setup.effective_batch_size
        why = ", the usual number is 16" if usual else f", {request.effective_batch_size} were asked for"
        each = "row" if rows == 1 else "rows"
        yield f"about {asked} examples a step: {rows} {each} of {schedule.examples_per_row:.3g}{why}"
    elif usual and asked != DEFAULT_EFFECTIVE_BATCH_SIZE:
        yield f"effective batch {asked}: what the fixed batch and accumulation give"
    elif usual:
        yield f"effective batch {asked}, the usual one"
