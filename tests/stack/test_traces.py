"""The memory model against allocation traces of real training steps on an H100.

Each trace is every block that torch's allocator handed out and took back in one step of a small model.
Replayed, it gives live bytes at every moment; the model has to give the same peaks, phase by phase, and where
the trace says who asked for what is live at its peak (tests/stack/attribution.py), the same parts.
"""

from __future__ import annotations

import functools
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.models.inspect import inspect_config
from planner.base.units import DTYPE_WIDTH
from planner.memory.estimate import live_memory
from planner.memory.measured.files import coefficients_for
from planner.memory.step.timeline import StepMoment, StepTimeline
from planner.setup.cuda_allocator import NATIVE
from planner.setup.run import TrainingRun
from planner.setup.stack import TRL
from planner.setup.training_setup import TrainingSetup
from tests.each import for_each

from .attribution import live_bytes

TRACES = Path(__file__).parent / "traces"
NAMES = sorted(path.name.removesuffix(".json.gz") for path in TRACES.glob("*.json.gz"))
MIB = 2**20

TOLERANCE = 0.0002
"""Vectors of a few bytes a token (positions, the head's statistics) are all that the model rounds away."""
PEAK_TOLERANCE = {
    # 1 MiB: the model's rotary tables are in the load dtype, OLMo 2 keeps them in fp32.
    "olmo2_q": 0.002,
    "olmo2_liger": 0.002,
    # 2 MiB: routing indices and sorted copies of them.
    "moe_q": 0.0015,
    # 1 MiB: the embedding's sorted token ids, less what the model counts as hidden gradient.
    "llama_f": 0.0005,
    "llama_f_sel": 0.0005,
    "llama_f_liger": 0.0005,
    # DoRA's vectors of one value an output (norms, magnitudes, their gradients), up to 2 MiB in all.
    "llama_dora_nock": 0.0004,
    "llama_l_dora": 0.0005,
    "phi3_dora": 0.0003,
}
OFFLOADING_TOLERANCE = {
    # Offloading is counted at its most: five tensors wait in forward for their copies, and what was fetched
    # for one node lasts until the next is done. Copies of small layers end sooner. Where nothing is
    # checkpointed what is fetched is large beside the four layers' rest, and over-estimated most.
    "gemma3_off": 0.035,
    "llama_liger_off": 0.02,
    "llama_off": 0.01,
    "llama_off_acc": 0.003,
    "qwen3_off": 0.015,
    "llama_off_nock": 0.19,
    # 31 MiB too little: the hidden states' gradient lasts until the embedding's is there.
    "llama_f_off": 0.009,
}
FORWARD_TOLERANCE = {
    "olmo2_q": 0.005,
    "olmo2_liger": 0.005,
    "moe_q": 0.002,
    # Autocast keeps a 16-bit copy of every fp32 adapter weight until the forward pass ends; the model counts
    # them for the layer at work, as backward (the larger) needs it.
    "llama_l": 0.015,
    "llama_l_liger": 0.03,
    "llama_fp16": 0.03,
    "llama_l_dora": 0.01,
    "llama_dora_nock": 0.0005,
    # The layer holds eager attention's weights until it returns, which the model lets go: 3.5 MiB.
    "gemma2_liger": 0.03,
    # Positions of packed sequences, and flex attention's block masks.
    "qwen3_pack": 0.0003,
    "llama_flex": 0.0005,
    "llama_flex_pack": 0.0005,
    "llama_flex_pad": 0.0005,
    "qwen3_flex": 0.0006,
}
# The same copies (autocast ends after the head's forward pass), tables and indices.
HEAD_TOLERANCE = {
    "olmo2_q": 0.005,
    "olmo2_liger": 0.005,
    "moe_q": 0.01,
    "llama_l": 0.02,
    "llama_l_liger": 0.045,
    "llama_l_dora": 0.04,
    "llama_fp16": 0.04,
    "llama_dora_nock": 0.0005,
    # The first token of every packed sequence has no label; the model counts one such token a row.
    "llama_pack": 0.0005,
    "llama_pack_b2": 0.0025,
    "llama_flex_pack": 0.001,
    "qwen3_pack": 0.0005,
}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A trace beside what the model says of its setup; `span` is where the head runs, null where nobody can
    tell, and `peak` the parts live at the trace's peak, null without frames.
    """

    setup: TrainingSetup
    padded: bool
    live: list[int]
    span: dict[str, list[int]] | None
    peak: dict[str, int] | None
    timeline: StepTimeline
    tables_bytes: int
    step: StepMoment

    @property
    def peak_bytes(self) -> int:
        return self.step.total_bytes + self.tables_bytes

    @property
    def last_micro_step(self) -> int:
        """An event before the last micro-step's forward pass."""
        return len(self.live) // 2 if self.setup.gradient_accumulation_steps > 1 else 0


