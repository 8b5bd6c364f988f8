"""The same run with another method: what QLoRA, 16-bit LoRA and full fine-tuning have in common is kept."""

from __future__ import annotations

from planner.setup.training_setup import ALL_LINEAR, TrainingSetup


def with_method(setup: TrainingSetup, method: str) -> TrainingSetup:
    """Change the method; knobs that the new one does not know take their defaults."""
    if setup.method == method:
        return setup
    changes: dict[str, object] = {"method": method, "prepare_for_kbit_training": False}
    if method == "full":
        changes |= {
            "lora_alpha": None,
            "lora_dropout": 0.0,
            "target_modules": ALL_LINEAR,
            "use_dora": False,
            "use_rslora": False,
        }
    return setup.replace(**changes)
