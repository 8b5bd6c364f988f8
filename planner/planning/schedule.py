"""What a chosen setup comes to over a run: its schedule, what it makes of the data, and the time it takes."""

from __future__ import annotations

from planner.answers.plan import DataSummary, Duration, Schedule
from planner.gpus.target import GpuTarget
from planner.models.spec import ModelSpec
from planner.planning.choosing import epochs
from planner.search.evaluator import Candidate
from planner.setup import defaults
from planner.setup.request import PlanRequest
from planner.setup.training_setup import TrainingSetup
from planner.throughput.epoch import Examples

TOKENS_WITHOUT_DATA = 1_000_000


def make_schedule(
    request: PlanRequest,
    setup: TrainingSetup,
    model: ModelSpec,
    examples: Examples | None,
    wished: int,
) -> Schedule:
    """The schedule; `wished` is the effective batch that was asked for, in examples."""
    rate, effective, per_row = request.learning_rate, wished, None
    if setup.packing and examples is not None:
        per_row = examples.examples_per_row(setup)
        effective = max(1, round(setup.effective_batch_size * per_row))
    return Schedule(
        effective_batch_size=effective,
        learning_rate=defaults.learning_rate(setup.method, model, setup.objective)
        if rate is None
        else float(rate),
        num_train_epochs=epochs(request),
        lr_scheduler_type=defaults.LR_SCHEDULER_TYPE,
        warmup_ratio=defaults.WARMUP_RATIO,
        examples_per_row=per_row,
    )


def summarise_data(path: str, examples: Examples, setup: TrainingSetup) -> DataSummary:
    """What the setup's length and batches make of the data.

    Raises:
        InputError: none of it has a token to learn within the length.
    """
    stats = examples.stats
    cut = stats.truncation(setup.max_length)
    return DataSummary(
        path=path,
        format=stats.data_format,
        examples=stats.examples,
        total_tokens=stats.total_tokens,
        longest=stats.longest,
        percentile_99=stats.percentile(99.0),
        covered_percent=100.0 * (stats.examples - cut.examples) / stats.examples,
        truncated_examples=cut.examples,
        truncated_tokens=cut.tokens,
        processed_tokens=examples.processed_tokens(setup),
        estimated=stats.estimated,
        untrained_examples=stats.masked(setup.max_length) + stats.untrained,
        left_out=stats.left_out,
        notes=(*stats.not_trained(setup.max_length), *stats.notes),
    )


def make_duration(
    best: Candidate, schedule: Schedule, target: GpuTarget, price: float | None
) -> Duration | None:
    """Time and price of the run; of a million tokens in full sequences where the data is not known."""
    if best.speed is None:
        return None
    from planner.gpus.price import hours_for, run_cost

    compiling = best.speed.compile_seconds / 3600
    epoch = best.epoch
    if epoch is None:
        of, tokens, steps, rates = "one million tokens", TOKENS_WITHOUT_DATA, None, None
        speeds = (
            best.speed.tokens_per_second,
            best.speed.tokens_per_second_high,
            best.speed.tokens_per_second_low,
        )
        hours, low, high = (hours_for(tokens, speed) + compiling for speed in speeds)
    else:
        passes = schedule.num_train_epochs
        of, tokens = "the data", round(epoch.real_tokens * passes)
        steps = max(1, round(epoch.steps * passes))
        spent = (epoch.seconds, epoch.seconds_low, epoch.seconds_high)
        hours, low, high = (seconds * passes / 3600 + compiling for seconds in spent)
        rates = tuple(epoch.real_tokens / seconds for seconds in spent)
    cost = run_cost(hours, target.spec, gpu_count=best.setup.num_processes, usd_per_gpu_hour=price)
    return Duration(
        of=of,
        tokens=tokens,
        steps=steps,
        hours=hours,
        hours_low=low,
        hours_high=high,
        usd_per_gpu_hour=None if cost is None else cost.usd_per_gpu_hour,
        usd=None if cost is None else cost.usd,
        useful_tokens_per_second=None if rates is None else rates[0],
    )
