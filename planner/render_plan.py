"""A Plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from planner.plan import Alternative, Duration, Plan
from planner.render import (
    WIDE,
    bar,
    bullets,
    columns,
    count,
    duration,
    figure,
    gib,
    heading,
    pairs,
    rate,
    signed_gib,
    yes_no,
)

METHOD_TITLES = {"qlora": "QLoRA", "lora": "16-bit LoRA", "full": "full fine-tuning"}
MAX_ALTERNATIVES = 6
BOUND_BY = {
    "compute": "the GPU's matrix work",
    "bandwidth": "the GPU's memory bandwidth",
    "launches": "the host's kernel launches",
}


def print_plan(out: Console, plan: Plan, *, explain: bool = False) -> None:
    """Print a plan: the verdict first, what it rests on last."""
    _verdict(out, plan)
    heading(out, "Setup" if plan.fits else "Smallest setup tried")
    pairs(out, _setup(plan))
    _memory(out, plan, explain)
    _methods(out, plan)
    _speed(out, plan)
    _advice(out, plan)
    _alternatives(out, plan)
    heading(out, "Before it starts")
    pairs(out, _loading(plan))
    heading(out, "Assumed")
    bullets(out, plan.assumptions)
    if plan.notes:
        heading(out, "Good to know")
        bullets(out, [note.text.replace("{size}", gib(note.size_bytes)) for note in plan.notes])
    heading(out, "What the numbers rest on")
    pairs(out, _basis(plan))


def card_title(plan: Plan) -> str:
    """What the person asked for and the card that it means."""
    target = plan.gpu
    text = target.text.strip()
    return text if text.lower() == target.spec.id and target.count == 1 else f"{text} ({target.spec.id})"


def _verdict(out: Console, plan: Plan) -> None:
    memory, usable = plan.memory, plan.gpu.usable_bytes
    word = Text("FITS", style="bold green") if plan.fits else Text("DOES NOT FIT", style="bold red")
    method = METHOD_TITLES[plan.setup.method]
    out.print(
        Text.assemble(
            word,
            f": {plan.request.model} with {method} at {plan.setup.max_length:,} tokens on {card_title(plan)}",
        )
    )
    each = "Each GPU" if plan.setup.num_processes > 1 else "It"
    need = f"{each} needs {gib(memory.peak_bytes)}, at most {gib(memory.peak_upper_bytes)}, of the "
    need += f"{gib(usable)} that the card leaves: "
    need += f"{gib(plan.headroom_bytes)} to spare." if plan.fits else f"{gib(-plan.headroom_bytes)} too much."
    out.print(Text(need))
    if plan.fits:
        return
    card = plan.smallest_gpu
    if card is None:
        out.print(Text("No card of the catalog takes it on one GPU."))
        return
    out.print(
        Text(
            f"The smallest card that takes it is {card.gpu}, which leaves {gib(card.usable_bytes)}, "
            f"with {card.max_length:,} tokens."
        )
    )


def _setup(plan: Plan) -> Iterator[tuple[str, str]]:
    setup, model = plan.setup, plan.model
    method = METHOD_TITLES[setup.method]
    if setup.method == "qlora":
        double = "double" if setup.bnb_4bit_use_double_quant else "single"
        method += f", {setup.bnb_4bit_quant_type} with {double} quantisation, the rest in {setup.dtype}"
    else:
        method += f", base in {setup.dtype}"
    yield "method", method
    if setup.uses_lora:
        targets = setup.target_modules
        where = "all linear layers" if isinstance(targets, str) else ", ".join(targets)
        variant = [name for name, on in (("DoRA", setup.use_dora), ("rsLoRA", setup.use_rslora)) if on]
        yield "adapter", ", ".join([f"rank {setup.lora_r}, alpha {setup.alpha}", where, *variant])
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
    yield "batch", f"{batch} = {setup.effective_batch_size} sequences a step"
    yield "optimizer", setup.optim
    schedule = plan.schedule
    yield (
        "learning rate",
        f"{schedule.learning_rate:g}, {schedule.lr_scheduler_type}, warm-up {schedule.warmup_ratio:g}",
    )
    yield "checkpointing", _checkpointing(plan)
    yield "attention", model.attn_implementation
    for name in ("kernels", "compile"):
        if getattr(setup, name) != "none":
            yield name, str(getattr(setup, name))
    for name in ("activation_offloading", "prepare_for_kbit_training"):
        if getattr(setup, name):
            yield name.replace("_", " "), "on"
    if setup.activation_memory_budget is not None:
        yield "memory budget", f"{setup.activation_memory_budget:g}"


def _checkpointing(plan: Plan) -> str:
    setup = plan.setup
    if not setup.gradient_checkpointing or setup.checkpointed_layers == 0:
        return "off"
    layers = plan.model.num_hidden_layers
    some = setup.checkpointed_layers
    text = f"all {layers} layers" if some is None else f"the first {some} of {layers} layers"
    return text + (", attention outputs kept" if setup.selective_checkpointing else "")


def _memory(out: Console, plan: Plan, explain: bool) -> None:
    memory = plan.memory
    parts = [c for c in memory.components if c.size_bytes or explain]
    largest = max((c.size_bytes for c in parts), default=1) or 1
    heading(out, "Memory" + (" of each GPU" if plan.setup.num_processes > 1 else ""))
    heads = [("", "text"), ("GiB", "number")]
    wide = out.width >= WIDE
    width = min(30, out.width - 48)
    if wide:
        heads.append(("", "text"))
    rows = []
    for part in parts:
        row = [part.title, figure(part.size_bytes)]
        if wide:
            row.append(bar(part.size_bytes / largest, width))
        rows.append(row)
    total = ["what the driver will show", figure(memory.process_bytes)]
    rows.append([*total, ""] if wide else total)
    columns(out, heads, rows)
    if explain:
        heading(out, "Where each part comes from")
        pairs(out, ((part.title, part.origin) for part in parts))
    _peak(out, plan)
    if explain:
        heading(out, "Peak of each phase")
        pairs(
            out,
            (
                (
                    phase.name,
                    f"{gib(phase.process_bytes)}, at most {gib(phase.process_upper_bytes)} "
                    f"({phase.peak_moment})",
                )
                for phase in memory.phases
            ),
        )


def _peak(out: Console, plan: Plan) -> None:
    memory = plan.memory
    peak = memory.peak_phase
    out.print()
    held = f", {gib(plan.gpu.held_bytes)} taken already" if plan.gpu.held_bytes else ""
    pairs(
        out,
        [
            ("peak phase", f"{peak.name}: {peak.peak_moment}"),
            ("after loading", f"{gib(memory.weights_bytes)} allocated"),
            ("allocated", f"{gib(memory.allocated_bytes)} (torch.cuda.max_memory_allocated)"),
            ("reserved", f"{gib(memory.reserved_bytes)} (torch.cuda.max_memory_reserved)"),
            (
                "driver",
                f"{gib(memory.process_bytes)}, at most {gib(memory.process_upper_bytes)} (nvidia-smi)",
            ),
            ("usable", f"{gib(plan.gpu.usable_bytes)} of the card's {gib(plan.gpu.spec.memory_bytes)}{held}"),
            ("headroom", signed_gib(plan.headroom_bytes) if not plan.fits else gib(plan.headroom_bytes)),
        ],
    )


def _methods(out: Console, plan: Plan) -> None:
    if len(plan.methods) < 2:
        return
    setup = plan.setup
    heading(
        out,
        f"Methods compared, at {setup.max_length:,} tokens, micro-batch {setup.per_device_train_batch_size}",
    )
    wide = out.width >= WIDE
    heads = [("", "name"), ("weights", "number"), ("peak GiB", "number"), ("fits", "name")]
    if wide:
        heads += [("tokens/s", "number"), ("smallest card", "name")]
    rows: list[list[str | Text]] = []
    for one in plan.methods:
        title = METHOD_TITLES[one.method] if wide else one.method
        row: list[str | Text] = [title, figure(one.weights_bytes), figure(one.peak_upper_bytes)]
        row.append(yes_no(one.fits))
        if wide:
            row += [rate(one.tokens_per_second), one.smallest_gpu or "none"]
        rows.append(row)
    columns(out, heads, rows)


def _speed(out: Console, plan: Plan) -> None:
    heading(out, "Speed")
    speed = plan.speed
    if speed is None:
        bullets(out, ["no forecast: the card's rates or the time of a knob are not known"])
        return
    sure = "calibrated" if speed.calibrated else "not calibrated on this GPU"
    rows = [
        (
            "tokens/s",
            f"about {rate(speed.tokens_per_second)} ({rate(speed.tokens_per_second_low)} to "
            f"{rate(speed.tokens_per_second_high)}; {sure})",
        ),
        ("limit", f"{rate(speed.roofline_tokens_per_second)} tokens/s is the roofline: no run exceeds it"),
        ("bound by", BOUND_BY.get(speed.bound_by, speed.bound_by)),
        ("a step", f"{duration_of_step(speed.seconds_per_optimizer_step)}"),
    ]
    if plan.duration is not None:
        rows += list(_duration(plan.duration, plan))
    if plan.data is not None:
        rows.append(("data", _data(plan)))
    pairs(out, rows)


def duration_of_step(seconds: float) -> str:
    """Seconds of one optimizer step."""
    return f"{seconds:.2f} s" if seconds < 10 else duration(seconds / 3600)


def _duration(found: Duration, plan: Plan) -> Iterator[tuple[str, str]]:
    interval = f"{duration(found.hours)} ({duration(found.hours_low)} to {duration(found.hours_high)})"
    if found.steps is None:
        yield "a million tokens", interval
    else:
        epochs = f"{plan.schedule.num_train_epochs:g} epochs"
        yield "time", f"{interval} for {epochs}, {found.steps:,} steps, {count(found.tokens)} tokens"
    if found.usd is not None and found.usd_per_gpu_hour is not None:
        yield "price", f"${found.usd:,.2f} at ${found.usd_per_gpu_hour:g} an hour and GPU"


def _data(plan: Plan) -> str:
    data = plan.data
    if data is None:
        return ""
    text = f"{data.examples:,} examples, longest {data.longest:,} tokens, {data.covered_percent:.3g}% whole"
    if data.truncated_examples:
        lost = data.truncated_tokens / data.total_tokens
        text += f"; {data.truncated_examples:,} are cut, losing {data.truncated_tokens:,} tokens ({lost:.2%})"
    return text


def _advice(out: Console, plan: Plan) -> None:
    if not plan.advice:
        return
    heading(out, "To use what is left" if plan.fits else "To make it fit")
    table: list[list[str | Text]] = []
    wide = out.width >= WIDE
    for one in plan.advice:
        row: list[str | Text] = [one.title, figure(one.peak_upper_bytes)]
        if not plan.fits:
            row.append(yes_no(one.fits))
        if wide:
            if plan.fits:
                row.append(rate(one.tokens_per_second))
            row.append(one.flags or one.effect)
        table.append(row)
    heads = [("", "text"), ("peak GiB", "number")]
    if not plan.fits:
        heads.append(("fits", "name"))
    if wide:
        if plan.fits:
            heads.append(("tokens/s", "number"))
        heads.append(("", "text"))
    columns(out, heads, table)


def _alternatives(out: Console, plan: Plan) -> None:
    if not plan.alternatives or not plan.fits:
        return
    shown = plan.alternatives[:MAX_ALTERNATIVES]
    heading(out, "Why not another setup")
    rows = []
    for one in shown:
        batch = f"{one.per_device_train_batch_size} x {one.gradient_accumulation_steps}"
        row = [batch, one.strategy, _lost(one)]
        if out.width >= WIDE:
            row.insert(2, figure(one.peak_upper_bytes))
        rows.append(row)
    heads = [("batch", "number"), ("", "text"), ("", "text")]
    if out.width >= WIDE:
        heads.insert(2, ("peak GiB", "number"))
    columns(out, heads, rows)


def _lost(one: Alternative) -> str:
    if one.lost == "too large":
        return f"{gib(one.amount)} too large"
    if one.lost == "slower":
        return f"{one.amount:.1%} slower"
    return "as fast, but larger"


def _loading(plan: Plan) -> Iterator[tuple[str, str]]:
    need = plan.loading
    unknown = "unknown"
    yield "download", gib(need.download_bytes) if need.download_bytes is not None else unknown
    yield "disk", gib(need.disk_bytes) if need.disk_bytes is not None else unknown
    yield "host memory", f"about {gib(need.host_memory_bytes)}"


def _basis(plan: Plan) -> Iterator[tuple[str, str]]:
    basis = plan.memory.basis
    yield (
        "memory",
        f"{basis.coefficients}, {basis.record_count:,} measured runs; "
        + ("a setup like this was measured" if basis.measured else "no setup like this was measured"),
    )
    if basis.stack_versions:
        yield "stack", ", ".join(f"{name} {version}" for name, version in basis.stack_versions)
    for note in basis.notes:
        yield "", note
    yield (
        "card",
        f"usable memory of {plan.gpu.spec.id}: "
        + ("seen on such cards" if plan.gpu.spec.usable_is_measured else "a bound, not seen on one"),
    )
    yield "model", plan.model.source
    if plan.speed is not None:
        yield "speed", plan.speed.basis
