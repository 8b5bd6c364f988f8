"""A Plan as text, all of it: the verdict first, what it rests on last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from planner.answers.plan import Plan, PlannedModel
from planner.setup.adapters import UNCOMMON
from planner.setup.card_limits import torch_build
from planner.setup.defaults import KEPT_CHECKPOINTS, SAVE_MINUTES
from planner.setup.knob import Knob, plain
from planner.setup.knobs import KNOBS
from planner.setup.training_setup import TrainingSetup
from planner.text.choice import (
    METHOD_TITLES,
    print_advice,
    print_frontier,
    print_methods,
    print_runners_up,
)
from planner.text.data import print_data
from planner.text.figures import bullets, count, gib, heading, pairs
from planner.text.memory import print_memory
from planner.text.speed import print_other_cards, print_speed
from planner.text.verdict import print_verdict
from planner.text.ways import print_ways
from planner.throughput.torch_attention import TORCH_KERNELS

if TYPE_CHECKING:
    from rich.console import Console


def print_plan(out: Console, plan: Plan, *, explain: bool = False) -> None:
    """Print a plan: the verdict first, what it rests on last."""
    print_verdict(out, plan)
    heading(out, "Setup" if plan.fits else "Smallest setup tried")
    pairs(out, setup_lines(plan))
    print_memory(out, plan, explain=explain)
    print_ways(out, plan)
    print_methods(out, plan)
    print_speed(out, plan)
    print_data(out, plan)
    print_frontier(out, plan)
    print_runners_up(out, plan)
    print_advice(out, plan)
    print_other_cards(out, plan)
    heading(out, "Before it starts")
    pairs(out, _loading(plan))
    heading(out, "Assumed")
    bullets(out, plan.assumptions)
    if plan.notes:
        heading(out, "Good to know")
        bullets(out, [note.text.replace("{size}", gib(note.size_bytes)) for note in plan.notes])
    heading(out, "What the numbers rest on")
    pairs(out, _basis(plan))


def setup_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """What was chosen, by the names that people use."""
    setup, model = plan.setup, plan.model
    method = METHOD_TITLES[setup.method]
    if setup.load_in_8bit:
        method = f"LoRA on a base in 8 bits (int8), the rest in {setup.dtype}"
    elif setup.method == "qlora":
        double = "double" if setup.bnb_4bit_use_double_quant else "single"
        method += f", {setup.bnb_4bit_quant_type} with {double} quantisation, the rest in {setup.dtype}"
    else:
        method += f", base in {setup.dtype}"
    yield "method", method
    if setup.uses_lora:
        targets = setup.target_modules
        where = "all linear layers" if isinstance(targets, str) else ", ".join(targets)
        variant = [name for name, on in (("DoRA", setup.use_dora), ("rsLoRA", setup.use_rslora)) if on]
        if setup.init_lora_weights != "default":
            variant.append(f"{setup.init_lora_weights} beginning")
        for name, usual in UNCOMMON:
            if getattr(setup, name) != usual:
                variant.append(f"{name} {plain(getattr(setup, name))}")
        if setup.loraplus_lr_ratio is not None:
            variant.append(f"LoRA+ {setup.loraplus_lr_ratio:g}")
        size = f"rank {setup.lora_r}, alpha {setup.alpha}"
        if setup.peft_type != "lora":
            size = f"{'blocks of' if setup.peft_type == 'oft' else 'rank'} {setup.lora_r}"
        yield "adapter", ", ".join([size, where, *variant])
        if setup.lora_dropout:
            yield "dropout", f"{setup.lora_dropout:g}"
    share = model.trainable_parameters / model.parameter_count
    yield (
        "trained",
        f"{count(model.trainable_parameters)} of {count(model.parameter_count)} parameters ({share:.2%})",
    )
    yield "length", f"{setup.max_length:,} tokens" + (", packed" if setup.packing else "")
    batch = f"{setup.per_device_train_batch_size} x {setup.gradient_accumulation_steps} accumulated"
    if setup.num_processes > 1:
        batch += f" x {setup.num_processes} GPUs ({setup.distributed})"
    yield "batch", f"{batch} = {_a_step(plan)} a step"
    yield "optimizer", setup.optim
    schedule = plan.schedule
    yield (
        "learning rate",
        f"{schedule.learning_rate:g}, {schedule.lr_scheduler_type}, warm-up {schedule.warmup_ratio:g}",
    )
    yield "checkpointing", _checkpointing(plan)
    yield "attention", _attention(model)
    yield from knob_lines(setup)
    if setup.base_matmul in LEARNING:
        yield "learning", LEARNING[setup.base_matmul]


def _attention(model: PlannedModel) -> str:
    """The implementation, and which of torch's kernels it runs."""
    words = [kernel.words for kernel in TORCH_KERNELS if kernel.name in model.attention_kernels]
    return model.attn_implementation + (f": torch's {' and '.join(words)}" if words else "")


