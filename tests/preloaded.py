"""What forked processes find done (tests/forks.py): the training stack imported, and what it makes once."""

from __future__ import annotations

import gc
import importlib

from planner.base.importing import uncollected
from tests.bfloat16 import multiply_in_float32_without_units

PRELOADED = (
    "bitsandbytes",
    "launcher.models.inspect",
    "launcher.training.build",
    "launcher.training.callbacks",
    "launcher.training.dataset",
    "launcher.training.train",
    "peft.tuners.lora.model",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "trl.trainer.sft_trainer",
)
with uncollected():
    for _name in PRELOADED:
        importlib.import_module(_name)

multiply_in_float32_without_units()

# A thousand regular expressions, compiled for the first model that is loaded or saved.
importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")

# The trainer collects garbage: in what stays there is none, and to look would copy pages that forks share.
gc.freeze()
