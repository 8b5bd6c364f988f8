"""Knobs whose memory is not modelled: refused by name, never ignored."""

from __future__ import annotations

from functools import lru_cache

from planner.base.errors import FieldError, InputError, NotModelledError
from planner.memory.step.images import refuse_beside_tower
from planner.models.checkpoint import Checkpoint
from planner.models.spec import ModelSpec
from planner.setup.adapters import uncommon_knob
from planner.setup.defaults import FASTER_OPTIM
from planner.setup.knob import KnobValue, plain
from planner.setup.methods import stored_knobs
from planner.setup.objective import SFT
from planner.setup.run import RunKind, TrainingRun
from planner.setup.training_knobs import LORAFA, SLICED
from planner.setup.training_setup import TrainingSetup

MODELLED_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flex_attention")
MODELLED_EXPERTS = (None, "grouped_mm")
LIGER_MODEL_TYPES = frozenset(
    [
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "ministral",
        "mistral",
        "olmo2",
        "olmo3",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    ]
)
"""Model types in whose layers Liger replaces norms, rotation and gated products, as the tape has it.

liger-kernel 0.8.5, transformers/monkey_patch.py:3904 (MODEL_TYPE_TO_APPLY_LIGER_FN). Types that it does not
know train unchanged, with one line in a log; nemotron's products are not gated.
"""


def refuse_unmodelled(run: TrainingRun) -> None:
    """Refuse what the memory model has no terms for.

    Raises:
        NotModelledError: a knob of the contract, by name.
        InputError: kernels that leave the model as it is.
        FieldError: more checkpointed layers than the model has.
    """
    _accept(run.kind)


@lru_cache(maxsize=8192)
def _accept(run: RunKind) -> None:
    """Of sizes nothing is refused, and what was accepted is remembered."""
    setup, model, attention = run.setup, run.model, run.attention
    if setup.compile != "none":
        _refuse_compiled(run)
    if run.parallelism.shards:
        _refuse_sharded(run)
    if setup.objective is not SFT:
        _refuse_of_task(setup)
    if attention not in MODELLED_ATTENTION:
        raise NotModelledError("attn_implementation", attention)
    if any(layer.attention_softcap for layer in model.layers) and attention == "sdpa":
        raise FieldError(
            "attn_implementation", "sdpa", "eager for this model, whose attention scores are capped"
        )
    _refuse_attention(model, attention)
    if model.default_experts_implementation not in MODELLED_EXPERTS:
        raise NotModelledError("experts_implementation", model.default_experts_implementation)
    if any(layer.shared_expert_intermediate_size for layer in model.layers):
        raise NotModelledError("shared experts of model", model.id)
    _refuse_on_experts(run)
    if model.checkpoint is not None:
        _refuse_of_checkpoint(run, model.checkpoint)
    if setup.load_in_8bit and setup.dtype == "float16":
        # Inputs are in float16 already then, and what is counted for their casts is not asked for.
        raise NotModelledError("load_in_8bit=true with dtype", setup.dtype)
    if model.is_traced:
        _refuse_traced(run)
    if setup.image_patches or setup.vision_tower != "16bit" or model.tower is not None:
        refuse_beside_tower(run)
    _refuse_uncommon(run)
    if setup.kernels == "liger":
        _refuse_liger(run)
    if setup.checkpointed_layers is not None and setup.checkpointed_layers > model.num_hidden_layers:
        raise FieldError(
            "checkpointed_layers",
            setup.checkpointed_layers,
            f"at most {model.num_hidden_layers}, the decoder layers",
        )


def _refuse_of_task(setup: TrainingSetup) -> None:
    """Refuse what TRL's other trainers do not do, or what no step of theirs was seen with.

    For the reference's pass TRL takes checkpoints off and puts them on again, on all layers and as they were
    made first (trl/models/utils.py, disable_gradient_checkpointing).
    """
    for name, counted in (
        ("distributed", (None, "ddp")),
        ("activation_offloading", (False,)),
        ("compile", ("none",)),
        ("checkpointed_layers", (None,)),
        ("selective_checkpointing", (False,)),
        ("prepare_for_kbit_training", (False,)),
        ("bias", ("none",)),
        ("modules_to_save", (None,)),
        ("trainable_token_indices", (None,)),
    ):
        if getattr(setup, name) not in counted:
            raise NotModelledError(f"task={setup.task} with {name}", getattr(setup, name))


