"""Where every number of a sizing comes from: its formula, its source, the runs that it rests on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launcher.tui.sizing import Sizing
from launcher.tui.text import gib, size
from planner.answers.plan import Longest
from planner.gpus.spec import GpuSpec
from planner.memory.breakdown import REPLAYED
from planner.text.figures import dollars, duration, rate
from planner.text.speed import price_of


@dataclass(frozen=True, slots=True)
class Explained:
    """A number: what it is called on the screen, as it is shown, and where it comes from."""

    title: str
    figure: str
    source: str


def explained(sizing: Sizing, longest: Longest | None = None) -> tuple[Explained, ...]:
    """Every number of the screen."""
    return (*_memory(sizing), *_longest(longest), *_speed(sizing), *_run(sizing))


def _longest(found: Longest | None) -> Iterator[Explained]:
    if found is None:
        return
    ends = "the model's own window" if found.reaches_model_limit else "the last that fits, in steps of 64"
    yield Explained(
        "longest",
        f"{found.max_length:,} tokens",
        f"{ends}: the leanest setups that a search tries with this method, adapter and effective batch, "
        "replayed through torch's allocator, as by plan --longest; the speed is the fastest one's that fits",
    )


def _memory(sizing: Sizing) -> Iterator[Explained]:
    memory, card = sizing.memory, sizing.card
    for part in memory.components:
        if part.size_bytes:
            yield Explained(part.title, size(part.size_bytes), part.origin)
    peak, basis = memory.peak_phase, memory.basis
    how = (
        "whole steps replayed through torch's allocator"
        if basis.reserve == REPLAYED
        else "a fitted line, being replaced by a replay of torch's allocator"
    )
    yield Explained(
        "needs", gib(memory.peak_bytes, 2), f"the sum of the parts in the {peak.name} phase: {how}"
    )
    stacks = ", ".join(f"{name} {version}" for name, version in basis.stack_versions)
    measured = f"{basis.record_count:,} measured runs" if basis.record_count else "no run measured here"
    yield Explained(
        "at most",
        gib(memory.peak_upper_bytes, 2),
        f"the upper end of the interval, by how far predictions were off: {measured}, coefficients of "
        f"{basis.coefficients}" + (f" ({stacks})" if stacks else ""),
    )
    for phase in memory.phases:
        yield Explained(f"{phase.name} phase", size(phase.process_bytes), f"peak: {phase.peak_moment}")
    yield Explained(
        "allocated", size(memory.allocated_bytes), "what torch.cuda.max_memory_allocated will say"
    )
    yield Explained("reserved", size(memory.reserved_bytes), "what torch.cuda.max_memory_reserved will say")
    yield Explained("driver", size(memory.process_bytes), "what nvidia-smi will show for the process")
    yield Explained("usable", gib(card.usable_bytes, 2), _usable(sizing))


def _usable(sizing: Sizing) -> str:
    card = sizing.card
    spec: GpuSpec = card.spec
    told = f"the card's {gib(spec.memory_bytes, 2)} less what the driver keeps"
    return told + (f", and {card.held}" if card.held else "")


def _speed(sizing: Sizing) -> Iterator[Explained]:
    step = sizing.step
    if step is None:
        yield Explained("tokens/s", "-", sizing.no_step)
        return
    yield Explained(
        "tokens/s",
        rate(step.tokens_per_second),
        "tokens of a step over its seconds: the step's operations and bytes by kind of work over the card's "
        f"rates; {step.basis}",
    )
    yield Explained(
        "from, to",
        f"{rate(step.tokens_per_second_low)} to {rate(step.tokens_per_second_high)}",
        "the interval of such forecasts for "
        + ("a card that was measured" if step.calibrated else "cards that were not measured"),
    )
    yield Explained(
        "bound by",
        step.bound_by,
        f"at the published rates alone it would be {rate(step.roofline_tokens_per_second)} tokens/s",
    )
    if step.sharing is not None:
        yield Explained(
            "scaling",
            f"{step.sharing.scaling:.2f}",
            f"what the GPUs send each other a step, over {step.sharing.link}",
        )
    source = price_of(sizing.card.spec, sizing.wishes.usd_per_gpu_hour)
    yield Explained(
        "price", source, "what was typed" if sizing.wishes.usd_per_gpu_hour else "profiles/gpus.toml"
    )


def _run(sizing: Sizing) -> Iterator[Explained]:
    run, data = sizing.run, sizing.wishes.data
    if run is None or data is None:
        return
    told = "estimated from the size of the texts, without a tokenizer" if data.stats.estimated else "counted"
    yield Explained("examples", f"{data.count:,}", f"of {data.path}; their lengths are {told}")
    found = run.duration
    if found is None or found.steps is None:
        return
    passes, effective = run.schedule.num_train_epochs, run.schedule.effective_batch_size
    yield Explained(
        "steps", f"{found.steps:,}", f"batches of {effective:,} examples that {passes:g} passes make"
    )
    yield Explained(
        "time",
        duration(found.hours),
        "steps by the time of a step at the lengths that batches of these examples have, and compiling",
    )
    if found.usd is not None:
        yield Explained("cost", dollars(found.usd), "time by price by GPUs")
