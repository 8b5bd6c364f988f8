"""What `--gpu` asks for: a card, a plain size that stands for a card, or several of either."""

from __future__ import annotations

import re

from planner.base.errors import FieldError, InputError, shorten
from planner.base.values import dataclass
from planner.gpus.catalog import gpu_catalog, normalise
from planner.gpus.spec import GpuSpec

MAX_GPUS = 2**14

# The card that a plain size stands for, by marketing GB. Where a size has several: the one that people who
# say the size most likely own, and among those the one whose verdict and forecast hold for the others too.
REFERENCE_CARDS: dict[int, str] = {
    6: "rtx-2060-6gb",
    8: "rtx-4060",  # the slowest memory of the 8 GB cards: no forecast that the others miss
    10: "rtx-3080-10gb",
    11: "rtx-2080-ti",
    12: "rtx-3060-12gb",
    15: "t4",  # what its driver shows; sold as 16 GB
    16: "rtx-5060-ti-16gb",
    20: "rtx-4000-ada",
    24: "rtx-3090",  # the slower of the two that people own; their usable memory differs by 41 MiB
    32: "rtx-5090",
    40: "a100-40gb",
    48: "a40",  # ECC on: least usable memory of the 48 GB cards
    80: "h100-80gb",
    94: "h100-nvl-94gb",
    96: "rtx-pro-6000",
    141: "h200",
    180: "b200",
}

_COUNTED = re.compile(r"^(\d+)\s*[x\u00d7*]\s*(.*)$", re.IGNORECASE)
_SIZE = re.compile(r"^([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|[+-]?inf)\s*(gib|gb|g)$", re.IGNORECASE)
_NOT_NVIDIA = re.compile(
    r"""^(?:
        (?P<AMD> amd.* | radeon.* | instinct.* | rocm.* | rx\d{3,4}.* | mi\d{2,3}[a-z]* | w7[89]00 ) |
        (?P<Apple> apple.* | mps | metal | m[1-9](?:pro|max|ultra)?(?:\d+(?:gb|g)?)? | mac.* ) |
        (?P<Intel> intel.* | arc.* | a(?:310|380|580|750|770)m? | b5[78]0 | xpu | gaudi.* | max1[15]\d0 ) |
        (?P<CPU> cpu.* | xeon.* | epyc.* | ryzen.* | threadripper.* ) |
        (?P<Google> (?:google|cloud)?tpu.* | v[2-6][ep](?:-?\d+)? | trillium ) |
        (?P<AWS> trainium.* | inferentia.* | trn\d.* | inf\d.* )
    )$""",
    re.VERBOSE,
)


class UnsupportedHardwareError(InputError):
    """The name is hardware that the training stack's 4-bit kernels are not planned for."""

    def __init__(self, text: str, vendor: str) -> None:
        what = "a CPU" if vendor == "CPU" else f"{vendor} hardware"
        super().__init__(f"--gpu {shorten(text)}: {what} is not supported, only NVIDIA GPUs with CUDA are")


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuRequest:
    """GPUs as asked for.

    `gpus` is the card each of the `count` GPUs is. `reference` is true when a plain size stands for that
    card. `alternatives` are ids of other cards that go by the same name ("a100" takes the 40 GB card and
    lists the 80 GB one). `text` is what was typed.
    """

    gpus: GpuSpec
    count: int
    reference: bool
    text: str
    alternatives: tuple[str, ...] = ()


def accepted_sizes() -> str:
    """List the plain sizes that have a reference card, for messages and help."""
    return ", ".join(f"{size}GB" for size in REFERENCE_CARDS)


def parse_gpu(text: str) -> GpuRequest:
    """Parse "16GB", "24G", "rtx-4090", "4090", "2x24GB", "4xh100".

    Raises:
        FieldError: a count or size that is not accepted, or an empty text.
        UnsupportedHardwareError: AMD, Apple, Intel, CPU, TPU.
        UnknownNameError: no card has that name.
    """
    what = text.strip()
    if not what or len(what) > 100 or not what.isprintable():
        raise FieldError("--gpu", text, f"a GPU name such as rtx-4090, or a size such as 16GB ({_FORMS})")
    count = 1
    counted = _COUNTED.match(what)
    if counted:
        count, what = _count(counted[1], text), counted[2].strip()
    size = _SIZE.match(what)
    if size:
        return GpuRequest(gpus=_reference(size[1], text), count=count, reference=True, text=text)
    return _named(what, count, text)


_FORMS = "several: 2x24GB, 4xh100"


def _count(digits: str, text: str) -> int:
    # int() of thousands of digits is slow and refused by Python; no such count is accepted anyway.
    count = int(digits) if len(digits) <= 6 else MAX_GPUS + 1
    if not 1 <= count <= MAX_GPUS:
        raise FieldError("--gpu", text, f"a count from 1 to {MAX_GPUS:,} before the x")
    return count


def _reference(number: str, text: str) -> GpuSpec:
    size = float(number)
    id_ = REFERENCE_CARDS.get(int(size)) if 0 < size < 2**20 and size == int(size) else None
    if id_ is None:
        raise FieldError("--gpu", text, f"a card's name or one of the sizes {accepted_sizes()}")
    return gpu_catalog().get(id_)


def _named(name: str, count: int, text: str) -> GpuRequest:
    found = gpu_catalog().named(name)
    if found:
        alternatives = tuple(gpu.id for gpu in found[1:])
        return GpuRequest(gpus=found[0], count=count, reference=False, text=text, alternatives=alternatives)
    vendor = _NOT_NVIDIA.match(normalise(name))
    if vendor and vendor.lastgroup:
        raise UnsupportedHardwareError(text, vendor.lastgroup)
    if re.fullmatch(r"[\d.,+-]*(?:[kmt]i?b|[kmt])?|x.*|.*\d\s*g(?:i?b)?.+", name, re.IGNORECASE):
        raise FieldError("--gpu", text, f"a name such as rtx-4090 or a size such as 16GB; {_FORMS}")
    gpu = gpu_catalog().get(name)
    return GpuRequest(gpus=gpu, count=count, reference=False, text=text)
