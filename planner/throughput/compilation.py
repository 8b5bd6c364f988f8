"""What compiling a run's layers costs once, before it pays: the wait for the first step."""

from __future__ import annotations

from planner.base.values import dataclass
from planner.memory.decoder.groups import layer_groups
from planner.setup.run import TrainingRun
from planner.throughput.made import layer_work

FIRST_OF_A_PROCESS = 7.5
"""Seconds of a process that compiles for the first time: the compiler's own start and its workers'."""
TENSOR_SECONDS = 0.0475
"""Seconds for each tensor that the graphs make. Of 91 runs of profiles/runs whose graphs were new to their
machine (H100 and H200, hosts with 16 cores) 79 took 0.5 to 1.5 times as long as these two constants say,
all 13 that had a process alone among them: 12.9 to 24.4 s. A host's pace is most of the rest: the same setup
took 13.9, 18.0 and 24.4 s on three hosts. Widest: gemma-3-4b's four graphs, 49.9 s where 27.7 are said."""
FLEX_GRAPH_SECONDS = 12.0
"""More where flex attention is part of the graphs: 16 to 33 s in the runs of chat-h100-80gb.jsonl."""
FLEX_SECONDS = 50.0
"""For flex attention between eager layers, whose kernels transformers compiles at the first call: 30, 46 and
53 s in three runs of profiles/runs, and 282 s in 20261123-5301d29bd0b1."""
AGAIN_FIRST, AGAIN_TENSOR = 3.5, 0.014
"""The same two where the graphs lie in torch's cache: 4.7 s for the 337 tensors of fp8's, in a process that
had compiled before (torch 2.11, one H200)."""
LOW, HIGH = 0.6, 1.8
"""Factors on the ends of the interval: nine in ten of those 91 runs lie within."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstStep:
    """Seconds that the first step takes beyond a usual one, with their interval; `seconds_again` where this
    machine has compiled the same layers before and kept what it made.
    """

    seconds: float
    seconds_low: float
    seconds_high: float
    seconds_again: float


def first_step(run: TrainingRun) -> FirstStep | None:
    """The wait for a run's first step; None where nothing is compiled.

    Each group of layers that a setup treats alike is a graph of its own, forward and backward.
    """
    flex = run.attention == "flex_attention"
    if run.setup.compile == "none":
        return _around(FLEX_SECONDS, FLEX_SECONDS) if flex else None
    tensors = 0
    for group in layer_groups(run)[0]:
        work = layer_work(
            group.layer,
            group.knobs,
            checkpointed=group.checkpointed,
            input_requires_grad=group.input_requires_grad,
        )
        tensors += work.forward.launches + work.recomputed.launches + work.backward.launches
    cold = FIRST_OF_A_PROCESS + TENSOR_SECONDS * tensors + (FLEX_GRAPH_SECONDS if flex else 0.0)
    return _around(cold, min(cold, AGAIN_FIRST + AGAIN_TENSOR * tensors))


def _around(seconds: float, again: float) -> FirstStep:
    return FirstStep(
        seconds=seconds, seconds_low=LOW * seconds, seconds_high=HIGH * seconds, seconds_again=again
    )
