"""What a run's events and samples say is going wrong, while it can still be mended (docs/advice.md).

Each rule is a function of what has been seen, gives its advice once, and is silent where figures are missing.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from launcher.runs.events import (
    AttemptEvent,
    EndEvent,
    EvalEvent,
    Event,
    LogEvent,
    SampleEvent,
    StartEvent,
)
from launcher.runs.report.series import CoalescedSeries
from planner.answers.plan import Plan

FEWEST_LOGS = 3
BLOWN_UP = 1.3
"""Times the first losses that the last ones are, and more, where a rate was too high; noise is less."""
RISEN = 1.15
RISING_SHARE = 0.2
"""A loss that stands that much above its lowest level for this share of the run does not come back."""
BLOCKS, NOISE = 20, 5.0
"""Means over a twentieth of the run, and by how many of their standard errors one is above another."""
STILL = 0.02
"""A loss that has moved less than this share of itself has not moved."""
FEWEST_STILL_STEPS = 50
STILL_SHARE = 0.25
OVERFIT = 1.02
LOW_UTILIZATION = 80.0
BUSY_HOST = 85.0
FULL = 0.97
SLOW = 3.0
TAKEN_BYTES = 512 * 2**20
SAMPLES = 60
"""A minute of them: what lasts that long is no hiccup."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """What is wrong, its likely cause and the mend; `rule` is its name in docs/advice.md."""

    rule: str
    message: str


@dataclass(slots=True)
class Seen:
    """What has been seen of the run, without what an attempt does again, in bounded memory. `first` are steps
    and losses; what is seen of the machine is of the present attempt.
    """

    plan: Plan | None = None
    total_steps: int | None = None
    step: int = 0
    ended: bool = False
    first: list[tuple[int, float]] = field(default_factory=list)
    last: deque[float] = field(default_factory=lambda: deque(maxlen=10))
    losses: CoalescedSeries = field(default_factory=lambda: CoalescedSeries(capacity=128))
    evaluations: deque[tuple[int, float, float]] = field(default_factory=lambda: deque(maxlen=50))
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    samples: deque[SampleEvent] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    others_bytes: int | None = None

    def take(self, event: Event) -> None:
        """Count an event or a sample in."""
        match event:
            case AttemptEvent():
                self._begin_attempt(event.from_step)
            case StartEvent():
                self.total_steps = event.total_steps
            case LogEvent():
                self._take_log(event)
            case EvalEvent() if event.loss is not None:
                self.evaluations.append((event.step, event.loss, self.level))
            case EndEvent():
                self.ended = True
            case SampleEvent():
                self.samples.append(event)
                others = _others(event)
                if others is not None:
                    least = others if self.others_bytes is None else self.others_bytes
                    self.others_bytes = min(least, others)
            case _:
                pass

    def _begin_attempt(self, from_step: int) -> None:
        first, losses = [one for one in self.first if one[0] <= from_step], self.losses
        evaluations = [one for one in self.evaluations if one[0] <= from_step]
        losses.drop_after(from_step)
        self.__init__(plan=self.plan, first=first, losses=losses)  # type: ignore[misc]
        self.evaluations.extend(evaluations)

    def _take_log(self, event: LogEvent) -> None:
        self.step = event.step
        if len(self.step_seconds) < 2:
            # What was sampled so far is of loading and of the first steps, which compile.
            self.samples.clear()
        if event.step_seconds is not None:
            self.step_seconds.append(event.step_seconds)
        if event.loss is not None:
            if len(self.first) < FEWEST_LOGS:
                self.first.append((event.step, event.loss))
            self.last.append(event.loss)
            self.losses.add(event.step, event.loss)

    @property
    def level(self) -> float:
        """The mean of the last losses; 0 before the first."""
        return statistics.fmean(self.last) if self.last else 0.0

    def trains(self) -> bool:
        """Whether the samples at hand are of a minute of training."""
        return len(self.samples) == SAMPLES and len(self.step_seconds) == 5


Rule = Callable[[Seen], str | None]


def blown_up(seen: Seen) -> str | None:
    """The loss ends, or stands, far above where it began."""
    if len(seen.first) < FEWEST_LOGS or not seen.last:
        return None
    whole = len(seen.last) == seen.last.maxlen
    if not whole and not seen.ended:
        return None
    first = [loss for _, loss in seen.first]
    begun = statistics.median(first) if whole else first[0]
    now = statistics.median(seen.last if whole else list(seen.last)[-FEWEST_LOGS:])
    if now <= BLOWN_UP * begun:
        return None
    return (
        f"the loss went from {begun:.3g} to {now:.3g}: the model has unlearned, as it does at a learning "
        "rate that is too high. Begin again with a tenth of it; these weights are worse than the base"
    )


def rises(seen: Seen) -> str | None:
    """The loss has stood above its lowest level for long, beyond its noise."""
    losses = [loss for _, loss in seen.losses.points()]
    width = len(losses) // BLOCKS
    if width < 2 or seen.total_steps is None:
        return None
    ends = range(len(losses) % width + width, len(losses) + 1, width)
    blocks = [losses[end - width : end] for end in ends]
    levels = [statistics.fmean(block) for block in blocks]
    lowest = min(levels)
    noise = statistics.median(map(_spread, blocks)) / math.sqrt(width)
    high = max(RISEN * lowest, lowest + NOISE * noise)
    above = next((count for count, level in enumerate(reversed(levels)) if level <= high), len(levels))
    steps = above * width * seen.step // len(losses)
    if above == len(levels) or steps < RISING_SHARE * seen.total_steps:
        return None
    return (
        f"the loss has stood above {high:.3g} for {steps:,} steps, after {lowest:.3g}: it does not come "
        "back. Lower the learning rate or warm up for longer; a checkpoint of before is better"
    )


def _spread(values: list[float]) -> float:
    """The standard deviation of two values or more; that of `statistics` reckons in fractions, 30 times as
    long, and this is asked for hundreds of times in a run.
    """
    mean = statistics.fmean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def stands_still(seen: Seen) -> str | None:
    """The loss has never moved."""
    total = seen.total_steps
    if total is None or seen.step < max(FEWEST_STILL_STEPS, STILL_SHARE * total):
        return None
    losses = [loss for _, loss in seen.losses.points()]
    quarter = len(losses) // 4
    if quarter < FEWEST_LOGS:
        return None
    first, last = statistics.fmean(losses[:quarter]), statistics.fmean(losses[-quarter:])
    if abs(last - first) > STILL * first:
        return None
    return (
        f"the loss has not moved in {seen.step:,} steps: {first:.3g} at first, {last:.3g} now. The learning "
        "rate is too low, or the rank; or the model knows the data already"
    )


def overfits(seen: Seen) -> str | None:
    """The evaluation loss rises while the training loss falls."""
    found = list(seen.evaluations)
    if len(found) < 3:
        return None
    best_step, best, level = min(found, key=lambda one: one[1])
    later = [one for one in found if one[0] > best_step]
    rising = len(later) >= 2 and all(loss > OVERFIT * best for _, loss, _ in later[-2:])
    if not rising or later[-1][1] < later[-2][1] or later[-1][2] >= level:
        return None
    return (
        f"the evaluation loss rises, {best:.3g} at step {best_step:,} and {later[-1][1]:.3g} at step "
        f"{later[-1][0]:,}, while that of training falls: the data is learned by heart. Fewer epochs, "
        "--lora-dropout 0.05 or a lower rank; --early-stopping-patience 2 ends such a run"
    )


def idles(seen: Seen) -> str | None:
    """The GPU waits; the side that is busy is the slow one."""
    used = [one.utilization_percent for one in seen.samples if one.utilization_percent is not None]
    if not seen.trains() or len(used) < SAMPLES or statistics.median(used) >= LOW_UTILIZATION:
        return None
    begun = f"the GPU is used {statistics.median(used):.0f}% of the time"
    host = [one.host_percent for one in seen.samples if one.host_percent is not None]
    if host and statistics.median(host) >= BUSY_HOST:
        return (
            f"{begun}: the host, at {statistics.median(host):.0f}% of a core, launches its work more slowly "
            "than it is done. A larger micro-batch is almost free, and --compile regional launches less"
        )
    if host:
        return (
            f"{begun}, and the training process {statistics.median(host):.0f}% of a core: it waits for "
            "something else, as a slow disk or other processes on this machine"
        )
    return f"{begun}: a larger micro-batch, or --compile regional, gives it more to do at once"


def spills(seen: Seen) -> str | None:
    """Steps take many times the plan's while the card is full."""
    speed = None if seen.plan is None else seen.plan.speed
    full = [
        one.used_bytes / one.total_bytes >= FULL
        for one in seen.samples
        if one.used_bytes is not None and one.total_bytes
    ]
    if speed is None or not seen.trains() or len(full) < SAMPLES or not all(full):
        return None
    seconds, planned = statistics.median(seen.step_seconds), speed.seconds_per_optimizer_step
    if seconds <= SLOW * planned:
        return None
    return (
        f"a step takes {seconds:.3g} s where {planned:.3g} were planned, and the card is full: the driver "
        "moves memory to the host. Take a smaller micro-batch or checkpoint more layers, close what else is "
        "on the card, and on Windows switch CUDA's system memory fallback off"
    )