@functools.cache
def load(name: str) -> Trace:
    content = json.loads(gzip.decompress((TRACES / f"{name}.json.gz").read_bytes()))
    values: dict[str, Any] = dict(content["setup"])
    config, padded = values.pop("config"), values.pop("padded")
    setup = TrainingSetup(model=name, **values)
    spec = inspect_config(config, model_id=name, hub_id=name)
    found = live_memory(
        TrainingRun(setup=setup, model=spec, padded=padded),
        gpu=None,
        coefficients=coefficients_for(None, NATIVE),
        allocator=NATIVE,
    )
    return Trace(
        setup=setup,
        padded=padded,
        live=live_bytes(content["events"]),
        span=content.get("head") or span_by_tiles(setup, content["events"], padded=padded),
        peak=content.get("peak"),
        timeline=found.timeline,
        tables_bytes=found.resident.tables_bytes,
        step=found.peak,
    )


def span_by_tiles(setup: TrainingSetup, events: list[int], *, padded: bool) -> dict[str, list[int]] | None:
    """The head's events in a trace without frames: its last two tiles and the small blocks after them.

    A padded or packed batch's tile is of the tokens that have a label, which such a trace does not tell.
    """
    rows = setup.tokens_per_micro_step - setup.per_device_train_batch_size
    tile = min(rows, TRL.head_tokens) * TRL.head_vocabulary * DTYPE_WIDTH[setup.dtype]
    found = [index for index, event in enumerate(events) if event == tile]
    if padded or len(found) < 2:
        return None
    return {"forward": [found[-2], found[-2] + 19], "backward": [found[-1], found[-1] + 7]}


def moments(trace: Trace, *, prefix: str) -> int:
    found = [moment.total_bytes for moment in trace.timeline.moments() if moment.name.startswith(prefix)]
    return max(found) + trace.tables_bytes


def offloads(name: str) -> bool:
    return load(name).setup.activation_offloading


def counted() -> list[str]:
    return [name for name in NAMES if not offloads(name)]


def offloaded() -> list[str]:
    return [name for name in NAMES if offloads(name)]


def located(*, padded: bool | None = None) -> list[str]:
    """Traces that tell where the head runs, of full batches, of padded ones or of both."""
    return [name for name in counted() if load(name).span is not None and padded in (None, load(name).padded)]


def attributed() -> list[str]:
    return [name for name in counted() if load(name).peak is not None]


def test_every_trace_is_whole() -> None:
    assert len(NAMES) >= 76
    assert len(attributed()) >= 45
    for name in NAMES:
        left = 0
        if offloads(name):
            # What was fetched for the first layer stays until the next step asks for something.
            left = 2 * load(name).timeline.offloaded_input_bytes
        assert abs(load(name).live[-1]) < left + 2**16, name


@for_each(counted)
def test_peak_of_the_step(name: str) -> None:
    trace = load(name)
    tolerance = PEAK_TOLERANCE.get(name, TOLERANCE)
    assert trace.peak_bytes == pytest.approx(max(trace.live), rel=tolerance), trace.step.name


@for_each(offloaded)
def test_peak_of_an_offloading_step_is_no_less(name: str) -> None:
    trace = load(name)
    error = trace.peak_bytes / max(trace.live) - 1
    if trace.setup.method != "full":
        assert error >= 0, trace.step.name
    assert abs(error) <= OFFLOADING_TOLERANCE[name], trace.step.name


