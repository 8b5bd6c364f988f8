"""Adapter folders as PEFT writes them: read, and refused by name where a merge would lose what they hold."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.base.errors import InputError, shorten

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
MAX_CONFIG_BYTES = 2**20
# Starts that leave the base as it is; the others (pissa, olora, corda, loftq, lora_ga) train beside a changed
# one (peft/tuners/lora/layer.py, update_layer).
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
# Keys of adapter_config.json by which something is trained, or computed, that a sum of weights does not hold.
NOT_CARRIED = {
    "modules_to_save": "modules trained whole beside the adapter",
    "trainable_token_indices": "embeddings of single tokens",
    "layer_replication": "layers that are repeated",
    "alora_invocation_tokens": "an adapter that works behind certain tokens alone",
    "arrow_config": "a router of adapters",
    "megatron_config": "Megatron's layers",
    "lora_bias": "biases of the adapter",
    "use_bdlora": "block-diagonal adapters",
    "use_qalora": "QALoRA's grouped inputs",
    "velora_config": "VeLoRA's projections",
    "monteclora_config": "MonteCLoRA's samples",
    "kasa_config": "KaSA's singular values",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFolder:
    """One trained adapter on disk.

    `base` is what it was trained on as its config names it, `rank` the largest of its ranks, `patterned`
    whether modules have ranks or alphas of their own, `elements` how many numbers it holds, `whole` the
    tensors that are whole weights of the base: PEFT saves embeddings beside an adapter.
    """

    path: Path
    config: LoraConfig
    base: str | None
    rank: int
    patterned: bool
    elements: int
    whole: tuple[str, ...]

    @property
    def on_experts(self) -> bool:
        """Whether it adapts parameters that are no linear layer's weight: stacked experts and routers."""
        return bool(self.config.target_parameters)

    @property
    def name(self) -> str:
        """What people would call it: the run's name, where the folder is a run's `adapter`."""
        path = self.path.resolve()
        return path.parent.name if path.name == "adapter" else path.name


def read_adapter(path: Path) -> AdapterFolder:
    """Read an adapter folder and look at every tensor.

    Raises:
        InputError: it is not an adapter in safetensors, holds something that a merge would lose, or numbers
            that are not finite.
    """
    values = _read_config(path / CONFIG)
    config = _checked_config(path, values)
    if not (path / WEIGHTS).is_file():
        if (path / PICKLED).exists():
            raise InputError(f"{path}: {PICKLED} is a pickle; only safetensors are loaded")
        raise InputError(f"{path}: there is no {WEIGHTS}")
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    elements, whole = _check_tensors(path / WEIGHTS, with_magnitudes=bool(config.use_dora))
    return AdapterFolder(
        path=path,
        config=config,
        base=config.base_model_name_or_path,
        rank=max(ranks),
        patterned=bool(config.rank_pattern or config.alpha_pattern),
        elements=elements,
        whole=whole,
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise InputError(f"{path}: larger than {MAX_CONFIG_BYTES:,} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent}: no adapter: there is no {CONFIG}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable adapter config ({shorten(str(error), 80)})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a JSON object")
    return values


def _checked_config(path: Path, values: Mapping[str, Any]) -> LoraConfig:
    from peft import LoraConfig, PeftConfig

    kind = values.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{path}: peft_type={shorten(kind)}: LoRA, DoRA and rsLoRA are merged, no other kind"
        )
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for key, value in values.items():
        if key not in known and value:
            raise InputError(f"{path}: {shorten(key)} of {CONFIG} is not known to the installed PEFT")
    for key, what in NOT_CARRIED.items():
        if values.get(key):
            raise InputError(f"{path}: {key}={shorten(values[key])}: a merge would lose {what}")
    if values.get("bias", "none") != "none":
        raise InputError(f"{path}: bias={shorten(values['bias'])}: a merge would lose the trained biases")
    start = values.get("init_lora_weights", True)
    if not isinstance(start, bool | str) or start not in PLAIN_STARTS:
        raise InputError(
            f"{path}: init_lora_weights={shorten(start)}: it was trained beside a changed base, "
            "which is not here; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    try:
        config = PeftConfig.from_pretrained(str(path))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: PEFT refuses its config: {shorten(str(error), 120)}") from error
    for value in (config.r, config.lora_alpha):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"{path}: r and lora_alpha must be numbers above 0, not {shorten(value)}")
    return config


def _check_tensors(path: Path, *, with_magnitudes: bool) -> tuple[int, tuple[str, ...]]:
    """How many numbers the file holds, and which of its tensors are no adapter's, after a look at each."""
    import torch
    from safetensors import SafetensorError, safe_open

    elements, learned = 0, False
    whole = []
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  safe_open is no mapping
                if ".lora_" not in name:
                    whole.append(name)
                tensor = file.get_tensor(name)
                if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                    raise InputError(
                        f"{path}: {shorten(name)} is stored as {str(tensor.dtype).removeprefix('torch.')}; "
                        "float32, bfloat16 and float16 are merged"
                    )
                if not torch.isfinite(tensor).all():
                    raise InputError(f"{path}: {shorten(name)} is not finite: the run diverged")
                elements += tensor.numel()
                grown = ".lora_B" in name or ".lora_embedding_B" in name
                learned = learned or (grown and bool(tensor.any()))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not readable safetensors ({shorten(str(error), 80)})") from error
    if not learned and not with_magnitudes:
        raise InputError(f"{path}: every lora_B is zero: the adapter changes nothing")
    return elements, tuple(whole)
