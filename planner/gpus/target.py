"""GpuTarget: the card that a plan is for and what it leaves to the training process."""

from __future__ import annotations

from planner.base import validate
from planner.base.errors import InputError
from planner.base.values import dataclass
from planner.gpus.parse import parse_gpu
from planner.gpus.spec import DISPLAY_BYTES, GpuSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuTarget:
    """GPUs to plan for.

    `text` is what was asked, `reference` whether a plain size stands for the card `spec`. Each of the `count`
    GPUs leaves `usable_bytes` to the process: `held_bytes` of the card's usable memory are taken, by a
    display or by other processes. For a GPU of this machine, `index` is NVML's and `position` that among the
    visible ones. `alternatives` are other cards that go by the same name; `notes` say what was assumed.
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

    def __post_init__(self) -> None:
        validate.integer("count", self.count, minimum=1, maximum=2**14)
        validate.integer("usable_bytes", self.usable_bytes, minimum=0, maximum=self.spec.memory_bytes)


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
    """Take the GPU of this machine that has most memory free, less what other processes hold.

    Raises:
        InputError: no NVIDIA GPU, or none visible.
    """
    from planner.gpus.detect import local_gpus

    gpus = local_gpus()
    gpu = max(gpus, key=lambda found: found.free_bytes)
    note = f"GPU {gpu.index} of this machine"
    if len(gpus) > 1:
        note += f", the one of {len(gpus)} with most memory free"
    notes = [note]
    if gpu.display_active:
        notes.append("a display is attached to it; what it holds now is counted")
    return GpuTarget(
        text=gpu.spec.id,
        spec=gpu.spec,
        count=1,
        usable_bytes=gpu.free_bytes,
        held_bytes=gpu.spec.usable_bytes - gpu.free_bytes,
        index=gpu.index,
        position=gpus.index(gpu),
        notes=tuple(notes),
    )
