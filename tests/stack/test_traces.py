"""The memory model against allocation traces of real training steps on an H100.

Each trace is every block that torch's allocator handed out and took back in one step of a small model.
Replayed, it gives live bytes at every moment; the model has to give the same peaks, phase by phase.
"""

from __future__ import annotations

import functools
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from launcher.inspect_model import inspect_config
from planner.memory.estimate import _replayed
from planner.memory.head import TOKEN_CHUNK, VOCABULARY_CHUNK
from planner.memory.runtime import coefficients_for
from planner.memory.timeline import StepTimeline
from planner.memory.weights import DTYPE_BYTES
from planner.training_setup import TrainingSetup

TRACES = Path(__file__).parent / "traces"
NAMES = sorted(path.name.removesuffix(".json.gz") for path in TRACES.glob("*.json.gz"))

TOLERANCE = 0.0002
"""Vectors of a few bytes a token (positions, the head's statistics) are all that the model rounds away."""
PEAK_TOLERANCE = {
    # 1 MiB: the model's rotary tables are in the load dtype, OLMo 2 keeps them in fp32.
    "olmo2_q": 0.002,
    # 2 MiB: routing indices and sorted copies of them.
    "moe_q": 0.0015,
    # 1 MiB: the embedding's sorted token ids, less what the model counts as hidden gradient.
    "llama_f": 0.0005,
}
FORWARD_TOLERANCE = {
    "olmo2_q": 0.005,
    "moe_q": 0.002,
    # Autocast keeps a 16-bit copy of every fp32 adapter weight until the forward pass ends; the model counts
    # them for the layer at work, as backward (the larger) needs it.
    "llama_l": 0.015,
}
# The same copies (autocast ends after the head's forward pass), tables and indices.
HEAD_TOLERANCE = {"olmo2_q": 0.005, "moe_q": 0.01, "llama_l": 0.02}
MIXED_LENGTHS = "llama_q_mixed"
"""Its head works on the tokens that are not padding, which the trace does not tell."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    live: list[int]
    tiles: list[int]
    timeline: StepTimeline
    tables_bytes: int
    peak_bytes: int
    peak_moment: str


@functools.cache
def load(name: str) -> Trace:
    content = json.loads(gzip.decompress((TRACES / f"{name}.json.gz").read_bytes()))
    values: dict[str, Any] = dict(content["setup"])
    config, padded = values.pop("config"), values.pop("padded")
    setup = TrainingSetup(model=name, **values)
    spec = inspect_config(config, model_id=name, hub_id=name)
    resident, timeline, step = _replayed(setup, spec, None, coefficients_for(None), padded=padded)
    rows = setup.tokens_per_micro_step - setup.per_device_train_batch_size
    tile = min(rows, TOKEN_CHUNK) * VOCABULARY_CHUNK * DTYPE_BYTES[setup.dtype]
    # The last micro-step only: gradients of the earlier ones are there, as the model assumes.
    tiles = [index for index, event in enumerate(content["events"]) if event == tile]
    return Trace(
        live=live_bytes(content["events"]),
        tiles=tiles[-2:],
        timeline=timeline,
        tables_bytes=resident.tables_bytes,
        peak_bytes=step.total_bytes + resident.tables_bytes,
        peak_moment=step.name,
    )


def live_bytes(events: list[int]) -> list[int]:
    """Live bytes after each event; a positive one is a block of that size, -1-n frees the n-th block."""
    sizes: list[int] = []
    live, total = [], 0
    for event in events:
        if event >= 0:
            sizes.append(event)
            total += event
        else:
            total -= sizes[-1 - event]
        live.append(total)
    return live


def moments(trace: Trace, *, prefix: str) -> int:
    found = [
        moment.total_bytes
        for moment in (*trace.timeline._head_moments(), *trace.timeline._layer_moments())
        if moment.name.startswith(prefix)
    ]
    return max(found) + trace.tables_bytes


def test_every_trace_is_whole() -> None:
    assert len(NAMES) >= 20
    for name in NAMES:
        assert abs(load(name).live[-1]) < 2**16, name


@pytest.mark.parametrize("name", NAMES)
def test_peak_of_the_step(name: str) -> None:
    trace = load(name)
    tolerance = PEAK_TOLERANCE.get(name, TOLERANCE)
    assert trace.peak_bytes == pytest.approx(max(trace.live), rel=tolerance), trace.peak_moment


@pytest.mark.parametrize("name", [name for name in NAMES if name != MIXED_LENGTHS])
def test_peak_of_forward(name: str) -> None:
    """The busiest moment of decoder layers and final norm before the output head takes its first tile."""
    trace = load(name)
    earlier = 0
    if name == "llama_q_acc":
        earlier = len(trace.live) // 2
    measured = max(trace.live[earlier : trace.tiles[0]])
    assert moments(trace, prefix="forward of") == pytest.approx(
        measured, rel=FORWARD_TOLERANCE.get(name, TOLERANCE)
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != MIXED_LENGTHS])
def test_peaks_of_the_head(name: str) -> None:
    trace = load(name)
    tolerance = HEAD_TOLERANCE.get(name, TOLERANCE)
    forward, backward = trace.tiles
    # The blocks that follow a tile are the fp32 vectors of one value a token and, backward, the gradient.
    measured = max(trace.live[forward : forward + 20])
    assert moments(trace, prefix="output head, forward") == pytest.approx(measured, rel=tolerance)
    measured = max(trace.live[backward : backward + 8])
    assert moments(trace, prefix="output head, backward") == pytest.approx(measured, rel=tolerance)


def test_peak_lies_where_the_trace_has_it() -> None:
    """Before the head, in the head, in backward of the layers, in the optimizer step."""
    for name in NAMES:
        if name == MIXED_LENGTHS:
            continue
        trace = load(name)
        where = trace.live.index(max(trace.live))
        if trace.peak_moment.startswith("forward of decoder layer"):
            assert where < trace.tiles[0], name
        elif trace.peak_moment == "output head, backward":
            assert trace.tiles[1] <= where < trace.tiles[1] + 8, name
        else:
            assert where > trace.tiles[1] + 8, name