def is_slowed(seen: Seen) -> str | None:
    """The card has lowered its clocks to protect itself."""
    slowed = [one for one in seen.samples if one.slowed_by]
    if len(seen.samples) < SAMPLES or len(slowed) < SAMPLES // 2:
        return None
    last = slowed[-1]
    by = {"heat": "it is too hot", "power": "its power supply says so"}.get(str(last.slowed_by), "of itself")
    degrees = "" if last.temperature_c is None else f", at {last.temperature_c:.0f} C"
    watts = "" if last.power_w is None else f" and {last.power_w:.0f} W"
    mend = "its air and fans" if last.slowed_by == "heat" else "its cables and its power supply"
    return f"the card has lowered its clocks for half a minute because {by}{degrees}{watts}: look at {mend}"


def is_shared(seen: Seen) -> str | None:
    """Another process has taken memory of the card since."""
    least = seen.others_bytes
    recent = list(seen.samples)[-5:]
    held = [others for one in recent if (others := _others(one)) is not None]
    if least is None or len(held) < 5 or min(held) - least < TAKEN_BYTES:
        return None
    return (
        f"other processes have taken {(min(held) - least) / 2**30:.2f} GiB of the card since the start: what "
        "is planned to fit may run out of memory. nvidia-smi names them"
    )


