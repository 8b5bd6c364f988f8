"""An environment of its own with a stand-in of Unsloth: its interface over transformers, PEFT and TRL.

As Unsloth does, it changes TRL's SFTConfig: on a processor nothing is in 16 bits.
"""

from __future__ import annotations

import sys
import sysconfig
import venv
from pathlib import Path

PACKAGE = """
import os, sys
assert not any(name.split(".")[0] in ("planner", "launcher") for name in sys.modules)
if os.environ.get("STAND_IN") == "broken":
    raise ImportError("no kernel image for this card")
if os.environ.get("STAND_IN") != "full":
    import trl

    class SFTConfig(trl.SFTConfig):
        def __init__(self, **given):
            super().__init__(**{**given, "bf16": False, "use_cpu": True, "optim": "adamw_torch"})

    trl.SFTConfig = SFTConfig

class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, max_seq_length, dtype, load_in_4bit, use_exact_model_name):
        import torch
        if os.environ.get("STAND_IN") == "full":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def get_peft_model(model, r, lora_alpha, lora_dropout, target_modules, bias, use_rslora,
                       use_gradient_checkpointing, random_state):
        from peft import LoraConfig, get_peft_model
        return get_peft_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules,
                                                task_type="CAUSAL_LM"))
"""


def make_environment(root: Path, *, lacking: str | None = None) -> Path:
    """A virtual environment that sees this one's packages and has the stand-in; returns its Python."""
    venv.create(root, symlinks=True)
    site = next(root.glob("lib/python*/site-packages"))
    (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name, version in (("unsloth", "2026.10.9"), ("unsloth_zoo", "2026.10.9")):
        if name == lacking:
            continue
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(PACKAGE if name == "unsloth" else "")
        told = site / f"{name}-{version}.dist-info"
        told.mkdir()
        (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return root / "bin" / Path(sys.executable).name
