"""Plan: what was asked, what was chosen, what it needs, how fast it is, and on what all of that rests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from planner.base.errors import FieldError, InputError
from planner.base.json_codec import NOT_IN_JSON, WHERE_SET
from planner.base.values import dataclass
from planner.gpus.target import GpuTarget
from planner.memory.breakdown import MemoryBreakdown
from planner.setup.request import PlanRequest
from planner.setup.training_setup import TrainingSetup
from planner.throughput.roofline import StepEstimate

PLAN_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedModel:
    """The model of a plan. `trainable_parameters` are those that the setup trains, `source` says how the
    shapes were found, `max_position_embeddings` is the longest sequence that the model was made for.
    `attention_kernels` are torch's that sdpa runs on the plan's card (throughput/torch_attention.py), none
    where attention is not sdpa's.
    """

    id: str
    hub_id: str
    architecture: str
    parameter_count: int
    trainable_parameters: int
    num_hidden_layers: int
    max_position_embeddings: int
    attn_implementation: str
    source: str
    attention_kernels: tuple[str, ...] = field(default=(), metadata=WHERE_SET)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Training arguments that change neither memory nor speed, named as transformers names them.

    `effective_batch_size` counts examples. With packing it is about that, a row holding `examples_per_row` on
    average (null without packing, or where the data is not known).
    """

    effective_batch_size: int
    learning_rate: float
    num_train_epochs: float
    lr_scheduler_type: str
    warmup_ratio: float
    examples_per_row: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSummary:
    """Lengths of the training data at the chosen length.

    `covered_percent` of the examples are not longer than `max_length`; `truncated_examples` are cut and lose
    `truncated_tokens`. `processed_tokens` is what an epoch pushes through the model, padding included.
    `estimated` says that lengths follow from the text's size and not from a tokenizer.

    `untrained_examples` have no token to learn within `max_length`, `left_out` are the keys of rows that
    nothing is made of, and `notes` say in words what of the examples is not trained, and why.
    """

    path: str
    format: str
    examples: int
    total_tokens: int
    longest: int
    percentile_99: int
    covered_percent: float
    truncated_examples: int
    truncated_tokens: int
    processed_tokens: int
    estimated: bool
    untrained_examples: int = 0
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Duration:
    """Hours to train on `tokens` (what those are: `of`), with an interval; the price where a rate is known.

    Of the data, they are the examples' own, padding left out. `steps` are optimizer steps;
    `useful_tokens_per_second` is the mean rate of those tokens, compilation left out. Both are null where no
    data was given.
    """

    of: str
    tokens: int
    steps: int | None
    hours: float
    hours_low: float
    hours_high: float
    usd_per_gpu_hour: float | None
    usd: float | None
    useful_tokens_per_second: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadNeeds:
    """What loading and saving need beside the GPU.

    `download_bytes` is the weights as published, null if unknown. `result_bytes` is what is saved in the
    end and `checkpoint_bytes` a checkpoint, at most. `disk_bytes` is the download and all that a run writes
    with the usual checkpoints, null if unknown. `host_memory_bytes` is about what the training process holds.
    """

    download_bytes: int | None
    result_bytes: int
    checkpoint_bytes: int
    disk_bytes: int | None
    host_memory_bytes: int

    def written_bytes(self, kept: int) -> int:
        """What a run has on disk at its largest: the checkpoints that are kept, one more while it is saved,
        and the result; `kept` is 0 for none.
        """
        return self.result_bytes + (kept + 1 if kept else 0) * self.checkpoint_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodFigures:
    """What a plan answers that is asked for a method: what it chooses, or the smallest it tried.

    `flags` are what to type, in place of what was typed of the same knobs and `without` options that the
    method refuses. `changes` say how its setup differs from the plan's beside that and its length, `faster`
    by what share of its speed it is faster (negative: slower; null for the plan's own). `smallest_gpu` is the
    card with least memory of `desktop_card` and `rented_card`, which are the smallest of their kind that take
    the method at that length; null where none does. Plans written before a field was added have not got it.
    """

    method: str
    weights_bytes: int
    allocated_bytes: int
    process_bytes: int
    peak_upper_bytes: int
    fits: bool
    tokens_per_second: float | None
    smallest_gpu: str | None
    max_length: int | None = None
    flags: str = ""
    without: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    faster: float | None = None
    desktop_card: str | None = None
    rented_card: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """Another setup that was tried, and why it lost: "too large", "slower", "tie" (as fast, but larger) or
    "offloads" (as fast, but it moves inputs to the host).

    `amount` is the bytes it lacks ("too large") or needs more ("tie"), or the share of speed it gives up
    ("slower", "offloads").
    """

    strategy: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    peak_upper_bytes: int
    tokens_per_second: float | None
    fits: bool
    lost: str
    amount: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierPoint:
    """A setup of the search that no other one beats in both time and memory; `chosen` is the plan's own.

    `hours` is the time of the plan's run, or of the run that the search assumes where no data was given, with
    compilation. `tokens_per_second` is of the data's own tokens, or of full sequences without data.
    """

    strategy: str
    setup: TrainingSetup
    peak_upper_bytes: int
    tokens_per_second: float
    hours: float
    fits: bool
    chosen: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerUp:
    """A setup that lost (in Alternative's words), how much faster it is (negative: slower), what it lacks."""

    strategy: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    lost: str
    faster: float
    lacking_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """A change to the request, and what a plan for it answers.

    `flags` are what to type, in place of what was typed of the same knobs; `without`, the options to leave
    out. Where both are empty nothing can be typed (closing a program). `peak_upper_bytes` is what has to fit
    after the change, `change_bytes` how much more (or, negative, less) than now. `effect` says what it costs
    or brings, `changes` how the setup that it leads to differs from the plan's beside that, `faster` by what
    share of the plan's speed it is faster (negative: slower; null for another model). `setup` is that setup:
    null where no setup can do it, and for advice read from JSON.
    """

    title: str
    flags: str
    effect: str
    peak_upper_bytes: int
    change_bytes: int
    fits: bool
    tokens_per_second: float | None
    without: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    faster: float | None = None
    setup: TrainingSetup | None = field(default=None, compare=False, metadata=NOT_IN_JSON)


