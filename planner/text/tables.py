"""Tables of estimates, GPUs, models and comparisons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.text import Text

from planner.base.errors import VramwiseError
from planner.gpus.detect import LocalGpu
from planner.gpus.spec import GpuSpec
from planner.gpus.target import GpuTarget
from planner.models.catalog import ModelSummary
from planner.planning.comparison import LargestModels, Row, SmallestCard
from planner.planning.estimation import Estimate
from planner.text.data import not_trained
from planner.text.figures import (
    WIDE,
    bullets,
    columns,
    count,
    duration,
    epochs,
    figure,
    footnote,
    gib,
    heading,
    rate,
    yes_no,
)

VERY_WIDE = 100
SHOWN_MODELS = 25


def print_estimates(
    out: Console, answers: Sequence[tuple[int, Estimate | VramwiseError]], target: GpuTarget
) -> None:
    """Print one row for each setup; bad lines are reported by the command."""
    out.print(Text(f"{target.spec.id} leaves {gib(target.usable_bytes)}; all figures in GiB, of one GPU"))
    wide, very_wide = out.width >= WIDE, out.width >= VERY_WIDE
    heads = [("line", "number"), ("model", "name")]
    if wide:
        heads += [("method", "name"), ("length", "number"), ("batch", "number")]
    if very_wide:
        heads.append(("allocated", "number"))
    heads += [("driver", "number")] if wide else []
    heads += [("at most", "number"), ("fits", "name")]
    if wide:
        heads.append(("tokens/s", "number"))
    rows: list[list[str | Text]] = []
    for number, answer in answers:
        if isinstance(answer, VramwiseError):
            continue
        setup, memory = answer.setup, answer.memory
        row: list[str | Text] = [str(number), setup.model]
        if wide:
            row += [setup.method, f"{setup.max_length:,}", str(setup.per_device_train_batch_size)]
        if very_wide:
            row.append(figure(memory.allocated_bytes))
        if wide:
            row.append(figure(memory.process_bytes))
        row += [figure(memory.peak_upper_bytes), yes_no(answer.fits)]
        if wide:
            row.append(rate(answer.tokens_per_second))
        rows.append(row)
    columns(out, heads, rows, indent=0)


def print_gpus(out: Console, gpus: Iterable[GpuSpec]) -> None:
    """Print the catalog's cards."""
    wide = out.width >= WIDE
    heads = [("card", "name"), ("usable GiB", "number")]
    if wide:
        heads += [
            ("GB/s", "number"),
            ("TFLOPS", "number"),
            ("type", "name"),
            ("capability", "number"),
            ("$/h", "number"),
        ]
    rows: list[list[str]] = []
    for gpu in gpus:
        row = [gpu.id, figure(gpu.usable_bytes) + ("" if gpu.usable_is_measured else " *")]
        if wide:
            row += [
                _scaled(gpu.bandwidth_bytes_per_second, 1e9),
                _scaled(gpu.peak_matrix_flops_per_second, 1e12),
                gpu.dtype,
                ".".join(map(str, gpu.compute_capability)),
                "" if gpu.price_usd_per_hour is None else f"{gpu.price_usd_per_hour:.2f}",
            ]
        rows.append(row)
    columns(out, heads, rows, indent=0)
    out.print()
    footnote(out, "* a bound, not seen on such a card. A display takes about 1.2 GiB of it.")
    if wide:
        footnote(out, "TFLOPS: dense 16-bit matrix rate with fp32 accumulation.")
        footnote(out, "$/h: one provider's price on demand; a plan says whose, and of which day.")


def print_local_gpus(out: Console, gpus: Sequence[LocalGpu], reason: str | None) -> None:
    """Print the GPUs of this machine, or why there are none."""
    heading(out, "On this machine")
    if reason is not None:
        bullets(out, [reason])
        return
    heads = [("", "number"), ("card", "name"), ("free GiB", "number"), ("of", "number"), ("catalog", "name")]
    columns(
        out,
        heads,
        [
            [
                str(gpu.index),
                gpu.spec.name,
                figure(gpu.free_bytes),
                figure(gpu.spec.usable_bytes),
                gpu.spec.id if gpu.in_catalog else "not in it",
            ]
            for gpu in gpus
        ],
    )


def print_models(out: Console, models: Sequence[ModelSummary]) -> None:
    """Print the catalog's models."""
    wide = out.width >= WIDE
    heads = [("model", "name"), ("parameters", "number")]
    if wide:
        heads += [("longest", "number"), ("Hub id", "text")]
    rows = []
    for model in models:
        row = [model.id, count(model.parameter_count)]
        if wide:
            row += [f"{model.max_position_embeddings:,}", model.hub_id]
        rows.append(row)
    columns(out, heads, rows, indent=0)


