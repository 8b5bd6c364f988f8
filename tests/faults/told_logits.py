"""Logits of what was trained: by the ranks that hold it, and by one process that loads the saved adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tell_at_the_end(path: Path) -> None:
    """Have the first rank write the logits of the trained model, as all ranks hold it, when it was saved."""
    from launcher.training import saving

    save = saving.save_adapter

    def save_and_tell(folder: Any, writer: Any, trainer: Any, step: int) -> Any:
        saved = save(folder, writer, trainer, step)
        _write(trainer.model, path if trainer.ranks.saves else None)
        return saved

    saving.save_adapter = save_and_tell


def loaded_alone(run: Path, path: Path) -> int:
    """Write the logits of a run's base with its saved adapter, loaded by PEFT in this process."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    from launcher.runs.folder import RunFolder
    from launcher.training import build

    folder = RunFolder(run)
    job = folder.read_job()
    setup = job.setup.replace(num_processes=1, distributed=None)
    base = build.load_model(setup, job.model_source, device=torch.device("cpu"), allow_download=False)
    adapted = PeftModel.from_pretrained(base, folder.adapter, local_files_only=True)
    saved = load_file(folder.adapter / "adapter_model.safetensors")
    for name, parameter in adapted.named_parameters():
        if (value := saved.get(name.replace(".default.", "."))) is not None:
            # PEFT computes in float32 with what was trained, and saved, in bfloat16: rounded otherwise.
            parameter.data = parameter.data.to(value.dtype)
    _write(adapted, path)
    return 0


def _write(model: Any, path: Path | None) -> None:
    import torch
    from safetensors.torch import save_file

    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(40).view(2, 20)).logits
    if path is not None:
        save_file({"logits": logits.float()}, path)