def _refuse_of_checkpoint(run: RunKind, checkpoint: Checkpoint) -> None:
    """Refuse what weights that are quantised already do not allow.

    Raises:
        InputError: another method, or other values than they were quantised with.
        NotModelledError: a knob that nobody has tried on them.
    """
    setup, model = run.setup, run.model
    if setup.method != "qlora":
        raise InputError(
            f"method {setup.method} needs weights in 16 bits, but {model.id} is stored in {checkpoint.bits}: "
            "name the model that it was made from, or use method qlora"
        )
    for name, value in stored_knobs(checkpoint).items():
        if getattr(setup, name) != value:
            raise FieldError(name, plain(getattr(setup, name)), f"{plain(value)}, as {model.id} is stored")
    if run.parallelism.shards:
        raise NotModelledError("distributed=fsdp with quantised weights of model", model.id)
    if setup.experts == "4bit":
        raise NotModelledError("experts=4bit with quantised weights of model", model.id)
    if setup.compile != "none" and any(layer.kept for layer in model.layers):
        raise NotModelledError("compile=regional with layers kept in 16 bits of model", model.id)


def _refuse_attention(model: ModelSpec, attention: str) -> None:
    """Refuse kernels that do not compute a model's attention, or whose memory for it is not known."""
    sinks = [layer.traced for layer in model.layers if layer.attention_sinks]
    flexes = attention == "flex_attention" and all(one is not None and one.leaves_to_kernel for one in sinks)
    if sinks and attention != "eager" and not flexes:
        raise NotModelledError("attention with sinks by attn_implementation", attention)
    narrow = any(layer.value_head_dim for layer in model.layers)
    if narrow and attention not in ("sdpa", "eager"):
        raise NotModelledError("attention with values narrower than keys by attn_implementation", attention)


def _refuse_liger(run: RunKind) -> None:
    """Refuse Liger's kernels where they replace other things than the tape holds, or nothing at all."""
    model = run.model
    if any(layer.experts for layer in model.layers):
        # Its fused experts (liger_kernel/transformers/swiglu.py, LigerExperts) are one function of its own.
        raise NotModelledError("kernels=liger with experts of model", model.id)
    if model.model_type not in LIGER_MODEL_TYPES:
        known = ", ".join(sorted(LIGER_MODEL_TYPES))
        raise InputError(
            f"kernels liger is not known to change the layers of {model.id} (model_type {model.model_type}); "
            f"use kernels none, or a model of type {known}"
        )


def _refuse_traced(run: RunKind) -> None:
    """Refuse what a model's traces do not know of, by the knob."""
    setup = run.setup
    for name, traced in (
        ("compile", "none"),
        ("kernels", "none"),
        # Both widen what flows between operations, which were recorded in one dtype.
        ("prepare_for_kbit_training", False),
        ("use_dora", False),
    ):
        if getattr(setup, name) != traced:
            raise NotModelledError(f"{name} of a traced model", getattr(setup, name))


PLAIN_WITH_UNCOMMON: tuple[tuple[str, KnobValue | None], ...] = (
    ("num_processes", 1),
    ("compile", "none"),
    ("kernels", "none"),
    ("base_matmul", "bf16"),
    ("experts", "16bit"),
    ("prepare_for_kbit_training", False),
    ("activation_offloading", False),
)
"""What was traced with knobs that train something else than pairs of matrices (planner/setup/adapters.py)."""


PLAIN_WITH_LORAFA: tuple[tuple[str, KnobValue | None], ...] = (
    # The optimizer takes what has lora in its name by twos, and DoRA's magnitudes make three.
    ("use_dora", False),
    ("loraplus_lr_ratio", None),
)


