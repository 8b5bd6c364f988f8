"""Events of a program: whole numbers, of which n allocates block n and -1 - n frees it.

They stay numbers, since an allocator's replay goes through some 100,000 of them for a plan.
"""

from __future__ import annotations


def free(block: int) -> int:
    """The event that frees a block. The one that allocates it is its number."""
    return -1 - block


FREE_INPUT = free(0)
"""The event that frees a layer's input."""


def frees(event: int) -> bool:
    """Whether an event frees a block."""
    return event < 0


def block_of(event: int) -> int:
    """The block that an event allocates or frees."""
    return event if event >= 0 else -1 - event