@dataclass(frozen=True, kw_only=True, slots=True)
class CardAdvice:
    """The card with least memory of its kind on which a plan fits, and the length that it then has.

    `kind` is "desktop" or "rented"; empty in plans written before it was told.
    """

    gpu: str
    name: str
    memory_bytes: int
    usable_bytes: int
    max_length: int
    kind: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherCard:
    """What a card with more memory would bring: what a plan answers that is asked for it by `flags`.

    `changes` say how its setup differs from the plan's. Hours and price are for what the plan's `duration` is
    for. `speedup` is the plan's hours over these where the plan fits, else null. `longer_length` is a length
    beyond the plan's that fits there, but not here.
    """

    gpu: str
    name: str
    memory_bytes: int
    usable_bytes: int
    setup: TrainingSetup
    peak_upper_bytes: int
    tokens_per_second: float
    speedup: float | None
    longer_length: int | None
    hours: float
    usd_per_gpu_hour: float | None
    usd: float | None
    flags: str = ""
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class WayFigures:
    """A way to use several GPUs, and what a plan for it answers. `distributed` is null for one GPU alone.

    `lost` says why it is not the plan's: "too large" (by `amount` bytes), "shorter" (it takes `max_length`
    tokens), "slower" (by `amount` of the plan's speed), "tie", "refused" (for `reason`, with no figures);
    empty for the plan's own. `usd` is the price of what the plan's duration is for, of all GPUs that it uses.
    """

    distributed: str | None
    num_processes: int
    fits: bool
    lost: str
    amount: float
    max_length: int | None = None
    peak_upper_bytes: int | None = None
    tokens_per_second: float | None = None
    hours: float | None = None
    usd: float | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """A fact that guides often get wrong; `{size}` in the text stands for `size_bytes`."""

    text: str
    size_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Longest:
    """The longest sequences that fit, and the setup that a plan for that length takes. `reaches_model_limit`
    says that the model's own window ends it, not the card.
    """

    max_length: int
    peak_upper_bytes: int
    tokens_per_second: float | None
    reaches_model_limit: bool
    setup: TrainingSetup


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """A package and its version, as it was installed where a plan was made."""

    name: str
    version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The answer to a PlanRequest.

    `fits` is the verdict; where it is false, `setup` is the smallest one tried. `advice` says how to make
    it fit or how to use what is left. `assumptions` are everything that was chosen without being asked.
    `smallest_cards` are, where it does not fit, the smallest card for a desktop and the smallest to rent that
    take it, `smallest_gpu` the one of them with less memory. `frontier` is by rising memory. Plans written
    before a field was added have not got it; plans made for the short page have no methods, alternatives,
    frontier and other cards, and of advice only what it shows.
    `longest` is null where it was not asked for or nothing fits. `made_with` is known of plans from files.
    `ways` are those to use several GPUs, where the request leaves that open.
    `neighbours` are the points of the frontier around the plan's own, and `runners_up` the setups that a
    reader would ask about: chosen for a reader with the plan, and no part of its JSON.
    """

    request: PlanRequest
    gpu: GpuTarget
    model: PlannedModel
    fits: bool
    setup: TrainingSetup
    strategy: str
    schedule: Schedule
    memory: MemoryBreakdown
    speed: StepEstimate | None
    duration: Duration | None
    loading: LoadNeeds
    data: DataSummary | None
    methods: tuple[MethodFigures, ...]
    alternatives: tuple[Alternative, ...]
    advice: tuple[Advice, ...]
    smallest_gpu: CardAdvice | None
    assumptions: tuple[str, ...]
    notes: tuple[Note, ...]
    frontier: tuple[FrontierPoint, ...] = ()
    other_cards: tuple[OtherCard, ...] = ()
    smallest_cards: tuple[CardAdvice, ...] = ()
    longest: Longest | None = None
    made_with: tuple[Release, ...] = ()
    ways: tuple[WayFigures, ...] = field(default=(), metadata=WHERE_SET)
    neighbours: tuple[FrontierPoint, ...] = field(default=(), compare=False, metadata=NOT_IN_JSON)
    runners_up: tuple[RunnerUp, ...] = field(default=(), compare=False, metadata=NOT_IN_JSON)

    @property
    def headroom_bytes(self) -> int:
        """Usable bytes less the interval's upper end; negative by what is lacking."""
        return self.gpu.usable_bytes - self.memory.peak_upper_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON form with its version."""
        from planner.base.json_codec import encode_fields

        return {"version": PLAN_VERSION, "headroom_bytes": self.headroom_bytes, **encode_fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Read the JSON form.

        Raises:
            InputError: the JSON does not describe a plan of this version.
        """
        from planner.base.json_codec import decode_fields

        if not isinstance(values, Mapping):
            raise InputError("a plan must be a JSON object")
        rest = dict(values)
        version = rest.pop("version", None)
        if version != PLAN_VERSION:
            raise FieldError("plan version", version, str(PLAN_VERSION))
        rest.pop("headroom_bytes", None)
        return decode_fields(cls, rest, "plan")
