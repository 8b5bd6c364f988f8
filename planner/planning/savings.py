"""Savings: changes to a request that need less memory, each with its price.

What a plan chooses by itself (micro-batch, checkpointing, offloading, compiling) saves only where it was
fixed.
"""

from __future__ import annotations

from collections.abc import Iterator

from planner.base.values import dataclass
from planner.planning.asked import Asked
from planner.setup.defaults import FASTER_OPTIM, OPTIM
from planner.setup.knob import KnobValue
from planner.setup.options import option, options
from planner.setup.request import PlanRequest
from planner.setup.training_setup import TrainingSetup

SMALL_RANK = 8
MEMORY_SAVING_OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit")
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
RUNNING = (
    *BATCH,
    "gradient_checkpointing",
    "checkpointed_layers",
    "selective_checkpointing",
    "activation_memory_budget",
    "activation_offloading",
    "compile",
)
"""How a run is executed: what may be left to the plan without another result of the training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Knobs to fix and to leave open, in words and with what it costs or brings.

    `effective_batch_size` is what the request has to name, null where it need not.
    """

    title: str
    effect: str
    knobs: tuple[tuple[str, KnobValue], ...] = ()
    without: tuple[str, ...] = ()
    effective_batch_size: int | None = None

    @property
    def flags(self) -> str:
        """What to type."""
        wish = {"effective_batch_size": self.effective_batch_size} if self.effective_batch_size else {}
        return options({**dict(self.knobs), **wish})

    def left_out(self, request: PlanRequest) -> tuple[str, ...]:
        """Options of a request that are not to be typed again, as they were typed."""
        return tuple(option(name, request.fixed[name])[0] for name in self.without)

    @property
    def told(self) -> frozenset[str]:
        """Knobs that the flags and the title tell of."""
        return frozenset(name for name, _ in self.knobs)

    def of(self, request: PlanRequest) -> PlanRequest:
        """The request with the change.

        Raises:
            InputError: it would contradict itself.
        """
        changed = request.without(*self.without).with_knobs(dict(self.knobs))
        return changed.with_effective_batch(self.effective_batch_size)


def change(title: str, effect: str, *, without: tuple[str, ...] = (), **knobs: KnobValue) -> Change:
    """A change of knobs."""
    return Change(title=title, effect=effect, knobs=tuple(knobs.items()), without=without)


def to_method(asked: Asked, method: str, title: str, effect: str) -> Change:
    """A change of method, and of what the new one refuses."""
    return change(title, effect, without=asked.refused_with(method), method=method)


def left_to_the_plan(asked: Asked) -> Change | None:
    """How the run is executed, where some of that is fixed, as the plan would have it.

    Batches stay where a row's examples are not for the plan to count. Of optimizers, only the two that a plan
    takes for each other are left to it.
    """
    request = asked.request
    packed = asked.stats is not None and request.fixed.get("packing") is True
    freed = [name for name in RUNNING if name in request.fixed and not (packed and name in BATCH)]
    if not freed:
        return None
    if request.fixed.get("optim") in (OPTIM, FASTER_OPTIM):
        freed.append("optim")
    wish = asked.effective_batch_size
    open_ended = asked.with_request(request.without(*freed))
    return Change(
        title="how it runs left to the plan",
        effect="the fastest that fits",
        without=tuple(freed),
        effective_batch_size=None if open_ended.effective_batch_size == wish else wish,
    )


def savings(asked: Asked, setup: TrainingSetup) -> Iterator[tuple[Change, ...]]:
    """Single changes that need less memory than the setup that was chosen, the least harmful to the result
    first: of each kind the weakest first. Shorter sequences are for the caller to look for.
    """
    for one in _free_savings(asked, setup):
        yield (one,)
    yield from _method_savings(asked, setup)


def smaller_rank(setup: TrainingSetup) -> Change | None:
    """A smaller adapter than the setup's; None where it is small."""
    if not setup.uses_lora or setup.lora_r <= SMALL_RANK:
        return None
    title = f"rank {SMALL_RANK} instead of {setup.lora_r}"
    return change(title, "a smaller adapter learns less", lora_r=SMALL_RANK)


def together(changes: list[Change]) -> Change:
    """Changes that exclude none of the others, at once."""
    knobs = {name: value for one in changes for name, value in one.knobs}
    without = tuple(dict.fromkeys(name for one in changes for name in one.without if name not in knobs))
    return Change(title="all of these together", effect="", knobs=tuple(knobs.items()), without=without)


def _free_savings(asked: Asked, setup: TrainingSetup) -> Iterator[Change]:
    """Changes that cost speed at most, not quality."""
    fixed = asked.request.fixed
    if setup.per_device_train_batch_size > 1 and not fixed.keys().isdisjoint(BATCH):
        yield _smaller_batch(setup)
    decided = fixed.keys() & set(RUNNING)
    if decided and (not setup.gradient_checkpointing or setup.checkpointed_layers is not None):
        others = ("checkpointed_layers", "activation_memory_budget")
        yield change(
            "checkpoint all layers",
            "layers are computed twice",
            without=tuple(name for name in others if name in fixed),
            gradient_checkpointing=True,
        )
    if setup.prepare_for_kbit_training:
        title = "without prepare_for_kbit_training"
        yield change(title, "TRL does not need it", prepare_for_kbit_training=False)
    if setup.attn_implementation == "eager" and asked.model.default_attn_implementation != "eager":
        yield change("sdpa instead of eager attention", "the same result, faster", attn_implementation="sdpa")
    dtype = asked.target.spec.dtype
    if setup.dtype == "float32":
        yield change(f"{dtype} instead of float32", "what most people train in", dtype=dtype)
    if setup.load_in_8bit and asked.model.checkpoint is None:
        yield change("a base in 4 bits instead of 8", "QLoRA's own", load_in_8bit=False)
    elif setup.method == "qlora" and not (setup.load_in_8bit or setup.bnb_4bit_use_double_quant):
        yield change("double quantisation", "no loss known", bnb_4bit_use_double_quant=True)
    if setup.optim not in MEMORY_SAVING_OPTIMIZERS:
        yield change(f"{OPTIM} instead of {setup.optim}", "states of 8 bits", optim=OPTIM)


def _method_savings(asked: Asked, setup: TrainingSetup) -> Iterator[tuple[Change, ...]]:
    if setup.use_dora:
        yield (change("LoRA instead of DoRA", "no magnitude vector", use_dora=False),)
    if setup.uses_lora and setup.lora_dropout > 0:
        yield (change("no LoRA dropout", "less regularisation", lora_dropout=0.0),)
    if setup.method == "full":
        yield tuple(
            to_method(asked, method, f"{title} instead of full fine-tuning", "trains an adapter")
            for method, title in (("lora", "16-bit LoRA"), ("qlora", "QLoRA"))
        )
    if setup.method == "lora":
        yield (to_method(asked, "qlora", "QLoRA instead of 16-bit LoRA", "the base in 4 bits"),)


def _smaller_batch(setup: TrainingSetup) -> Change:
    accumulation = setup.gradient_accumulation_steps * setup.per_device_train_batch_size
    return change(
        f"micro-batch 1, {accumulation} times accumulated",
        "the same effective batch, slower",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
    )