PLAIN_WITH_OTHER_TYPES: tuple[tuple[str, KnobValue | None], ...] = (
    # What LoRA's configuration alone has, or was not traced.
    *PLAIN_WITH_LORAFA,
    ("lora_alpha", None),
    ("lora_dropout", 0.0),
    ("use_rslora", False),
    ("init_lora_weights", "default"),
    ("load_in_8bit", False),
    ("bias", "none"),
    ("modules_to_save", None),
    ("trainable_token_indices", None),
)


def plain_beside(setup: TrainingSetup) -> tuple[tuple[str, KnobValue | None], ...]:
    """Knobs of the adapter that LoRA-FA or another kind of adapter leaves at these values."""
    if setup.peft_type != "lora":
        return PLAIN_WITH_OTHER_TYPES
    return PLAIN_WITH_LORAFA if setup.optim == LORAFA else ()


def _refuse_uncommon(run: RunKind) -> None:
    """Refuse what has not been traced with such a knob, naming both.

    Raises:
        NotModelledError: it has another value, or the model is traced.
    """
    setup = run.setup
    name = uncommon_knob(setup)
    if name is None:
        return
    beside = plain_beside(setup)
    if setup.optim == LORAFA and not setup.uses_lora:
        raise NotModelledError(f"optim={LORAFA} with method", setup.method)
    if beside and (run.trained.experts_rank or run.trained.router_rank):
        raise NotModelledError(f"{name} with adapters on experts of model", run.model.id)
    for other, traced in (*beside, *PLAIN_WITH_UNCOMMON):
        if getattr(setup, other) != traced:
            raise NotModelledError(f"{name} with {other}", getattr(setup, other))
    if setup.dtype == "float16":
        # The launcher holds all that it trains in float32 then, whole modules too.
        raise NotModelledError(f"{name} with dtype", setup.dtype)
    if run.model.is_traced:
        raise NotModelledError(f"{name} of a traced model", plain(getattr(setup, name)))


def _refuse_on_experts(run: RunKind) -> None:
    """Refuse what experts cannot be held or adapted with.

    Raises:
        FieldError: experts in 4 bits of a model that has none.
        InputError: DoRA on adapted experts, which PEFT refuses (0.21.2, tuners/lora/layer.py: ParamWrapper).
        NotModelledError: offloading of what is kept of experts in 4 bits.
    """
    setup = run.setup
    held = setup.experts == "4bit"
    if held and not any(layer.experts for layer in run.model.layers):
        raise FieldError("experts", setup.experts, f"16bit: {run.model.id} has no experts")
    if held and setup.activation_offloading and not _whole_checkpoints(setup):
        raise NotModelledError("experts=4bit, layers not checkpointed and activation_offloading", True)
    if setup.experts_matmul == SLICED:
        _refuse_sliced(run)
    _refuse_with_adapted_experts(run, "use_dora")


def _refuse_sliced(run: RunKind) -> None:
    """Refuse experts that products cannot dequantise a few at a time.

    Raises:
        InputError: their adapters are folded into what is dequantised whole.
        NotModelledError: experts that the model multiplies with by itself.
    """
    if run.trained.experts_rank:
        raise InputError(
            "experts_matmul sliced does not work with adapters on experts, which are folded into a whole "
            "layer's; name target_modules of attention alone, or take experts_matmul whole"
        )
    if run.model.default_experts_implementation != "grouped_mm":
        raise NotModelledError("experts_matmul=sliced with experts of model", run.model.id)


def refuse_dropout_on_experts(run: TrainingRun) -> None:
    """Refuse dropout of adapters on experts. Its bytes are known, so an estimate of such a setup is given; a
    plan is for what can be trained.

    Raises:
        InputError: what PEFT refuses on adapted experts (0.21.2, tuners/lora/layer.py: ParamWrapper).
    """
    _refuse_with_adapted_experts(run.kind, "lora_dropout")


def _refuse_with_adapted_experts(run: RunKind, name: str) -> None:
    value = getattr(run.setup, name)
    if value and run.trained.experts_rank:
        raise InputError(
            f"{name} {plain(value)} does not work with adapters on experts: PEFT 0.21.2 "
            f"refuses it; name target_modules of attention alone, or leave {name} out"
        )


