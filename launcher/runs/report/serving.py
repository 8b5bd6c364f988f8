"""What vLLM takes of adapters beside their base. Light: no torch."""

from __future__ import annotations

from collections.abc import Iterable

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as --max-lora-rank (MaxLoRARanks,
https://docs.vllm.ai/en/v0.14.0/api/vllm/config/lora/)."""


def vllm_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank that vLLM accepts for an adapter of a rank; None where it is too large."""
    return next((one for one in VLLM_RANKS if one >= rank), None)


def vllm_refusal(*, use_dora: bool, on_experts: bool, patterned: bool, rank: int) -> str | None:
    """Why vLLM does not serve an adapter as it is (vllm/lora/peft_helper.py), or None.

    `on_experts` says that it adapts parameters that are no linear layer's weight, `patterned` that modules
    have ranks or alphas of their own.
    """
    return first(
        (use_dora, "serves no DoRA unmerged"),
        (on_experts, "is not known to read adapters of experts and routers: serve the merged model"),
        (patterned, "takes one rank and alpha for all modules, and this adapter has several"),
        (
            vllm_rank(rank) is None,
            f"serves ranks up to {VLLM_RANKS[-1]}, and this adapter's is {rank}",
        ),
    )


def first(*reasons: tuple[object, str]) -> str | None:
    """The first reason that holds."""
    found: Iterable[str] = (reason for holds, reason in reasons if holds)
    return next(iter(found), None)