def print_rows(out: Console, rows: Sequence[Row]) -> None:
    """Print models on GPUs, each with its planned setup; prices where one is known and there is room. Of data
    time and price are of the whole run.
    """
    wide = out.width >= WIDE
    of_data = any(one.data is not None for one in rows)
    priced = wide and any(one.usd_per_million_tokens is not None for one in rows)
    heads, table = _rows(rows, wide=wide, priced=priced, of_data=of_data)
    if priced and _width(heads, table) > out.width:
        priced = False
        heads, table = _rows(rows, wide=wide, priced=priced, of_data=of_data)
    columns(out, heads, table, indent=0)
    out.print()
    if not all(one.fits for one in rows):
        footnote(out, "Where nothing fits, the figures are those of the smallest setup tried.")
    if of_data:
        for told in dict.fromkeys(_of_data(rows)):
            footnote(out, told)
    elif wide:
        footnote(out, "h/M: hours for a million tokens. Speeds follow from published rates, not calibrated.")
    if priced:
        what = "the run" if of_data else "them"
        unit = "$" if of_data else "$/M"
        footnote(out, f"{unit}: dollars for {what}; ? where no price is known. plan says whose price it is.")


def _of_data(rows: Sequence[Row]) -> Iterator[str]:
    """What of the data is trained and what is not."""
    for one in rows:
        if one.data is not None and one.duration is not None and one.num_train_epochs is not None:
            yield (
                f"time: of {epochs(one.num_train_epochs)} of {one.data.examples:,} examples of "
                f"{one.data.path}, {count(one.duration.tokens)} tokens in all. Speeds follow from published "
                "rates, not calibrated."
            )
    for one in rows:
        if one.data is not None and (left := not_trained(one.data)):
            yield f"At {one.max_length:,} tokens: {left}."


def _rows(
    rows: Sequence[Row], *, wide: bool, priced: bool, of_data: bool
) -> tuple[list[tuple[str, str]], list[list[str | Text]]]:
    heads = [("model", "name"), ("GPU", "name"), ("fits", "name"), ("peak GiB", "number")]
    if wide:
        heads += [("length", "number"), ("batch", "number"), ("tokens/s", "number")]
        heads.append(("time", "name") if of_data else ("h/M", "number"))
    if priced:
        heads.append(("$" if of_data else "$/M", "number"))
    table: list[list[str | Text]] = []
    for one in rows:
        row: list[str | Text] = [one.model, one.gpu, yes_no(one.fits), figure(one.peak_upper_bytes)]
        if wide:
            row += [
                f"{one.max_length:,}",
                f"{one.per_device_train_batch_size} x {one.gradient_accumulation_steps}",
                rate(one.tokens_per_second),
                _time(one),
            ]
        if priced:
            row.append(_price(one))
        table.append(row)
    return heads, table


def _time(one: Row) -> str:
    """Of the data's run, else hours for a million tokens."""
    if one.data is None:
        hours = one.hours_per_million_tokens
        return "?" if hours is None else f"{hours:.2g}"
    return "?" if one.duration is None else duration(one.duration.hours)


def _price(one: Row) -> str:
    """Of the data's run, else of a million tokens."""
    usd = one.usd_per_million_tokens
    if one.data is not None:
        usd = None if one.duration is None else one.duration.usd
    return "?" if usd is None else f"{usd:.2f}" if usd >= 0.005 else "<0.01"


def _width(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[str | Text]]) -> int:
    """Columns of a table of which nothing gives way, two blanks between them."""
    widest = (max(len(head), *(len(row[index]) for row in rows)) for index, (head, _) in enumerate(heads))
    return sum(widest) + 2 * (len(heads) - 1)


def print_smallest_cards(out: Console, model: str, cards: Sequence[SmallestCard]) -> None:
    """Print the smallest card for a desktop and the smallest to rent, for each method and length."""
    out.print(Text(f"Smallest cards for {model}, by the leanest setup that a plan tries"))
    heads = [("method", "name"), ("length", "number"), ("peak GiB", "number")]
    heads += [("desktop card", "name"), ("card to rent", "name")]
    rows = [
        [
            one.method,
            f"{one.max_length:,}",
            figure(one.peak_upper_bytes),
            one.desktop_card or "none",
            one.rented_card or "none",
        ]
        for one in cards
    ]
    columns(out, heads, rows, indent=0)


def print_largest_models(out: Console, target: GpuTarget, method: str, found: LargestModels) -> None:
    """Print the largest models that fit on a card, and how long their sequences may be."""
    out.print(
        Text(
            f"Largest models on {target.spec.id} ({gib(target.usable_bytes)} usable) with {method}, "
            "by the leanest setup that a plan tries"
        )
    )
    if not found.models:
        bullets(out, ["none of the catalog fits"])
        return
    heads = [("model", "name"), ("parameters", "number"), ("longest", "number"), ("peak GiB", "number")]
    rows = [
        [
            one.model,
            count(one.parameter_count),
            f"{one.max_length:,}" + (" *" if one.reaches_model_limit else "  "),
            figure(one.peak_upper_bytes),
        ]
        for one in found.models[:SHOWN_MODELS]
    ]
    columns(out, heads, rows, indent=0)
    out.print()
    footnote(out, "* the longest that the model was made for.")
    smaller = found.smaller + max(0, len(found.models) - SHOWN_MODELS)
    if smaller:
        footnote(out, f"{smaller} smaller models fit too (--json lists them).")


def _scaled(value: float | None, unit: float) -> str:
    return "?" if value is None else f"{value / unit:,.4g}"
