"""TrainingRun: one setup on one model, with all that follows from the two.

The memory and the speed model read it. Each derived fact is computed once a run, when it is first asked for.
"""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter

from planner.base.lazy import cached_fact
from planner.base.units import DTYPE_WIDTH, FP32
from planner.base.values import dataclass
from planner.models.scored import scored
from planner.models.spec import ModelSpec
from planner.models.storage import Storage
from planner.setup.adapters import Adapter, adapter_of
from planner.setup.attention import attention_implementation, attention_kernel, mask_windows
from planner.setup.micro_step import MicroStep, micro_step
from planner.setup.parallelism import Parallelism
from planner.setup.stack import TRL, Stack
from planner.setup.trained import Trained, trained_tensors
from planner.setup.training_knobs import SLICED
from planner.setup.training_setup import FIELD_NAMES, TrainingSetup

_SIZES = ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps")
_kind_values = attrgetter(*(name for name in FIELD_NAMES if name not in _SIZES))


class RunKind:
    """What runs on a model have in common whose setups differ in length, batch and accumulation alone: most
    of what follows from a setup, worked out once for all of them. Runs of one kind have the same object, so
    that it is a key of what is remembered about them. `setup` is one of theirs, whose sizes are not to be
    read.
    """

    def __init__(self, setup: TrainingSetup, model: ModelSpec, stack: Stack, *, padded: bool) -> None:
        self.model, self.stack = model, stack
        self.setup = setup
        # A language model may get a mask wherever there are images: they see all of themselves.
        self.padded = padded or (self.sees_images and model.tower is not None and model.tower.masked)
        self._kernels: dict[tuple[bool, tuple[bool, ...]], tuple[str, ...]] = {}

    @cached_fact
    def attention(self) -> str:
        """The attention implementation that runs: the setup's, else the model's own."""
        return attention_implementation(self.setup, self.model)

    @cached_fact
    def _windows(self) -> tuple[int, ...]:
        windows = (layer.sliding_window for layer in self.model.layers)
        return tuple(window for window in windows if window is not None)

    def kernels_of(self, setup: TrainingSetup) -> tuple[str, ...]:
        """TrainingRun.attention_kernels of a setup of the kind."""
        length = setup.max_length
        key = setup.sequences_per_micro_step > 1, tuple([window < length for window in self._windows])
        found = self._kernels.get(key)
        if found is None:
            found = self._kernels[key] = tuple(
                attention_kernel(setup, layer, self.attention, padded=self.padded)
                for layer in self.model.layers
            )
        return found

    @cached_fact
    def keeps_attention(self) -> bool:
        """Whether selective checkpointing keeps attention's output and log-sum-exp: computed once then."""
        return self.setup.selective_checkpointing and self.attention in self.stack.kept_attention

    @cached_fact
    def adapter(self) -> Adapter | None:
        """What is trained beside the base; None where all weights are."""
        return adapter_of(self.setup, self.stack)

    @cached_fact
    def holds_reference(self) -> bool:
        """Whether a second model is there to compare with, as no adapter can be disabled (trl
        dpo_trainer.py, ref_model).
        """
        return self.adapter is None and self.setup.reference_passes > 0

    @cached_fact
    def trained(self) -> Trained:
        """All that is trained.

        Raises:
            FieldError: target_modules names a module that the model does not have.
        """
        return trained_tensors(self.model, self.adapter, self.held_width)

    @cached_fact
    def held_width(self) -> int:
        """Bytes of an element of weights that are trained in full, as they are held: FSDP2 may keep them in
        fp32 and compute with copies.
        """
        masters = self.parallelism.shards and self.parallelism.sharding.masters
        return FP32 if self.adapter is None and masters else self.storage.width

    @cached_fact
    def storage(self) -> Storage:
        """How base weights lie in memory."""
        checkpoint = self.model.checkpoint
        return Storage(
            quantized=self.setup.method == "qlora",
            bits=8 if self.setup.load_in_8bit else 4,
            double_quant=self.setup.bnb_4bit_use_double_quant,
            width=DTYPE_WIDTH[self.setup.dtype],
            experts=self.setup.experts == "4bit",
            slices_experts=self.setup.experts_matmul == SLICED,
            stored=None if checkpoint is None else checkpoint.plain_width,
            recast=checkpoint is not None and checkpoint.dtype != self.setup.dtype,
            tower=self.setup.vision_tower == "4bit",
        )

    @cached_fact
    def sees_images(self) -> bool:
        """Whether sequences have images, which the model's tower looks at."""
        return self.model.tower is not None and self.setup.image_patches > 0

    @cached_fact
    def parallelism(self) -> Parallelism:
        """How many GPUs the runs have."""
        return Parallelism(
            num_processes=self.setup.num_processes,
            strategy=self.setup.distributed,
            sharding=self.stack.sharding,
        )

    @cached_fact
    def checkpointed_layers(self) -> int:
        """Decoder layers, from the first one on, that keep their input alone."""
        if not self.setup.gradient_checkpointing:
            return 0
        asked = self.setup.checkpointed_layers
        return self.model.num_hidden_layers if asked is None else asked

    @cached_fact
    def keeps_raw_embedding(self) -> bool:
        """Whether embeddings lie beside their scaled copy, or that with images in it: PEFT marks them as a
        leaf that wants a gradient, and the model changes them outside the embedding's own module.
        """
        setup = self.setup
        changed = self.model.scales_embeddings_outside or self.sees_images
        if not changed or self.trained.reaches_embedding:
            return False
        return setup.uses_lora and setup.gradient_checkpointing


