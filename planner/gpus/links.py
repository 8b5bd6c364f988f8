"""Links: how fast GPUs of a card reach each other, by NVLink or by PCIe. Read where a run has several."""

from __future__ import annotations

import functools
import re
import tomllib
from typing import Any

from planner.base import validate
from planner.base.data_files import PROFILES
from planner.base.errors import FieldError
from planner.base.values import dataclass

LINKS_FILE = PROFILES / "gpu_links.toml"
BOARD, BRIDGE = "board", "bridge"
PCIE_LANE_BYTES_PER_SECOND = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9}
"""One lane, one direction: 8, 16 and 32 GT/s at 128 of 130 bits (PCI-SIG's base specifications)."""
_PCIE = re.compile(r"^(\d)\.0 x(\d+)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Bytes a second in one direction that collectives are expected to reach, and between what."""

    expected: float
    low: float
    high: float

    def of(self, published: float) -> Rate:
        """Shares as rates of a link."""
        return Rate(expected=self.expected * published, low=self.low * published, high=self.high * published)


NVLINK_REACHED = Rate(expected=0.77, low=0.6, high=0.85)
"""Share of NVLink's published rate that NCCL reaches with large messages: 230 of an A100's 300 GB/s
(https://github.com/NVIDIA/nccl-tests/issues/149), 208 between two (issues/178 there), 350 to 370 of an H100's
450 (https://github.com/NVIDIA/nccl/issues/986, issues/1374)."""
PCIE_REACHED = Rate(expected=0.5, low=0.12, high=0.89)
"""The same of the card's own PCIe rate: 35 of an RTX 5090's 63 GB/s among four, 28 among eight
(https://github.com/NVIDIA/nccl/issues/1639), 20 of an A100's 31.5 across a host's bridges
(https://github.com/NVIDIA/nccl-tests/issues/178), 12 of 15.8 at generation 3 (nccl/issues/986), 54 of an RTX
PRO 6000's 63 peer to peer (http://www.webkkk.net/voipmonitor/rtx6kpro/blob/master/hardware/pcie-bandwidth.md).
The low end is half of what a slot with a quarter of the lanes gives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """How GPUs of a card are joined: published bytes a second, one direction. `nvlink` is "board" where every
    GPU of a machine has it, "bridge" where two cards have it if a bridge was bought, null without NVLink.
    """

    pcie: str
    pcie_bytes_per_second: float
    nvlink: str | None
    nvlink_bytes_per_second: float | None

    def __post_init__(self) -> None:
        if self.nvlink is not None:
            validate.choice("nvlink", self.nvlink, (BOARD, BRIDGE))
        if (self.nvlink is None) != (self.nvlink_bytes_per_second is None):
            raise FieldError("nvlink_gb_per_second", self.nvlink_bytes_per_second, "given with nvlink")

    def rate(self, num_processes: int) -> Rate:
        """What collectives of so many GPUs of a machine reach. Whether a bridge is there and how many lanes a
        slot has is not known: both widen it.
        """
        pcie = PCIE_REACHED.of(self.pcie_bytes_per_second)
        if self.nvlink_bytes_per_second is None:
            return pcie
        nvlink = NVLINK_REACHED.of(self.nvlink_bytes_per_second)
        if self.nvlink == BOARD:
            return nvlink
        # A bridge joins two cards: rings of more go by PCIe somewhere.
        return pcie if num_processes > 2 else Rate(expected=pcie.expected, low=pcie.low, high=nvlink.high)

    def words(self, num_processes: int) -> str:
        """What is assumed of the link, for people."""
        if self.nvlink == BOARD and self.nvlink_bytes_per_second is not None:
            return f"NVLink, {self.nvlink_bytes_per_second / 1e9:g} GB/s each way"
        text = f"PCIe {self.pcie} each"
        return f"{text}, faster with an NVLink bridge" if self.nvlink and num_processes == 2 else text


UNKNOWN = Link(
    pcie="4.0 x8",
    pcie_bytes_per_second=8 * PCIE_LANE_BYTES_PER_SECOND[4],
    nvlink=None,
    nvlink_bytes_per_second=None,
)
"""Of a card outside the catalog: half of what most cards of the catalog have."""


def link_of(gpu_id: str) -> Link:
    """The link of a card of the catalog; UNKNOWN for others."""
    return _links().get(gpu_id, UNKNOWN)


@functools.cache
def _links() -> dict[str, Link]:
    with LINKS_FILE.open("rb") as file:
        return {id_: _link(table) for id_, table in tomllib.load(file).items()}


def _link(table: dict[str, Any]) -> Link:
    found = _PCIE.match(table["pcie"])
    if found is None:
        raise FieldError("pcie", table["pcie"], "a generation and lanes, such as 4.0 x16")
    nvlink = table.get("nvlink_gb_per_second")
    return Link(
        pcie=table["pcie"],
        pcie_bytes_per_second=PCIE_LANE_BYTES_PER_SECOND[int(found[1])] * int(found[2]),
        nvlink=table.get("nvlink"),
        nvlink_bytes_per_second=None if nvlink is None else nvlink * 1e9,
    )
