"""What a script's trainer does otherwise than a plan: read from its arguments, model, data and machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from launcher.runs import stack
from launcher.runs.allocator import process_allocator
from launcher.training import adapters, build
from launcher.training.arguments import how_it_runs
from planner.answers.plan import Plan
from planner.gpus.catalog import gpu_catalog
from planner.setup.cuda_allocator import EXPANDABLE, EXPANDABLE_SETTING, VARIABLE, planned_allocator
from vramwise.comparison import Difference

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel
    from trl import SFTConfig

_ADAPTER = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias")
_QUANTISATION = (
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
)


def differences(plan: Plan, args: SFTConfig, model: PreTrainedModel) -> tuple[Difference, ...]:
    """All of them that can be told before the first step, the data's apart."""
    return (*_arguments(plan, args), *_model(plan, model), *_machine(plan, on_gpu=not args.use_cpu))


def _arguments(plan: Plan, args: SFTConfig) -> Iterator[Difference]:
    """Arguments that change memory or speed."""
    # No second SFTConfig for comparison: making one resets what accelerate knows of the process.
    for name, planned in how_it_runs(plan.setup, on_gpu=not args.use_cpu).items():
        found = getattr(args, name, None)
        yield from _unlike(name, planned, getattr(found, "value", found))
    yield from _unlike("num_processes", plan.setup.num_processes, args.world_size)


def _model(plan: Plan, model: PreTrainedModel) -> Iterator[Difference]:
    """Adapter, quantisation, dtype, attention and size of the model that the trainer has."""
    config = model.config
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    yield from _unlike("decoder layers", plan.model.num_hidden_layers, layers)
    yield from _unlike("attn_implementation", plan.model.attn_implementation, config._attn_implementation)
    dtype = model.get_input_embeddings().weight.dtype
    yield from _unlike("dtype of the embedding", build.torch_dtype(plan.setup), dtype)
    wanted = build.quantization_config(plan.setup)
    found = getattr(config, "quantization_config", None)
    for name in _QUANTISATION if wanted is not None or found is not None else ():
        yield from _unlike(name, getattr(wanted, name, None), getattr(found, name, None))
    carried = getattr(model, "peft_config", {})
    if len(carried) > 1:
        yield Difference(name="adapters", planned="one", here=str(len(carried)))
    adapter, own = next(iter(carried.values()), None), adapters.lora_config(plan.setup)
    for name in _ADAPTER if adapter is not None or own is not None else ():
        yield from _unlike(name, getattr(own, name, None), getattr(adapter, name, None))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield from _unlike("trained parameters", plan.model.trainable_parameters, trained)


def _machine(plan: Plan, *, on_gpu: bool) -> Iterator[Difference]:
    """The card, torch's allocator, and releases other than those that the figures were measured with."""
    import torch

    if not on_gpu:
        yield Difference(name="GPU", planned=plan.gpu.spec.name, here="none, it runs on the CPU")
    else:
        card = torch.cuda.get_device_properties(0)
        found = gpu_catalog().match_driver(card.name, card.total_memory)
        if found is None or found.id != plan.gpu.spec.id:
            yield Difference(name="GPU", planned=plan.gpu.spec.name, here=card.name)
        allocator, planned = process_allocator(os.environ), planned_allocator()
        if allocator != planned:
            mend = f" (set {VARIABLE}={EXPANDABLE_SETTING} before Python starts)"
            yield Difference(
                name="allocator", planned=planned, here=allocator + (mend if planned == EXPANDABLE else "")
            )
    here = dict(stack.versions())
    for package, version in plan.memory.basis.stack_versions:
        release = here.get(package, "none").partition("+")[0]
        if release.split(".")[:2] != version.split(".")[:2]:
            yield Difference(name=package, planned=f"by runs with {version}", here=release)


def of_rows(plan: Plan, rows: Dataset | None) -> Iterator[Difference]:
    """The longest example where it is shorter than what memory was planned for; packed rows are full."""
    if plan.setup.packing or rows is None or "input_ids" not in (getattr(rows, "column_names", None) or ()):
        return
    import pyarrow.compute as pc

    table = rows.with_format("arrow")[:]
    longest = pc.max(pc.list_value_length(table["input_ids"])).as_py()
    planned = plan.setup.max_length if plan.data is None else min(plan.setup.max_length, plan.data.longest)
    yield from _unlike("tokens of the longest example", planned, longest)


def _unlike(name: str, planned: Any, here: Any) -> Iterator[Difference]:
    if planned != here:
        yield Difference(name=name, planned=_plain(planned), here=_plain(here))


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).removeprefix("torch.")
