"""The data of a run, tokenised by one rank of a machine and mapped into memory by all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.runs.folder import RunFolder
from launcher.runs.training_job import TrainingJob
from launcher.training.several.ranks import Ranks
from launcher.training.split import Split, trained_too

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from planner.data.reader import TrainingData

    Made = tuple[PreTrainedTokenizerBase, Dataset, Dataset | None]

FOLDER = ".rows"


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Rows that the first rank of this machine makes, and the others wait for."""

    folder: RunFolder
    ranks: Ranks

    @property
    def path(self) -> Path:
        """Where they lie while a run starts; what TRL makes of them (packing) lies beside them."""
        return self.folder.path / FOLDER

    def share(self, make: Callable[[], Made], tokenizer: Callable[[], PreTrainedTokenizerBase]) -> Made:
        """What `make` gives on the first rank, with the rows on every one; the others take `tokenizer`'s."""
        if self.ranks.alone:
            return make()
        from datasets import load_from_disk

        used = None
        if self.ranks.tells:
            shutil.rmtree(self.path, ignore_errors=True)
            used, train, evaluated = make()
            train.save_to_disk(self.path / "train")
            if evaluated is not None:
                evaluated.save_to_disk(self.path / "eval")
        self.ranks.wait()
        eval_path = self.path / "eval"
        return (
            tokenizer() if used is None else used,
            load_from_disk(self.path / "train"),
            load_from_disk(eval_path) if eval_path.exists() else None,
        )

    def forget(self) -> None:
        """When all ranks have them: remove their files, which stay mapped."""
        if self.ranks.alone:
            return
        self.ranks.wait()
        if self.ranks.tells:
            shutil.rmtree(self.path, ignore_errors=True)


def made_rows(job: TrainingJob, warn: Callable[[str], None]) -> Made:
    """The tokenizer, and what it makes of the job's data."""
    from launcher.training import build, dataset

    train_data = dataset.read_dataset(Path(job.data_path))
    eval_data = dataset.read_dataset(Path(job.eval_data_path)) if job.eval_data_path else None
    tokenizer = build.load_tokenizer(job.model_source, allow_download=job.allow_download)
    if dataset.needs_chat_template(train_data) and dataset.ensure_chat_template(tokenizer):
        warn("the tokenizer has no chat template; ChatML is used and saved with the adapter")

    length, assistant = job.setup.max_length, job.assistant_only_loss
    images = None
    if job.setup.image_patches:
        from launcher.training.images.tokens import image_tokens

        images = image_tokens(job.model_source, tokenizer, allow_download=job.allow_download)

    def made(data: TrainingData) -> Dataset:
        rows = dataset.to_trl_dataset(
            data, tokenizer, max_length=length, assistant_only_loss=assistant, images=images
        )
        tell_untrained(data, len(rows))
        return rows

    def tell_untrained(data: TrainingData, kept: int) -> None:
        every = len(data.examples)
        if kept < every:
            what = "no token to learn" if images is None else "no token to learn, or images that do not fit"
            warn(f"{data.source}: {every - kept:,} of {every:,} examples have {what}")

    if job.eval_split is not None:
        parts = dataset.split_trl_datasets(
            train_data,
            tokenizer,
            max_length=length,
            split=Split(job.eval_split, job.seed),
            assistant_only_loss=assistant,
            images=images,
        )
        tell_untrained(train_data, sum(map(len, parts)))
        return tokenizer, *parts
    train_rows = made(train_data)
    if eval_data is None:
        return tokenizer, train_rows, None
    eval_rows = made(eval_data)
    if shared := len(trained_too(eval_rows, train_rows)):
        warn(
            f"{shared:,} of {len(eval_rows):,} examples of {eval_data.source} are trained on too: their loss "
            "says nothing about what is new",
        )
    return tokenizer, train_rows, eval_rows
