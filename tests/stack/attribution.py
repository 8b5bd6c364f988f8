"""Whose bytes are live at a trace's peak, told by the Python frames that asked for each block.

Three parts, as the memory model has them (planner/memory/step/timeline.py, StepMoment): workspace (weights
made whole again: bitsandbytes' dequantised ones, DoRA's folded ones), the output head's tensors, and the
rest.
"""

from __future__ import annotations

import importlib.util
import linecache
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

DISPATCH = ("torch/_ops.py", "torch/utils/checkpoint.py", "torch/_dynamo/", "torch/_compile.py")
"""Frames of torch's dispatcher, which selective checkpointing puts between a block and who asked for it."""
DEQUANTISING = "bitsandbytes/backends/"
DORA = "peft/tuners/lora/dora.py"
FOLDING = ("get_lora_weight", "get_weight_norm")
HEAD = ("trl/kernels/chunked_logprob.py", "trl/trainer/utils.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """Live bytes at the event where they are most, by who asked for them."""

    event: int
    workspace_bytes: int
    head_bytes: int
    rest_bytes: int

    def to_dict(self) -> dict[str, int]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSpan:
    """Events from the first to the last block that the head's passes ask for, in the last micro-step."""

    forward: tuple[int, int]
    backward: tuple[int, int]

    def to_dict(self) -> dict[str, tuple[int, int]]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One Python frame: path from the package on, line, function."""

    path: str
    line: int
    function: str

    @classmethod
    def read(cls, text: str) -> Frame:
        """Read record_traces' form, PATH:LINE:FUNCTION."""
        path, line, function = text.rsplit(":", 2)
        for package in ("bitsandbytes", "peft", "trl", "transformers", "torch"):
            start = f"/{path}".rfind(f"/{package}/")
            if start >= 0:
                path = path[start:]
                break
        return cls(path=path, line=int(line), function=function)

    @property
    def code(self) -> str:
        """The line's text in the package that is installed, which must be of the traced version."""
        package, _, inside = self.path.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise LookupError(f"{package} is not installed")
        return linecache.getline(str(Path(spec.origin).parent / inside), self.line).strip()


def peak_of(
    events: Sequence[int],
    stacks: Sequence[Sequence[str]],
    origins: Sequence[int],
    *,
    weight_elements: frozenset[int],
    compute_bytes: int,
) -> Peak:
    """The peak of a trace; `weight_elements` are the sizes of the model's weights, in elements."""
    live = live_bytes(events)
    where = live.index(max(live))
    sizes = [event for event in events if event >= 0]
    taken = sum(event >= 0 for event in events[: where + 1])
    freed = {-1 - event for event in events[: where + 1] if event < 0}
    parts = {"workspace": 0, "head": 0, "rest": 0}
    frames = [_asking(stack) for stack in stacks]
    for block in set(range(taken)) - freed:
        size = sizes[block]
        parts[_part(frames[origins[block]], size, weight_elements, compute_bytes)] += size
    return Peak(
        event=where,
        workspace_bytes=parts["workspace"],
        head_bytes=parts["head"],
        rest_bytes=parts["rest"],
    )


def head_span(events: Sequence[int], stacks: Sequence[Sequence[str]], origins: Sequence[int]) -> HeadSpan:
    """Where the last micro-step's log-probabilities are computed, and their gradient.

    Raises:
        LookupError: no block was asked for by TRL's tiled head.
    """
    frames = [_asking(stack) for stack in stacks]
    spans: list[tuple[str, int, int]] = []
    block = -1
    for index, event in enumerate(events):
        if event < 0:
            continue
        block += 1
        asking = frames[origins[block]]
        if not asking or asking[0].path != HEAD[0] or asking[0].function not in ("forward", "backward"):
            continue
        name = asking[0].function
        if spans and spans[-1][0] == name:
            spans[-1] = (name, spans[-1][1], index)
        else:
            spans.append((name, index, index))
    if [name for name, _, _ in spans[-2:]] != ["forward", "backward"]:
        raise LookupError("the trace has no pass of TRL's chunked head")
    return HeadSpan(forward=spans[-2][1:], backward=spans[-1][1:])


def live_bytes(events: Sequence[int]) -> list[int]:
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


def _asking(stack: Sequence[str]) -> list[Frame]:
    """Frames from the innermost that is not the dispatcher's on; none where autograd's own nodes asked."""
    frames = [Frame.read(text) for text in stack]
    while frames and frames[0].path.startswith(DISPATCH):
        frames.pop(0)
    return frames


def _part(frames: list[Frame], size: int, weight_elements: frozenset[int], compute_bytes: int) -> str:
    if not frames:
        return "rest"
    first = frames[0]
    if first.path in HEAD:
        return "head"
    if first.path.startswith(DEQUANTISING):
        # The fused forward's product is an activation; all else are weights and their constants.
        return "rest" if "linear(" in first.code else "workspace"
    folding = any(frame.path == DORA and frame.function in FOLDING for frame in frames)
    casting = first.path == DORA and "weight.to(" in first.code
    # Autocast's copy of a whole weight, beside the product that reads it.
    copied = first.path == DORA and size % compute_bytes == 0 and size // compute_bytes in weight_elements
    if folding or casting or (copied and "linear(" in first.code):
        return "workspace"
    return "rest"