MAX_KNOWN = 8192
"""Kinds of runs that are remembered."""
_kinds: dict[tuple[object, ...], RunKind] = {}


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A setup on a model. `padded` says that batches mix lengths, so that attention has a mask, which those
    of some tasks always do; `stack` is the trainer. Tasks that score give the model another head.
    """

    setup: TrainingSetup
    model: ModelSpec
    padded: bool = False
    stack: Stack = TRL

    def __post_init__(self) -> None:
        objective = self.setup.objective
        if objective.mixes_lengths:
            object.__setattr__(self, "padded", True)
        if objective.scores:
            object.__setattr__(self, "model", scored(self.model))

    def __hash__(self) -> int:
        return self._hash

    @cached_fact
    def _hash(self) -> int:
        return hash((self.setup, self.model, self.padded))

    @cached_fact
    def kind(self) -> RunKind:
        """What it has in common with runs of other sizes."""
        # A stack is told by which one it is: there are few, and each is made once.
        key = (*_kind_values(self.setup), self.model, self.padded, id(self.stack))
        found = _kinds.get(key)
        if found is None:
            if len(_kinds) >= MAX_KNOWN:
                _kinds.clear()
            found = _kinds[key] = RunKind(self.setup, self.model, self.stack, padded=self.padded)
        return found

    @property
    def attention(self) -> str:
        """RunKind.attention."""
        return self.kind.attention

    @cached_fact
    def attention_kernels(self) -> tuple[str, ...]:
        """The one of planner.setup.attention.ATTENTION_KERNELS for each kind of layer of the model."""
        return self.kind.kernels_of(self.setup)

    @cached_fact
    def mask_windows(self) -> tuple[int | None, ...]:
        """A micro-step's masks by their sliding window (null for none)."""
        return mask_windows(self.setup, self.model.layers, self.attention, padded=self.kind.padded)

    @property
    def keeps_attention(self) -> bool:
        """RunKind.keeps_attention."""
        return self.kind.keeps_attention

    @cached_fact
    def micro_step(self) -> MicroStep:
        """The shape of a forward and backward pass. Tokens of images have no label."""
        found = micro_step(self.setup)
        if self.model.tower is None or not self.patches:
            return found
        shown = self.model.tower.rule.tokens(self.patches)
        return replace(found, rows=max(1, found.rows - shown))

    @property
    def sees_images(self) -> bool:
        """RunKind.sees_images."""
        return self.kind.sees_images

    @cached_fact
    def table_positions(self) -> int:
        """Rows of the rotary tables: those of one sequence, or of all where each has its own."""
        tower, shape = self.model.tower, self.micro_step
        return shape.tokens if tower is not None and tower.row_tables else shape.positions

    @cached_fact
    def patches(self) -> int:
        """Patches of a micro-step's images, each sequence with as many as it may have."""
        setup = self.setup
        return setup.image_patches * setup.per_device_train_batch_size if self.sees_images else 0

    @property
    def adapter(self) -> Adapter | None:
        """RunKind.adapter."""
        return self.kind.adapter

    @property
    def trained(self) -> Trained:
        """RunKind.trained."""
        return self.kind.trained

    @property
    def held_width(self) -> int:
        """RunKind.held_width."""
        return self.kind.held_width

    @property
    def reduce_width(self) -> int:
        """Bytes of an element of the gradients that FSDP2's GPUs add up: of the dtype that one GPU has them
        in (launcher/training/several/units.py).
        """
        in_fp32 = self.setup.method in self.parallelism.sharding.reduced_in_fp32
        return FP32 if in_fp32 else self.storage.width

    @property
    def storage(self) -> Storage:
        """RunKind.storage."""
        return self.kind.storage

    @property
    def parallelism(self) -> Parallelism:
        """RunKind.parallelism."""
        return self.kind.parallelism

    @property
    def checkpointed_layers(self) -> int:
        """RunKind.checkpointed_layers."""
        return self.kind.checkpointed_layers

    @property
    def keeps_raw_embedding(self) -> bool:
        """RunKind.keeps_raw_embedding."""
        return self.kind.keeps_raw_embedding


class Runs:
    """A model's runs with a stack, each made once, so that what follows from a setup is worked out once."""

    def __init__(self, model: ModelSpec, stack: Stack = TRL) -> None:
        self.model = model
        self.stack = stack
        self._known: dict[tuple[TrainingSetup, bool], TrainingRun] = {}

    def of(self, setup: TrainingSetup, *, padded: bool = False) -> TrainingRun:
        """A setup's run."""
        found = self._known.get((setup, padded))
        if found is None:
            found = TrainingRun(setup=setup, model=self.model, padded=padded, stack=self.stack)
            self._known[setup, padded] = found
        return found
