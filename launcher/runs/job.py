"""The job of a plan: what the command line and the terminal interface start, made in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.runs.folder import RunFolder, create_run_folder, write_first
from launcher.runs.kept.checkpoints import refuse_full_disk
from launcher.runs.training_job import OWN_ENGINE, SEED, TrainingJob, check_evaluation
from planner.answers.plan import Plan
from planner.data.files import named_on_hub
from planner.models.spec import ModelSpec
from planner.planning.made_with import to_keep
from planner.setup.defaults import KEPT_CHECKPOINTS


@dataclass(frozen=True, kw_only=True, slots=True)
class JobWish:
    """What a person asks of a run beside its plan; null stands for none, of `seed` for the usual one.

    `model_source` is a folder or a Hub id, `data` and `eval_data` are paths or names of data sets of the Hub;
    the other fields are TrainingJob's.

    Raises:
        InputError: what is asked of evaluation does not go together.
    """

    model_source: str
    data: Path
    eval_data: Path | None = None
    eval_split: float | None = None
    early_stopping_patience: int | None = None
    max_steps: int | None = None
    checkpoints: bool = True
    save_steps: int | None = None
    save_minutes: float | None = None
    keep_checkpoints: int = KEPT_CHECKPOINTS
    eval_steps: int | None = None
    seed: int | None = None
    assistant_only_loss: bool = False
    allow_download: bool = False
    track: tuple[str, ...] = ()
    allow_upload: bool = False
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str | None = None
    engine: str = OWN_ENGINE
    engine_python: str | None = None

    def __post_init__(self) -> None:
        check_evaluation(
            data=self.eval_data,
            split=self.eval_split,
            steps=self.eval_steps,
            patience=self.early_stopping_patience,
        )

    @property
    def used_seed(self) -> int:
        """The seed that was asked for, or the usual one."""
        return SEED if self.seed is None else self.seed


def job_of(plan: Plan, wish: JobWish) -> TrainingJob:
    """The job that trains what was planned; rate, epochs and warm-up are the plan's.

    Raises:
        InputError: a wish that is not accepted.
    """
    schedule = plan.schedule
    return TrainingJob(
        setup=plan.setup,
        model_source=wish.model_source,
        data_path=_place(wish.data),
        eval_data_path=None if wish.eval_data is None else _place(wish.eval_data),
        eval_split=wish.eval_split,
        early_stopping_patience=wish.early_stopping_patience,
        learning_rate=schedule.learning_rate,
        num_train_epochs=schedule.num_train_epochs,
        max_steps=wish.max_steps,
        warmup_ratio=schedule.warmup_ratio,
        lr_scheduler_type=schedule.lr_scheduler_type,
        seed=wish.used_seed,
        checkpoints=wish.checkpoints,
        save_steps=wish.save_steps,
        save_minutes=wish.save_minutes,
        keep_checkpoints=wish.keep_checkpoints,
        eval_steps=wish.eval_steps,
        assistant_only_loss=wish.assistant_only_loss,
        allow_download=wish.allow_download,
        track=wish.track,
        allow_upload=wish.allow_upload,
        gpu_index=plan.gpu.first_position(max(1, plan.setup.num_processes // wish.nnodes)),
        nnodes=wish.nnodes,
        node_rank=wish.node_rank,
        rdzv_endpoint=wish.rdzv_endpoint,
        engine=wish.engine,
        engine_python=wish.engine_python,
    )


def _place(data: Path) -> str:
    """Where the training process finds the data: an absolute path, or the name of a data set of the Hub."""
    return str(data.resolve() if named_on_hub(data) is None else data)


def refuse_no_room(root: Path, plan: Plan, job: TrainingJob) -> None:
    """See that the disk has room for what the run writes.

    Raises:
        InputError: it has not.
    """
    # The best evaluation's is kept beside the newest.
    kept = job.keep_checkpoints + job.evaluates if job.checkpoints else 0
    what = f"the adapter and {kept + 1} checkpoints" if kept else "the adapter"
    refuse_full_disk(root, plan.loading.written_bytes(kept), what)


def create_planned_run(root: Path, plan: Plan, wish: JobWish, *, name: str | None = None) -> RunFolder:
    """Make a run folder under `root` with the plan and its job.

    Raises:
        InputError: a wish that is not accepted, no room for what the run writes, or the folder exists or
            cannot be made or written.
    """
    job = job_of(plan, wish)
    refuse_no_room(root, plan, job)
    folder = create_run_folder(root, job, name=name)
    write_first(folder, folder.plan, to_keep(plan).to_dict())
    return folder


def model_source(name: str, model: ModelSpec | None) -> str:
    """Where the weights of a named model are: its folder, the Hub id as given, else that of the catalog.

    Of a folder or a Hub id `model` need not be known yet.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    return name if model is None or "/" in name else model.hub_id
