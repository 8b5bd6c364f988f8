"""Images in batches, and the tower that looks at them: frozen, and without gradients.

Token ids are made ahead, as of text; what an image shows is read by the data loader's workers, a few batches
ahead of the step. The image processor is the one on Pillow and NumPy (transformers
image_processing_backends.py, PilBackend), so that torchvision, whose wheel has to fit torch's, is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launcher.training.dataset import FILES
from launcher.training.images.tokens import ImageTokens, images_of
from planner.base.errors import InputError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from launcher.runs.training_job import TrainingJob


class ImageCollator:
    """Batches with images: those of text, the processor's pixels, and which tokens are images'."""

    def __init__(
        self, text: Callable[[list[dict[str, Any]]], dict[str, Any]], processor: Any, tokens: ImageTokens
    ) -> None:
        self.text, self.processor, self.tokens = text, processor, tokens

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch of rows with the column FILES."""
        files = [path for row in rows for path in row[FILES]]
        batch = self.text([{key: value for key, value in row.items() if key != FILES} for row in rows])
        batch[self.tokens.type_ids] = (batch["input_ids"] == self.tokens.token_id).long()
        if files:
            made = self.processor(images=[_opened(path) for path in files], return_tensors="pt")
            batch |= {key: value for key, value in made.items() if key in ("pixel_values", "image_grid_thw")}
        return batch


def collator_for(
    tokenizer: PreTrainedTokenizerBase, job: TrainingJob, images: tuple[ImageTokens, Any] | None
) -> ImageCollator:
    """The collator of a run with images, whose text is batched as TRL batches it; `images`, how the model
    writes them and its image processor, are those of the job's model where they are not given.
    """
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens, processor = images or images_of(job, tokenizer)
    return ImageCollator(DataCollatorForLanguageModeling(pad_token_id=padding), processor, tokens)


class FrozenTower(TrainerCallback):  # type: ignore[misc]
    """Has the vision tower run without gradients.

    transformers has every part with embeddings of its own ask for gradients of their output, a tower's
    patches among them (modeling_utils.py, enable_input_require_grads): a frozen tower's layers would keep
    what they computed, and a backward pass would go through all of it, for nothing.
    """

    def __init__(self, model: torch.nn.Module, path: str) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.tower = base.get_submodule(path)
        self.tower.forward = torch.no_grad()(self.tower.forward)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch off the checkpointing that the trainer has just switched on: there is nothing to keep."""
        for module in self.tower.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


def _opened(path: str) -> Any:
    """An image as it is shown, in colour."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path}: the image cannot be read any more: {shorten(str(error), 120)}") from error