def _whole_checkpoints(setup: TrainingSetup) -> bool:
    """Whether every layer keeps its input alone."""
    partly = setup.selective_checkpointing or setup.checkpointed_layers is not None
    return setup.gradient_checkpointing and not partly


def _refuse_compiled(run: RunKind) -> None:
    """Refuse what compiled layers have not been measured with, naming the knob beside compile."""
    setup = run.setup
    for name, measured in (
        ("kernels", "none"),
        ("use_dora", False),
        ("prepare_for_kbit_training", False),
        ("load_in_8bit", False),
    ):
        if getattr(setup, name) != measured:
            raise NotModelledError(f"compile=regional with {name}", getattr(setup, name))
    if setup.activation_offloading and not _whole_checkpoints(setup):
        raise NotModelledError("compile=regional, layers not checkpointed and activation_offloading", True)
    if setup.dtype == "float32":
        raise NotModelledError("compile=regional with dtype", setup.dtype)
    if run.attention not in ("sdpa", "flex_attention"):
        raise NotModelledError("compile=regional with attn_implementation", run.attention)
    if any(layer.experts for layer in run.model.layers):
        raise NotModelledError("compile=regional with experts of model", run.model.id)
    refuse_other_dropout_masks(setup)


SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
"""torch's own, which update shares as they do tensors; bitsandbytes' stop in their first step at a mixture of
Tensor and DTensor (bitsandbytes 0.50.2, seen on two H200s).
"""


def unsharded_knob(setup: TrainingSetup) -> str | None:
    """The first knob with which FSDP2 dies, trains wrongly or was not tried, whoever plans it or runs it."""
    found = {
        "optim": setup.optim not in SHARDED_OPTIMIZERS,
        "use_dora": setup.use_dora,
        "dtype": setup.dtype == "float16",
        "lora_r": not setup.every_process_has_rows,
        "kernels": setup.kernels == "liger" and not setup.uses_lora,
        "prepare_for_kbit_training": setup.prepare_for_kbit_training,
        "activation_offloading": setup.activation_offloading,
    }
    return next((knob for knob, conflicts in found.items() if conflicts), None)


def _refuse_sharded(run: RunKind) -> None:
    """Refuse what FSDP2 cannot train or what is not counted with it, naming the knob beside distributed.

    Raises:
        InputError: it dies, or trains wrongly.
        NotModelledError: a knob whose memory is not modelled with it.
    """
    setup = run.setup
    knob = unsharded_knob(setup)
    if knob == "optim" and ("8bit" in setup.optim or setup.optim.startswith("paged")):
        raise InputError(
            f"optim {setup.optim} does not work with distributed fsdp: bitsandbytes' first update stops "
            f"at shared tensors; use {FASTER_OPTIM}, or distributed ddp"
        )
    if knob == "use_dora":
        raise InputError(
            "use_dora does not work with distributed fsdp, which shares out tensors of one dtype: DoRA's "
            "magnitudes are in float32; use distributed ddp"
        )
    if knob == "dtype":
        raise InputError(
            "dtype float16 does not work with distributed fsdp: its gradient scaler does not know shares; "
            "use distributed ddp"
        )
    if knob == "lora_r":
        raise InputError(
            f"lora_r {setup.lora_r} does not work for {setup.num_processes} processes with distributed fsdp: "
            "shared out by rows it leaves a GPU without any"
        )
    if knob == "kernels":
        raise NotModelledError("distributed=fsdp and method=full with kernels", setup.kernels)
    if knob is not None:
        raise NotModelledError(f"distributed=fsdp with {knob}", getattr(setup, knob))
    if any(layer.experts for layer in run.model.layers):
        raise NotModelledError("distributed=fsdp with experts of model", run.model.id)


def refuse_other_dropout_masks(setup: TrainingSetup) -> None:
    """Refuse what would train on wrong gradients, whoever plans it or runs it.

    Seen on torch 2.11 and 2.13, where the budget recomputes random numbers without their seed.

    Raises:
        InputError: a budget with dropout.
    """
    if setup.activation_memory_budget is not None and setup.lora_dropout:
        raise InputError(
            "activation_memory_budget needs lora_dropout 0: torch would draw other dropout masks for the "
            "backward pass (docs/compilation.md)"
        )
