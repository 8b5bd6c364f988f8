"""Compiled layers under FSDP2 on the CPU: run in one process a rank, by test_compiled_shards.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from transformers import AutoConfig

from launcher.measuring.random_weights import random_filling
from launcher.training.build import torch_dtype
from launcher.training.callbacks import decoder_layers
from launcher.training.compilation import compile_decoder_layers, recompute_all
from launcher.training.several.ranks import asked_ranks, join
from launcher.training.several.sharding import sharded_model
from planner.setup.training_setup import TrainingSetup
from tests.bfloat16 import multiply_in_float32_without_units
from tests.stack.small_models import BASE, FAMILIES

LENGTH, STEPS = 64, 2
PARTITIONED = "aot_eager_decomp_partition"  # inductor's partitioner without its code generation
CASES: dict[str, dict[str, Any]] = {
    # QLoRA has its adapters in bfloat16 whatever the base is computed in.
    "qlora, all kept": {"method": "qlora", "dtype": "bfloat16", "gradient_checkpointing": False},
    "qlora, checkpointed": {"method": "qlora", "dtype": "bfloat16"},
    "full, checkpointed": {"method": "full", "dtype": "float32"},
}
"""Float32 where a method allows: a CPU multiplies it, and losses are the same to many digits."""


def setup_of(case: str) -> TrainingSetup:
    """A case's setup."""
    return TrainingSetup(
        model="llama",
        max_length=LENGTH,
        lora_r=8,
        optim="adamw_torch",
        num_processes=2,
        distributed="fsdp",
        compile="regional",
        **CASES[case],
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """Losses of a few steps, graphs and breaks of the compiler, and bytes that each layer kept."""

    losses: list[float]
    graphs: int
    breaks: int
    kept: list[int]


def measured_rank(folder: str) -> int:
    """Write what this rank found."""
    torch.set_num_threads(1)
    multiply_in_float32_without_units()
    ranks = asked_ranks()
    join(ranks, on_gpu=False)
    found = {
        case: {how: dataclasses.asdict(_trained(case, how, ranks.rank)) for how in ("eager", "compiled")}
        for case in CASES
    }
    Path(folder, f"rank{ranks.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _trained(case: str, how: str, rank: int) -> Found:
    model = _model(case)
    counters = torch._dynamo.utils.counters
    counters.clear()
    if how == "compiled":
        compile_decoder_layers(model, activation_memory_budget=None, backend=PARTITIONED)
        recompute_all(model)
    kept = _watched(model) if how == "compiled" else []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        kept.clear()
        torch.manual_seed(2 * step + rank)
        ids = torch.randint(0, BASE["vocab_size"], (1, LENGTH))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    breaks = sum(counters["graph_break"].values())
    return Found(losses, counters["stats"]["unique_graphs"], breaks, list(kept))


def _model(case: str) -> Any:
    setup = setup_of(case)
    torch.manual_seed(5)
    config = AutoConfig.for_model(**FAMILIES["llama"])
    filling = random_filling(torch_dtype(setup))
    model: Any = sharded_model(setup, config, filling, device=torch.device("cpu"), seed=0)
    model.train()
    # As TRL's trainer does with adapters (trl/trainer/sft_trainer.py).
    model.enable_input_require_grads()
    if setup.gradient_checkpointing:
        base = model.get_base_model() if setup.uses_lora else model
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _watched(model: Any) -> list[int]:
    """What each layer saves of what it has computed: its inputs and what FSDP2 has freed again, which takes
    nothing then, left out. Filled by each forward pass.
    """
    kept: list[int] = []
    for layer in decoder_layers(model):
        inputs: set[int] = set()

        def note(module: Any, args: Any, kwargs: Any, inputs: set[int] = inputs) -> None:
            tensors = (*args, *kwargs["position_embeddings"])
            inputs.clear()
            inputs.update(one.untyped_storage().data_ptr() for one in tensors)
            inputs.update(one.untyped_storage().data_ptr() for one in _constants(module))

        def count(module: Any, args: Any, out: Any, inputs: set[int] = inputs) -> None:
            saved = {t.untyped_storage().data_ptr(): t for t in out.grad_fn.saved_tensors}
            own = (t for place, t in saved.items() if place not in inputs and t.is_floating_point())
            kept.append(sum(t.untyped_storage().nbytes() for t in own))

        layer.register_forward_pre_hook(note, with_kwargs=True)
        layer.register_forward_hook(count)
    return kept


def _constants(layer: Any) -> list[torch.Tensor]:
    """Constants of 4-bit weights that every rank holds whole."""
    states = [state for one in layer.modules() if (state := getattr(one, "quant_state", None)) is not None]
    return [one for s in states for one in (s.code, s.offset, s.state2.absmax, s.state2.code)]
