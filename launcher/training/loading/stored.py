"""Loading a model whose weights bitsandbytes quantised before: as they are, computed as the plan says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from planner.base.errors import FieldError, InputError, shorten
from planner.models import hub_config
from planner.models.checkpoint import Checkpoint, is_dequantised
from planner.setup.knob import plain
from planner.setup.methods import stored_knobs
from planner.setup.training_setup import TrainingSetup

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def stored_in(source: str, *, allow_download: bool) -> Checkpoint | None:
    """How the weights of a folder or Hub id are quantised; None where they are not.

    Raises:
        InputError: its config is not here, or its weights are in a form that is not trained.
    """
    return hub_config.quantisation_of(_config_of(source, allow_download), where=source)


def is_microscaled_in(source: str, *, allow_download: bool) -> bool:
    """Whether the experts of a folder or Hub id are stored in MXFP4, which is dequantised while it is read.

    Raises:
        InputError: its config is not here.
    """
    return is_dequantised(_config_of(source, allow_download))


def _config_of(source: str, allow_download: bool) -> dict[str, Any]:
    from transformers import PretrainedConfig

    try:
        values, _ = PretrainedConfig.get_config_dict(source, local_files_only=not allow_download)
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: no config could be read: {shorten(str(error), 160)}") from error
    return dict(values)


def refuse_other(setup: TrainingSetup, checkpoint: Checkpoint, source: str) -> None:
    """Refuse a setup that is not of weights as a checkpoint has them.

    Raises:
        InputError: another method, or a knob at another value than the weights were quantised with.
    """
    if setup.method != "qlora" or setup.distributed == "fsdp" or setup.experts == "4bit":
        raise InputError(
            f"{source}: its weights are stored in {checkpoint.bits} bits, which are trained with method "
            "qlora, on one GPU or with distributed ddp, and experts in 16 bits"
        )
    for name, value in stored_knobs(checkpoint).items():
        if getattr(setup, name) != value:
            raise FieldError(name, plain(getattr(setup, name)), f"{plain(value)}, as {source} is stored")


def stored_config(source: str, *, dtype: torch.dtype, allow_download: bool) -> PretrainedConfig:
    """The config to load stored weights by: products are in `dtype`, whatever they were saved with."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=not allow_download)
    if config.quantization_config["load_in_4bit"]:
        config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    return config


def hold_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Hold what is not quantised in `dtype`, and have the rest dequantised to it.

    transformers 5.23 leaves the weights of a quantised checkpoint in the dtype of the file, whatever it is
    asked for (quantizers/base.py, get_new_dtype), and bitsandbytes dequantises to that of the model that they
    were made from, after which each product casts the weight (autograd/_functions.py, MatMul4Bit).
    """
    own = model._get_dtype_plan(dtype)
    for name, parameter in model.named_parameters():
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            state.dtype = dtype
        elif parameter.is_floating_point():
            fixed = [one for pattern, one in own.items() if re.search(pattern, name)]
            parameter.data = parameter.data.to(fixed[0] if fixed else dtype)