def _others(sample: SampleEvent) -> int | None:
    """Bytes of the card that other processes hold."""
    if sample.used_bytes is None or sample.process_bytes is None:
        return None
    return max(0, sample.used_bytes - sample.process_bytes)


OF_LOSSES: tuple[tuple[str, Rule], ...] = (
    ("blown up", blown_up),
    ("rises", rises),
    ("stands still", stands_still),
    ("overfits", overfits),
)
OF_SAMPLES: tuple[tuple[str, Rule], ...] = (
    ("idles", idles),
    ("spills", spills),
    ("slowed", is_slowed),
    ("shared", is_shared),
)
_COVERED = {"rises": "blown up"}
"""What is no news after another advice."""
_LOOKS = 100
"""Looks at the losses for each doubling of their number, so that a long run costs no more than its length."""
_SAMPLES_A_LOOK = 5


@dataclass(slots=True)
class Adviser:
    """Takes events and samples as they come, and gives each rule's advice once in a run.

    `from_start` says that the events are taken from the first one on; else nothing is said of losses, of
    which the first ones are not known.
    """

    plan: Plan | None = None
    from_start: bool = True
    given: dict[str, Advice] = field(default_factory=dict)
    _seen: Seen = field(init=False)
    _logs: int = field(default=0, init=False)
    _samples: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._seen = Seen(plan=self.plan)

    def take(self, event: Event) -> Iterator[Advice]:
        """Count an event in; yields what it leads to."""
        self._seen.take(event)
        for name, rule in self._due(event):
            if name in self.given or _COVERED.get(name) in self.given:
                continue
            message = rule(self._seen)
            if message is not None:
                self.given[name] = Advice(rule=name, message=message)
                yield self.given[name]

    def _due(self, event: Event) -> tuple[tuple[str, Rule], ...]:
        """The rules to look by after an event."""
        match event:
            case SampleEvent():
                self._samples += 1
                return OF_SAMPLES if self._samples % _SAMPLES_A_LOOK == 0 else ()
            case LogEvent():
                self._logs += 1
                due = self.from_start and self._logs % max(1, self._logs // _LOOKS) == 0
                return OF_LOSSES if due else ()
            case EvalEvent() | EndEvent() if self.from_start:
                return OF_LOSSES
            case _:
                return ()


def advise(events: Iterable[Event], samples: Iterable[Event], plan: Plan | None) -> tuple[Advice, ...]:
    """All advice that a run's events and samples lead to, in the order in which it would have come."""
    adviser = Adviser(plan)
    every = sorted((*events, *samples), key=lambda event: event.time)
    return tuple(advice for event in every for advice in adviser.take(event))
