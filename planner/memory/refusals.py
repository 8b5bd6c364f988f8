"""Knobs whose memory is not modelled: refused by name, never ignored."""

from __future__ import annotations

from planner.base.errors import FieldError, InputError, NotModelledError
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

MODELLED_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flex_attention")
MODELLED_EXPERTS = (None, "grouped_mm")


def refuse_unmodelled(run: TrainingRun) -> None:
    """Refuse what the memory model has no terms for.

    Raises:
        NotModelledError: a knob of the contract, by name.
        FieldError: more checkpointed layers than the model has.
    """
    setup, model, attention = run.setup, run.model, run.attention
    if setup.compile != "none":
        _refuse_compiled(run)
    several = run.parallelism
    if not several.is_single and several.strategy != "ddp":
        raise NotModelledError("distributed", several.strategy)
    if not several.is_single:
        raise NotModelledError("num_processes", several.num_processes)
    if attention not in MODELLED_ATTENTION:
        raise NotModelledError("attn_implementation", attention)
    if any(layer.attention_softcap for layer in model.layers) and attention == "sdpa":
        raise FieldError(
            "attn_implementation", "sdpa", "eager for this model, whose attention scores are capped"
        )
    if model.default_experts_implementation not in MODELLED_EXPERTS:
        raise NotModelledError("experts_implementation", model.default_experts_implementation)
    if any(layer.shared_expert_intermediate_size for layer in model.layers):
        raise NotModelledError("shared experts of model", model.id)
    if setup.checkpointed_layers is not None and setup.checkpointed_layers > model.num_hidden_layers:
        raise FieldError(
            "checkpointed_layers",
            setup.checkpointed_layers,
            f"at most {model.num_hidden_layers}, the decoder layers",
        )


def _whole_checkpoints(setup: TrainingSetup) -> bool:
    """Whether every layer keeps its input alone."""
    partly = setup.selective_checkpointing or setup.checkpointed_layers is not None
    return setup.gradient_checkpointing and not partly


def _refuse_compiled(run: TrainingRun) -> None:
    """Refuse what compiled layers have not been measured with, naming the knob beside compile."""
    setup = run.setup
    for name, measured in (
        ("kernels", "none"),
        ("use_dora", False),
        ("prepare_for_kbit_training", False),
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