LEARNING = {
    "fp8_backward": "8-bit gradients: evaluation loss +0.0002, where seeds differ by 0.005 (SmolLM2-135M)",
    "fp8": "8-bit products: evaluation loss +0.005, where seeds differ by 0.005 (SmolLM2-135M)",
}
"""What 8-bit products cost, measured: docs/eight-bit.md."""


def knob_lines(setup: TrainingSetup, knobs: tuple[Knob, ...] = KNOBS) -> Iterator[tuple[str, str]]:
    """Knobs that have a line of their own where they are not as by default."""
    lines = [(knob.line.place, knob.line.label, knob) for knob in knobs if knob.line is not None]
    for _, label, knob in sorted(lines, key=lambda line: line[0]):
        value = getattr(setup, knob.name)
        if value != knob.default:
            yield label, "on" if value is True else plain(value)


def _a_step(plan: Plan) -> str:
    rows, per_row = plan.setup.effective_batch_size, plan.schedule.examples_per_row
    if per_row is None:
        return f"{rows} {plan.setup.objective.examples}"
    each = "row" if rows == 1 else "rows"
    about = plan.schedule.effective_batch_size
    return f"{rows} {each} of {per_row:.2g} examples, about {about} examples"


def _checkpointing(plan: Plan) -> str:
    setup = plan.setup
    if not setup.gradient_checkpointing or setup.checkpointed_layers == 0:
        return "off"
    layers = plan.model.num_hidden_layers
    some = setup.checkpointed_layers
    text = f"all {layers} layers" if some is None else f"the first {some} of {layers} layers"
    return text + (", attention outputs kept" if setup.selective_checkpointing else "")


def _loading(plan: Plan) -> Iterator[tuple[str, str]]:
    need = plan.loading
    unknown = "unknown"
    yield "download", gib(need.download_bytes) if need.download_bytes is not None else unknown
    yield "disk", gib(need.disk_bytes) if need.disk_bytes is not None else unknown
    yield "checkpoints", _checkpoints(plan)
    yield "host memory", f"about {gib(need.host_memory_bytes)}"
    build = torch_build(plan.gpu.spec)
    if build is not None:
        yield "torch", build


def _checkpoints(plan: Plan) -> str:
    return (
        f"{KEPT_CHECKPOINTS} of {gib(plan.loading.checkpoint_bytes)} kept in the run folder, one every "
        f"{SAVE_MINUTES:g} minutes and each epoch"
    )


def _basis(plan: Plan) -> Iterator[tuple[str, str]]:
    basis = plan.memory.basis
    covered = "which cover this setup" + ("" if basis.measured else ", but for this:")
    yield "memory", f"{basis.coefficients}, {basis.record_count:,} measured runs, {covered}"
    for note in basis.notes:
        yield "", f"- {note}"
    if basis.stack_versions:
        yield "stack", ", ".join(f"{name} {version}" for name, version in basis.stack_versions)
    yield (
        "card",
        f"usable memory of {plan.gpu.spec.id}: "
        + ("seen on such cards" if plan.gpu.spec.usable_is_measured else "a bound, not seen on one"),
    )
    yield "model", plan.model.source
    if plan.speed is not None:
        yield "speed", plan.speed.basis
