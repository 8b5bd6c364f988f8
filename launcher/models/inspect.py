"""A transformers config -> the model on the meta device -> ModelSpec. No weights, no code from elsewhere.

`vramwise models inspect --all` regenerates profiles/models from profiles/models.toml and profiles/configs.
A config given by a user is inspected in a child process with a time and a memory limit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.base.errors import ExitCode, InputError, MissingExtraError, VramwiseError
from planner.base.importing import uncollected
from planner.models import hub_config
from planner.models.catalog import nearest_models
from planner.models.parameter import Parameter
from planner.models.spec import LayerSpec, ModelSpec
from planner.models.vision_config import PROCESSOR

TIMEOUT_SECONDS = 300
"""Linear attention, whose reference goes token by token, takes 50 s of CPU time to trace."""
MEMORY_LIMIT_BYTES = 8 * 2**30

# Models whose forward pass around the decoder layers was read: embedding, layers, norm, head, nothing else.
_FAMILIES = (
    "Llama",
    "Mistral",
    "Ministral",
    "Mixtral",
    "Qwen2",
    "Qwen3",
    "Qwen3Moe",
    "Gemma",
    "Gemma2",
    "Gemma3",
    "Phi3",
    "SmolLM3",
    "Granite",
    "Nemotron",
    "Olmo2",
    "Olmo3",
)
_MODELS = frozenset(f"{family}ForCausalLM" for family in _FAMILIES)


def inspect_config(
    config: Mapping[str, Any] | Path,
    *,
    model_id: str,
    hub_id: str,
    aliases: Iterable[str] = (),
    note: str = "",
) -> ModelSpec:
    """Describe the model that a config builds.

    Args:
        config: The content of a config.json, or the folder that holds one. With what
            planner.models.vision_config.with_processor adds the model is described with its vision tower.
        model_id: What people type for it.
        hub_id: Hub id or folder of its weights.
        aliases: Other names for it.
        note: Added to the spec's `source`.

    Raises:
        InputError: the config is refused, or the model has something the recipes do not understand.
        MissingExtraError: torch or transformers is not installed.
    """
    values = hub_config.read_config(config) if isinstance(config, Path) else dict(config)
    hub_config.check_config(values, where=hub_id)
    processor = values.pop(PROCESSOR, None)
    if processor is not None:
        _require_stack()
        from launcher.models.vision import describe_vision

        return describe_vision(
            values, processor, model_id=model_id, hub_id=hub_id, aliases=tuple(aliases), note=note
        )
    text, wrapped = hub_config.text_part(values)
    hub_config.check_config(text, where=hub_id)
    model = _build(text, hub_id)
    if wrapped:
        note = "; ".join(filter(None, (note, "the language model of a multimodal checkpoint")))
    if type(model).__name__ in _MODELS:
        return describe_by_recipe(model, model_id=model_id, hub_id=hub_id, aliases=tuple(aliases), note=note)
    from launcher.models.traced_spec import describe_traced

    return describe_traced(model, model_id=model_id, hub_id=hub_id, aliases=tuple(aliases), note=note)


def inspect_in_child(
    config: Mapping[str, Any],
    *,
    model_id: str,
    hub_id: str,
    timeout_seconds: float = TIMEOUT_SECONDS,
    memory_bytes: int = MEMORY_LIMIT_BYTES,
) -> ModelSpec:
    """`inspect_config` in a process of its own, ended after a time and limited in memory.

    Raises:
        InputError: as `inspect_config`, or transformers failed on the config, or a limit was reached.
        MissingExtraError: torch or transformers is not installed.
    """
    _require_stack()
    hub_config.check_config(config, where=hub_id)
    request = json.dumps(
        {"config": dict(config), "model_id": model_id, "hub_id": hub_id, "memory_bytes": memory_bytes}
    )
    root = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "launcher.models.inspect"]
    try:
        done = subprocess.run(  # noqa: S603  our own interpreter and module
            command, input=request, capture_output=True, text=True, timeout=timeout_seconds, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{hub_id}: describing the model took more than {timeout_seconds:g} s") from error
    if done.returncode == ExitCode.OK:
        return ModelSpec.from_dict(json.loads(done.stdout))
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it died without a word"]
    if done.returncode == ExitCode.BAD_INPUT:
        raise InputError(lines[-1])
    raise InputError(
        f"{hub_id}: transformers could not build the model: {lines[-1][:200]}{nearest_models(hub_id)}"
    )


def _require_stack() -> None:
    for module in ("torch", "transformers"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError("describing an architecture outside the catalog", module)


def _not_causal(model_type: str) -> str:
    """Why a text config that transformers knows is no model that can be trained here."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as VISION

    if model_type.removesuffix("_text") in VISION:
        return (
            f"{model_type} is the text part of a vision-language model, which transformers builds only as a "
            "whole; vramwise plans models of text"
        )
    return f"model_type {model_type} is no causal language model in transformers"


