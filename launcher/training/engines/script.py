"""The script of a run that Unsloth trains: the one that is written for it, for this run's data and adapter.

Light: no torch.
"""

from __future__ import annotations

from typing import Any

from launcher.runs.training_job import TrainingJob
from planner.trainers import unsloth

SCRIPT = "unsloth_train.py"
REPORTER = "vramwise_reporter"
WORK = ".engine"
"""In the run folder, until the run is over: rows, and what the trainer writes for itself."""
ROWS = f"{WORK}/rows.jsonl"


def script_of(job: TrainingJob, adapter: str) -> str:
    """The script of a job, all of whose paths are within the run folder; saves into the folder `adapter`.

    Raises:
        InputError: the setup has what Unsloth has not.
    """
    values = unsloth.write(job.setup, job.model_source, job.num_train_epochs, job.learning_rate)
    values["random_state"] = job.seed
    own: dict[str, Any] = {
        "lr_scheduler_type": job.lr_scheduler_type,
        # transformers takes a number below 1 for a share of all steps.
        "warmup_steps": job.warmup_ratio,
        "weight_decay": job.weight_decay,
        "max_grad_norm": job.max_grad_norm,
        "seed": job.seed,
        "logging_steps": job.logging_steps,
        "save_strategy": "no",
        "report_to": "none",
        "include_num_input_tokens_seen": "non_padding",
        "output_dir": f"{WORK}/out",
    }
    if job.max_steps is not None:
        own["max_steps"] = job.max_steps
    # Else a copy in 4 bits of another name is looked for, which is not on this machine.
    first = {"model_name": values.pop("model_name"), "use_exact_model_name": True}
    return unsloth.script({**first, **values, **own}, data=ROWS, adapter=adapter, reporter=REPORTER)
