"""How a merged model, or its adapter unmerged, is served: the lines to type."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from launcher.merging.adapter_folder import AdapterFolder
from launcher.training.loading.base_folder import BaseFolder

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as --max-lora-rank (MaxLoRARanks,
https://docs.vllm.ai/en/v0.14.0/api/vllm/config/lora/)."""


def vllm_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank that vLLM accepts for an adapter of a rank; None where it is too large."""
    return next((one for one in VLLM_RANKS if one >= rank), None)


def merged_lines(folder: Path, name: str) -> list[tuple[str, str]]:
    """(server, command) for a merged model."""
    place, gguf = _quoted(folder), _quoted(f"{name}.gguf")
    return [
        ("vLLM", f"vllm serve {place}"),
        ("Ollama", f"(cd {place} && ollama create {_quoted(name.lower())})"),
        ("llama.cpp", f"python convert_hf_to_gguf.py {place} --outfile {gguf} --outtype auto"),
        ("", f"llama-server -m {gguf}"),
    ]


def unmerged_lines(base: BaseFolder, adapter: AdapterFolder) -> list[tuple[str, str]]:
    """(server, command) for the adapter beside its base, or the reason why a server does not take it."""
    place, name = _quoted(adapter.path), _quoted(f"{adapter.name}-lora.gguf")
    refused, untold = vllm_refusal(adapter), llama_cpp_refusal(adapter)
    if base.checkpoint is not None:
        untold = "is not known to convert adapters of a quantised base: convert the merged model"
    lines = [
        (
            "vLLM",
            refused
            or f"vllm serve {_quoted(base.name)} --enable-lora "
            f"--lora-modules {_quoted(adapter.name)}={place} --max-lora-rank {vllm_rank(adapter.rank)}",
        )
    ]
    if untold is not None:
        return [*lines, ("llama.cpp", untold)]
    converted = f"python convert_lora_to_gguf.py {place} --base {_quoted(base.path)} --outfile {name}"
    return [*lines, ("llama.cpp", converted), ("", f"llama-server -m BASE.gguf --lora {name}")]


def vllm_refusal(adapter: AdapterFolder) -> str | None:
    """Why vLLM does not serve an adapter as it is (vllm/lora/peft_helper.py), or None."""
    return _first(
        (adapter.config.use_dora, "serves no DoRA unmerged"),
        (
            adapter.on_experts,
            "is not known to read adapters of experts and routers: serve the merged model",
        ),
        (adapter.patterned, "takes one rank and alpha for all modules, and this adapter has several"),
        (
            vllm_rank(adapter.rank) is None,
            f"serves ranks up to {VLLM_RANKS[-1]}, and this adapter's is {adapter.rank}",
        ),
    )


def llama_cpp_refusal(adapter: AdapterFolder) -> str | None:
    """Why llama.cpp does not serve an adapter as it is (convert_lora_to_gguf.py), or None."""
    return _first(
        (adapter.config.use_dora, "converts no DoRA"),
        (
            adapter.config.use_rslora,
            "scales by alpha / rank, which is too little for rsLoRA: convert the merged model",
        ),
        (adapter.on_experts, "is not known to convert adapters of experts and routers"),
        (adapter.patterned, "takes one alpha for all modules, and this adapter has several"),
    )


def _first(*reasons: tuple[object, str]) -> str | None:
    found: Iterable[str] = (reason for holds, reason in reasons if holds)
    return next(iter(found), None)


def _quoted(text: str | Path) -> str:
    return shlex.quote(str(text))