def _build(text: dict[str, Any], hub_id: str) -> Any:
    """The causal language model of a text config, on the meta device."""
    _require_stack()
    import torch
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    model_type = text.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        own = " (its own code, auto_map, is never run)" if "auto_map" in text else ""
        raise InputError(f"{hub_id}: model_type {model_type} is not known to the installed transformers{own}")
    # transformers' own class is used, so the repository's code is not needed, and must not be looked for.
    text.pop("auto_map", None)
    config = AutoConfig.for_model(model_type, **text)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{hub_id}: {_not_causal(model_type)}{nearest_models(hub_id)}")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def describe_by_recipe(
    model: Any, *, model_id: str, hub_id: str, aliases: tuple[str, ...], note: str
) -> ModelSpec:
    """Describe a causal language model of a family with a recipe.

    Raises:
        InputError: it has other parts than embeddings, layers, norm and head, or a layer that is not
        understood.
    """
    from launcher.models import layer_recipe

    architecture, config = type(model).__name__, model.config
    for module, expected in ((model, _TOP), (model.model, _BASE)):
        if {name for name, _ in module.named_children()} != expected:
            raise InputError(f"{hub_id}: {type(module).__name__} has other parts than {sorted(expected)}")
    rotary = model.model.rotary_emb
    try:
        layers = _merge(
            layer_recipe.read_layer(module, config, rotary, index)
            for index, module in enumerate(model.model.layers)
        )
    except InputError as error:
        raise InputError(f"{hub_id}: vramwise does not model it: {error}{nearest_models(hub_id)}") from error
    parameters = read_parameters(model, layers="model.layers")
    scaled = type(model.model.embed_tokens).__name__.endswith("ScaledWordEmbedding")
    return ModelSpec(
        id=model_id,
        hub_id=hub_id,
        architecture=architecture,
        model_type=config.model_type,
        vocab_size=model.lm_head.out_features,
        hidden_size=model.lm_head.in_features,
        max_position_embeddings=config.max_position_embeddings,
        parameters=parameters,
        layers=layers,
        tied_embeddings=any(p.tied for p in parameters),
        default_attn_implementation=config._attn_implementation,
        default_experts_implementation=(
            config._experts_implementation if any(layer.experts for layer in layers) else None
        ),
        source=source(note),
        aliases=aliases,
        final_norm=layer_recipe.norm_kind(model.model.norm),
        embedding_multiplier=scaled or hasattr(model.model, "embedding_multiplier"),
        final_logit_softcapping=getattr(config, "final_logit_softcapping", None) is not None,
        logit_scale=hasattr(config, "logits_scaling"),
        rotary_tables=sum(name.endswith("original_inv_freq") for name, _ in rotary.named_buffers()),
        download_bytes=2 * sum(p.elements * p.count for p in parameters if not p.tied),
    )


_TOP = {"model", "lm_head"}
_BASE = {"embed_tokens", "layers", "norm", "rotary_emb"}


def source(note: str) -> str:
    """How a spec was made: the command, the library's version and a note."""
    import transformers

    made = f"vramwise models inspect, transformers {transformers.__version__}"
    return f"{made}; {note}" if note else made


def read_parameters(model: Any, *, layers: str) -> tuple[Parameter, ...]:
    """Group the parameters by name pattern, owning class and shape, in the model's order.

    Args:
        model: The causal language model.
        layers: The path of its list of decoder layers.

    Raises:
        InputError: two modules share a tensor that is not the embedding's.
    """
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    seen: set[int] = set()
    place = layers.split(".")
    groups: Counter[tuple[str, str, tuple[int, ...], bool]] = Counter()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        is_tied = tied and parameter is head and id(parameter) in seen
        if id(parameter) in seen and not is_tied:
            raise InputError(f"{name} shares its tensor with another module, which is not understood")
        seen.add(id(parameter))
        parts = name.split(".")
        if parts[: len(place)] == place:
            parts[len(place)] = "*"
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        groups[(".".join(parts), owner, tuple(parameter.shape), is_tied)] += 1
    return tuple(
        Parameter(name=name, module_class=owner, shape=shape, count=count, tied=is_tied)
        for (name, owner, shape, is_tied), count in groups.items()
    )


def _merge(layers: Iterable[LayerSpec]) -> tuple[LayerSpec, ...]:
    """Join the layers that are alike, in order of first appearance."""
    kinds: dict[LayerSpec, list[int]] = {}
    for layer in layers:
        kinds.setdefault(replace(layer, indices=(0,)), []).extend(layer.indices)
    return tuple(replace(kind, indices=tuple(indices)) for kind, indices in kinds.items())


def _limit_memory(memory_bytes: int) -> None:
    """Cap this process's private memory. RLIMIT_DATA, as torch maps far more address space than it uses."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))


def _child() -> None:
    request = json.load(sys.stdin)
    _limit_memory(request["memory_bytes"])
    with uncollected():
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401
    spec = inspect_config(request["config"], model_id=request["model_id"], hub_id=request["hub_id"])
    json.dump(spec.to_dict(), sys.stdout)


def main() -> int:
    """The child of `inspect_in_child`: a request on stdin, the spec on stdout, an error as one line."""
    try:
        _child()
    except VramwiseError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
