"""Compile decoder layers one by one ("regional compilation"), keeping what the setup's checkpointing keeps.

transformers calls torch.utils.checkpoint inside a layer's forward (modeling_layers.py,
GradientCheckpointingLayer), so a compiled layer contains its checkpoint: the compiler marks the operators
inside as "recompute" and its partitioner obeys. torch 2.11 marks what Dynamo traced alone
(torch/_higher_order_ops/wrap.py, `tag_nodes`), not the operators inside a custom autograd.Function: those
of bitsandbytes' MatMul4Bit stay unmarked. The partitioner never recomputes an unmarked operator that it does
not know, so the output of every 4-bit linear layer is kept. A checkpoint that is given a policy marks at
dispatch, where every operator passes; torch 2.13 does so by itself. `RecomputeAll` gives it one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launcher.training.callbacks import decoder_layers
from launcher.training.several.whole import is_sharded

RECOMPILE_LIMIT = 64
"""Variants of a layer that may be compiled before torch silently runs it uncompiled (torch's default is 8).

All layers share one count. Training and evaluation, with and without a padding mask, fixed and varying
length, checkpointed and not, and a batch of one sequence are variants of their own.
"""


def compile_decoder_layers(
    model: torch.nn.Module, *, activation_memory_budget: float | None, backend: str = "inductor"
) -> TrainerCallback:
    """Compile each decoder layer in place; returns the callback that must see the start of training.

    Layers of one shape share the compiled code. Compiler state of earlier models in this process is dropped,
    and torch's process-wide settings are set anew, so what is kept does not depend on earlier runs.
    """
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config

    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._functorch.config.activation_memory_budget = (
        1.0 if activation_memory_budget is None else activation_memory_budget
    )
    # By default whatever a matrix product of the backward pass reads is kept, a norm's output and the gated
    # product of the MLP too. Those are elementwise to recompute, and are 38% of what a Llama layer keeps.
    torch._functorch.config.ban_recompute_materialized_backward = False
    # Checks of what each operator returns, thousands in a step, which the host has no time for.
    torch._inductor.config.size_asserts = False
    torch._inductor.config.alignment_asserts = False
    keep_compiled()
    for layer in decoder_layers(model):
        if is_sharded(layer):
            # FSDP2's hooks gather and free what the layer computes with: outside of what is compiled. With
            # them inside (layer.compile) torch's compiler leaves the layer as it is, without a word.
            layer.forward = torch.compile(layer.forward, backend=backend)
        else:
            layer.compile(backend=backend)
    return RecomputeAll()


def keep_compiled() -> None:
    """Have graphs with functions of autograd's own, as 4-bit layers are, kept between runs too.

    torch leaves them out of its cache of whole graphs, as such a function could read what its graph does not
    show. These read their arguments alone: tensors, and numbers that the traced graph has.
    """
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True


class RecomputeAll(TrainerCallback):  # type: ignore[misc]
    """Gives every checkpoint without a policy of its own the policy to recompute all."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Change what the trainer has set up just before."""
        recompute_all(kwargs["model"])


def recompute_all(model: torch.nn.Module) -> None:
    """Give the checkpoint of each checkpointed decoder layer a policy, unless it has one (selective)."""
    for layer in decoder_layers(model):
        if not layer.gradient_checkpointing:
            continue
        function: partial[Any] = layer._gradient_checkpointing_func
        if "context_fn" not in function.keywords:
            layer._gradient_checkpointing_func = partial(function, context_fn=_contexts)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_recompute)


_contexts.cache_hash = "vramwise: recompute all"  # type: ignore[attr-defined]
"""Without a name that stands for its behaviour torch caches no graph that a policy has marked."""


def _recompute(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE
