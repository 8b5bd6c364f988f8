"""How a merged model, or its adapter unmerged, is served: the lines to type."""

from __future__ import annotations

import shlex
from pathlib import Path

from launcher.merging.adapter_folder import AdapterFolder
from launcher.runs.report import serving as report
from launcher.training.loading.base_folder import BaseFolder


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
            f"--lora-modules {_quoted(adapter.name)}={place} "
            f"--max-lora-rank {report.vllm_rank(adapter.rank)}",
        )
    ]
    if untold is not None:
        return [*lines, ("llama.cpp", untold)]
    converted = f"python convert_lora_to_gguf.py {place} --base {_quoted(base.path)} --outfile {name}"
    return [*lines, ("llama.cpp", converted), ("", f"llama-server -m BASE.gguf --lora {name}")]


def vllm_refusal(adapter: AdapterFolder) -> str | None:
    """Why vLLM does not serve an adapter as it is, or None."""
    return report.vllm_refusal(
        use_dora=bool(adapter.config.use_dora),
        on_experts=adapter.on_experts,
        patterned=adapter.patterned,
        rank=adapter.rank,
    )


def llama_cpp_refusal(adapter: AdapterFolder) -> str | None:
    """Why llama.cpp does not serve an adapter as it is (convert_lora_to_gguf.py), or None."""
    return report.first(
        (adapter.config.use_dora, "converts no DoRA"),
        (
            adapter.config.use_rslora,
            "scales by alpha / rank, which is too little for rsLoRA: convert the merged model",
        ),
        (adapter.on_experts, "is not known to convert adapters of experts and routers"),
        (adapter.patterned, "takes one alpha for all modules, and this adapter has several"),
    )


def _quoted(text: str | Path) -> str:
    return shlex.quote(str(text))