@for_each(located)
def test_peak_of_forward(name: str) -> None:
    """The busiest moment of decoder layers and final norm before the output head takes its first block."""
    trace = load(name)
    assert trace.span is not None
    measured = max(trace.live[trace.last_micro_step : trace.span["forward"][0]])
    assert moments(trace, prefix="forward of") == pytest.approx(
        measured, rel=FORWARD_TOLERANCE.get(name, TOLERANCE)
    )


@for_each(lambda: located(padded=False))
def test_peaks_of_the_head(name: str) -> None:
    """Full batches: of a padded one the head works on fewer rows than the model counts."""
    trace = load(name)
    assert trace.span is not None
    said = {direction: moments(trace, prefix=f"output head, {direction}") for direction in trace.span}
    measured = {way: max(trace.live[first : last + 1]) for way, (first, last) in trace.span.items()}
    assert said.keys() == {"forward", "backward"}
    assert said == pytest.approx(measured, rel=HEAD_TOLERANCE.get(name, TOLERANCE))


@for_each(lambda: located(padded=True))
def test_the_head_of_a_padded_batch_needs_no_more(name: str) -> None:
    trace = load(name)
    assert trace.span is not None
    for direction, (first, last) in trace.span.items():
        measured = max(trace.live[first : last + 1])
        assert measured < moments(trace, prefix=f"output head, {direction}"), direction


@for_each(located)
def test_peak_lies_where_the_trace_has_it(name: str) -> None:
    """Before the head, in the head, in backward of the layers, in the optimizer step."""
    trace = load(name)
    assert trace.span is not None
    where = trace.live.index(max(trace.live))
    if trace.step.name.startswith("forward of decoder layer"):
        assert where < trace.span["forward"][0]
    elif trace.step.name == "output head, backward":
        assert trace.span["backward"][0] <= where <= trace.span["backward"][1]
    else:
        assert where > trace.span["backward"][1]


PART_TOLERANCE_BYTES = {
    # DoRA's vectors of one value an output: counted nowhere, up to 2 MiB in four layers.
    "llama_dora_nock": 2 * MIB,
    # Autocast's copies of fp32 adapters are workspace to the model; torch asks for them where it asks for
    # their product.
    "llama_fp16": 2 * MIB,
    "llama_l_liger": 3 * MIB,
    "llama_l_dora": MIB,
    # Rotary tables in fp32.
    "olmo2_liger": MIB,
    # The embedding's sorted token ids.
    "llama_f_sel": 3 * MIB // 2,
    "llama_f_liger": 3 * MIB // 2,
    "llama_f_fp32": 3 * MIB // 2,
}
PART_BYTES = 3 * MIB // 10
"""What the model rounds away of a part: positions, row statistics, DoRA's vectors of the layer at work."""


@for_each(attributed)
def test_parts_at_the_peak_are_those_who_asked_for_them(name: str) -> None:
    """Workspace, head and the rest of the model's peak beside the sums over who asked for each live block."""
    trace = load(name)
    assert trace.peak is not None
    step, found = trace.step, trace.peak
    workspace, head = step.workspace_bytes, step.head_bytes
    rest = step.kept_bytes + step.live_bytes + step.gradient_bytes + trace.tables_bytes
    if trace.setup.method == "full":
        # The head's own weight gradient, which the model counts among gradients once the head is done; the
        # embedding's scratch, which no Python code asks for.
        assert workspace == trace.timeline.embedding_scratch_bytes
        gradient = trace.timeline.head.gradient_bytes
        workspace, head, rest = 0, head + gradient, rest - gradient + workspace
    tolerance = PART_TOLERANCE_BYTES.get(name, PART_BYTES)
    assert workspace == pytest.approx(found["workspace_bytes"], abs=tolerance)
    assert head == pytest.approx(found["head_bytes"], abs=tolerance)
    assert rest == pytest.approx(found["rest_bytes"], abs=tolerance)
    assert sum((found["workspace_bytes"], found["head_bytes"], found["rest_bytes"])) == max(trace.live)
