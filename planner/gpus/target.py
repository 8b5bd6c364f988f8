"""GpuTarget: the card that a plan is for and what it leaves to the training process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, replace
from typing import TYPE_CHECKING

from planner.base import validate
from planner.base.errors import InputError
from planner.base.json_codec import WHERE_SET
from planner.base.values import dataclass
from planner.gpus.parse import parse_gpu
from planner.gpus.spec import DISPLAY_BYTES, GpuSpec

if TYPE_CHECKING:
    from planner.gpus.detect import LocalGpu


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuTarget:
    """GPUs to plan for.

    `text` is what was asked, `reference` whether a plain size stands for the card `spec`. Each of the `count`
    GPUs leaves `usable_bytes` to the process: `held_bytes` of the card's usable memory are taken, by a
    display or by other processes. For a GPU of this machine, `index` is NVML's and `position` that among the
    visible ones. `alternatives` are other cards that go by the same name; `notes` say what was assumed.
    Where this machine has several such GPUs, these are of the one with most memory free, `least_usable_bytes`
    is what the fullest of them leaves, and `positions` are theirs.
    """

    text: str
    spec: GpuSpec
    count: int
    usable_bytes: int
    held_bytes: int = 0
    reference: bool = False
    index: int | None = None
    position: int | None = None
    alternatives: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    least_usable_bytes: int | None = field(default=None, metadata=WHERE_SET)
    positions: tuple[int, ...] = field(default=(), metadata=WHERE_SET)

    def __post_init__(self) -> None:
        validate.integer("count", self.count, minimum=1, maximum=2**14)
        validate.integer("usable_bytes", self.usable_bytes, minimum=0, maximum=self.spec.memory_bytes)

    def first_position(self, count: int) -> int:
        """Where the `count` GPUs that a run takes begin among the visible ones of this machine.

        Raises:
            InputError: so many of this kind do not lie side by side.
        """
        there = self.positions or (() if self.position is None else (self.position,))
        if count == 1 or not there:
            return self.position or 0
        if count > len(there):
            raise InputError(f"{count} GPUs are needed, and this machine shows {len(there)} x {self.spec.id}")
        for first in there:
            if set(range(first, first + count)) <= set(there):
                return first
        places = ", ".join(map(str, there))
        raise InputError(
            f"{count} x {self.spec.id}: those of this machine lie at {places} among its visible GPUs; "
            "CUDA_VISIBLE_DEVICES names which are to be taken, side by side"
        )

    def of_all(self) -> GpuTarget:
        """The target for a run on all of its GPUs: what each of them leaves at least."""
        least = self.least_usable_bytes
        if least is None:
            return self
        held = self.held_bytes + self.usable_bytes - least
        notes = (f"all {self.count} such GPUs of this machine", *self.notes[1:])
        return replace(self, usable_bytes=least, held_bytes=held, notes=notes)


def resolve_gpu(text: str | None, *, display: bool = False) -> GpuTarget:
    """Turn what `--gpu` said into a target; without a text, the GPUs of this machine are asked.

    Raises:
        InputError: the text names no supported card, or this machine has no GPU.
    """
    if text is None:
        if display:
            raise InputError("--display goes with --gpu; this machine's own display is counted already")
        return local_target()
    request = parse_gpu(text)
    held = DISPLAY_BYTES if display else 0
    notes = []
    if request.reference:
        notes.append(f"{text.strip()} stands for one card of that size, {request.gpus.id}")
    if request.alternatives:
        notes.append(
            f"{text.strip()} is taken as {request.gpus.id}; other cards of that name: "
            + ", ".join(request.alternatives)
        )
    notes.append(
        "a display is attached to the card"
        if display
        else "no display and no other process is on the card (--display if there is one)"
    )
    return GpuTarget(
        text=text,
        spec=request.gpus,
        count=request.count,
        usable_bytes=max(0, request.gpus.usable_bytes - held),
        held_bytes=held,
        reference=request.reference,
        alternatives=request.alternatives,
        notes=tuple(notes),
    )


def local_target() -> GpuTarget:
    """Take the GPU of this machine that has most memory free, less what other processes hold, with all others
    of its kind.

    Raises:
        InputError: no NVIDIA GPU, or none visible.
    """
    from planner.gpus.detect import local_gpus

    gpus = local_gpus()
    return with_its_kind(gpus, max(range(len(gpus)), key=lambda at: gpus[at].free_bytes))


def with_its_kind(gpus: Sequence[LocalGpu], position: int) -> GpuTarget:
    """The visible GPU at a position, less what other processes hold, with all others of its kind; it is to be
    the one of them that has most memory free.
    """
    gpu = gpus[position]
    alike = tuple(at for at, found in enumerate(gpus) if found.spec.id == gpu.spec.id)
    note = f"GPU {gpu.index} of this machine"
    if len(gpus) > 1:
        note += f", the one of {len(gpus)} with most memory free"
    one = alone(gpus, position)
    return replace(
        one,
        count=len(alike),
        notes=(note, *one.notes[1:]),
        least_usable_bytes=min(gpus[at].free_bytes for at in alike) if len(alike) > 1 else None,
        positions=alike if len(alike) > 1 else (),
    )


def alone(gpus: Sequence[LocalGpu], position: int) -> GpuTarget:
    """The visible GPU at a position, less what other processes hold, whatever else there is."""
    gpu = gpus[position]
    notes = [f"GPU {gpu.index} of this machine"]
    if gpu.display_active:
        notes.append("a display is attached to it; what it holds now is counted")
    return GpuTarget(
        text=gpu.spec.id,
        spec=gpu.spec,
        count=1,
        usable_bytes=gpu.free_bytes,
        held_bytes=gpu.spec.usable_bytes - gpu.free_bytes,
        index=gpu.index,
        position=position,
        notes=tuple(notes),
    )
