"""Examples to what is trained: token ids and labels, by the model's own tokenizer and chat template.

Labels are made here and not by TRL, which knows no weights of turns, refuses to take the loss on the
assistant's turns with templates that it does not know (Llama 3.1 and 3.2 among them), and drops examples
without a trained token in silence. The plan's lengths are counted on the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.training.chat_template import CHATML_TEMPLATE, ChatTemplate, not_rendered
from launcher.training.split import Split, key_of, trained_too
from planner.base.errors import InputError, shorten
from planner.data.examples import Pictures, nothing_to_learn
from planner.data.lengths import DatasetStats
from planner.data.reader import (
    Conversation,
    Example,
    PlainText,
    PromptCompletion,
    TrainingData,
    read_training_data,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from launcher.training.images.tokens import ImageTokens

TOKENIZER_BATCH = 1000
FILES = "image_files"
"""The column of image files. One called images would have TRL take the data for its own vision data, which it
processes in the training process."""
NOT_LEARNED = -100
"""torch.nn.CrossEntropyLoss, ignore_index: the label of a token that the loss leaves out."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What is trained of an example: token ids, and the same with NOT_LEARNED where no loss is taken; the
    files of its images, whose tokens end before `images_end`.
    """

    input_ids: list[int]
    labels: list[int]
    files: tuple[str, ...] = ()
    images_end: int = 0

    @property
    def start(self) -> int:
        """Tokens before the first that is learned; all where none is. Cut at that length an example has
        nothing to learn, or not all of its images, which is why their tokens are before it.
        """
        learned = next((i for i, label in enumerate(self.labels) if label != NOT_LEARNED), len(self.labels))
        return max(learned, self.images_end)


def read_dataset(path: Path) -> TrainingData:
    """Read and check a data file or a folder of shards.

    Raises:
        InputError: it cannot be read, or an example is not usable; one line that names the place.
        MissingExtraError: a table whose package is not installed.
    """
    return read_training_data(path)


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without a chat template the ChatML fallback; True if it needed it."""
    if tokenizer.chat_template:
        return False
    tokenizer.chat_template = CHATML_TEMPLATE
    return True


def needs_chat_template(data: TrainingData) -> bool:
    """Whether a chat template renders the examples."""
    return isinstance(data.examples[0], Conversation)


def measure_stats(
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    assistant_only_loss: bool = False,
    split: Split | None = None,
    images: ImageTokens | None = None,
) -> DatasetStats:
    """Lengths and trained tokens of what tokenised gives; with a split, of what it leaves to train. `images`
    is how the model writes them, for data that have some.

    Raises:
        InputError: as tokenised, or as the split; or no example has a token to learn.
    """
    # Of each example its length, where its loss begins, and in how many tokens it is taken.
    found: list[tuple[int, int, int]] = []
    keys: list[bytes] = []
    untrained = 0
    pictures = Pictures()
    for example in data.examples:
        pictures.count(example, None if images is None else images.rule)
    for tokens in tokenised(data, tokenizer, assistant_only_loss=assistant_only_loss, images=images):
        if tokens.start == len(tokens.labels):
            untrained += 1
            continue
        learned = sum(label != NOT_LEARNED for label in tokens.labels)
        found.append((len(tokens.input_ids), tokens.start, learned))
        if split is not None:
            keys.append(key_of(tokens.input_ids))
    if untrained and not found:
        raise nothing_to_learn(untrained, data.source)
    if split is not None:
        evaluated = split.evaluated(keys, data.source)
        found = [one for place, one in enumerate(found) if place not in evaluated]
    loss_on = {"messages": "assistant" if assistant_only_loss else "all", "prompt_completion": "completion"}
    rendering = not_rendered(data, tokenizer) if needs_chat_template(data) else ()
    return DatasetStats.from_lengths(
        [length for length, _, _ in found],
        loss_tokens=sum(learned for _, _, learned in found),
        loss_on=loss_on.get(data.format, "all"),
        data_format=data.format,
        estimated=False,
        starts=[start for _, start, _ in found],
        untrained=untrained,
        left_out=data.left_out,
        notes=rendering,
        images=pictures.images,
        image_patches=pictures.most_patches,
        total_patches=pictures.patches,
    )


def to_trl_dataset(
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    assistant_only_loss: bool = False,
    images: ImageTokens | None = None,
) -> Dataset:
    """The columns that SFTTrainer takes as they are: `input_ids` and `labels`, cut at `max_length`; with
    images the names of their files, which launcher.training.images reads. An image is never cut: an example
    whose images end beyond max_length is left out.

    Examples without a token to learn within that length are left out, as measure_stats counts them.

    Raises:
        InputError: as tokenised; or nothing is left.
    """
    made = tokenised(data, tokenizer, assistant_only_loss=assistant_only_loss, images=images)
    kept = (tokens for tokens in made if tokens.start < min(max_length, len(tokens.labels)))
    return _dataset(kept, data, max_length)


def split_trl_datasets(
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    split: Split,
    assistant_only_loss: bool = False,
    images: ImageTokens | None = None,
) -> tuple[Dataset, Dataset]:
    """What is trained and what is evaluated on, each as to_trl_dataset makes it.

    Raises:
        InputError: as to_trl_dataset for either part, or as the split.
    """
    keys: list[bytes] = []
    # The place of each row among the examples that have a token to learn at any length, which are split.
    places: list[int] = []

    def kept() -> Iterator[Tokens]:
        for tokens in tokenised(data, tokenizer, assistant_only_loss=assistant_only_loss, images=images):
            if tokens.start == len(tokens.labels):
                continue
            keys.append(key_of(tokens.input_ids))
            if tokens.start < max_length:
                places.append(len(keys) - 1)
                yield tokens

    whole = _dataset(kept(), data, max_length)
    evaluated = split.evaluated(keys, data.source)
    parts: tuple[list[int], list[int]] = ([], [])
    for row, place in enumerate(places):
        parts[place in evaluated].append(row)
    if not all(parts):
        raise InputError(
            f"{data.source}: --eval-split {split.wanted:g} leaves nothing to "
            f"{'evaluate on' if parts[0] else 'train'} within max_length={max_length}"
        )
    train, evaluation = (take_rows(whole, rows) for rows in parts)
    # Of two examples that begin alike the same is left when both are cut.
    alike = set(trained_too(evaluation, train))
    if len(alike) == len(evaluation):
        raise InputError(
            f"{data.source}: cut at max_length={max_length}, every example to evaluate on is trained too"
        )
    return train, take_rows(evaluation, [row for row in range(len(evaluation)) if row not in alike])


def take_rows(rows: Dataset, places: Sequence[int]) -> Dataset:
    """A dataset of some rows, in a table of its own."""
    from datasets import Dataset

    return Dataset(rows.data.table.take(list(places)))


def _dataset(made: Iterator[Tokens], data: TrainingData, max_length: int) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    kind = pa.list_(pa.int64())
    parts = []
    while batch := list(islice(made, TOKENIZER_BATCH)):
        columns = {
            "input_ids": [tokens.input_ids[:max_length] for tokens in batch],
            "labels": [tokens.labels[:max_length] for tokens in batch],
        }
        table = pa.table({name: pa.array(rows, type=kind) for name, rows in columns.items()})
        if data.has_images:
            files = pa.array([list(tokens.files) for tokens in batch], type=pa.list_(pa.string()))
            table = table.append_column(FILES, files)
        parts.append(table)
    if not parts:
        raise InputError(
            f"{data.source}: none of the {len(data.examples):,} examples has a token to learn within "
            f"max_length={max_length}, so nothing would be trained"
        )
    return Dataset(pa.concat_tables(parts))


def tokenised(
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    assistant_only_loss: bool = False,
    images: ImageTokens | None = None,
) -> Iterator[Tokens]:
    """Token ids and labels of every example, nothing cut.

    Raises:
        InputError: the data have images, and it is not said how the model writes them; the chat template or
        the tokenizer refuses an example, or the template does not tell apart
            the turns whose loss is to be taken; the line names which.
    """
    chat = needs_chat_template(data)
    if assistant_only_loss and not chat:
        raise InputError(f"--assistant-only-loss needs conversations; {data.source} holds {data.format}")
    if data.has_images and images is None:
        raise InputError(f"{data.source}: has images, and the model is one of text")
    if chat:
        ensure_chat_template(tokenizer)
    template = ChatTemplate(tokenizer, assistant_only_loss, images)
    examples = iter(enumerate(data.examples, start=1))
    while batch := list(islice(examples, TOKENIZER_BATCH)):
        places = [f"{data.source}: example {number}" for number, _ in batch]
        if chat:
            shown = [example for _, example in batch if isinstance(example, Conversation)]
            made = _conversations(shown, places, template)
            yield from made if images is None else _with_images(made, shown, places, images)
        else:
            yield from _texts([example for _, example in batch], places, tokenizer)


def _texts(examples: Sequence[Example], places: Sequence[str], tokenizer: Any) -> Iterator[Tokens]:
    """Plain texts and prompts with completions, special tokens and end of sequence as TRL adds them."""
    eos = tokenizer.eos_token or ""
    texts, prompts = [], []
    for example in examples:
        match example:
            case PromptCompletion(prompt=prompt, completion=completion):
                prompts.append(prompt)
                texts.append(prompt + (completion if completion.endswith(eos) else completion + eos))
            case PlainText(text=text):
                texts.append(text if text.endswith(eos) else text + eos)
    wholes = _encoded(tokenizer, texts, places)["input_ids"]
    if not prompts:
        yield from (Tokens(ids, ids) for ids in wholes)
        return
    before = _encoded(tokenizer, prompts, places)["input_ids"]
    for ids, prompt_ids in zip(wholes, before, strict=True):
        yield _behind(ids, prompt_ids)


def _behind(ids: list[int], prompt_ids: list[int]) -> Tokens:
    """The completion begins where prompt and whole diverge (trl/trainer/sft_trainer.py, tokenize_fn)."""
    pairs = zip(ids, prompt_ids, strict=False)
    common = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(prompt_ids)))
    return Tokens(ids, [NOT_LEARNED] * common + ids[common:])


def _with_images(
    made: Iterator[Tokens], examples: Sequence[Conversation], places: Sequence[str], images: ImageTokens
) -> Iterator[Tokens]:
    """The same with the files of each example's images, whose own tokens are not learned.

    Raises:
        InputError: the template does not show all of them.
    """
    for tokens, example, where in zip(made, examples, places, strict=True):
        pictures = example.pictures
        wanted = sum(images.rule.tokens(images.rule.patches(one.size)) for one in pictures)
        at = [place for place, one in enumerate(tokens.input_ids) if one == images.token_id]
        if len(at) != wanted:
            raise InputError(
                f"{where}: the model's chat template shows {len(at):,} of {wanted:,} tokens of images"
            )
        labels = list(tokens.labels)
        for place in at:
            labels[place] = NOT_LEARNED
        files = tuple(one.path for one in pictures)
        yield Tokens(tokens.input_ids, labels, files, at[-1] + 1 if at else 0)


def _conversations(
    examples: Sequence[Conversation], places: Sequence[str], template: ChatTemplate
) -> Iterator[Tokens]:
    every = [template.turns(example) for example in examples]
    texts = [
        template.rendered(turns, example, where)
        for turns, example, where in zip(every, examples, places, strict=True)
    ]
    encoded = _encoded(
        template.tokenizer, texts, places, add_special_tokens=False, return_offsets_mapping=True
    )
    for number, example in enumerate(examples):
        ids, where = encoded["input_ids"][number], places[number]
        labels = list(ids)
        if example.completion_from is not None:
            asked = template.rendered(every[number][: example.completion_from], example, where, True)
            prompt = _encoded(template.tokenizer, [asked], [where], add_special_tokens=False)["input_ids"][0]
            labels = _behind(ids, prompt).labels
        learned = template.learned(
            example, every[number], texts[number], encoded["offset_mapping"][number], where
        )
        if learned is not None:
            labels = [label if keep else NOT_LEARNED for label, keep in zip(labels, learned, strict=True)]
        yield Tokens(ids, labels)


def _encoded(tokenizer: Any, texts: list[str], places: Sequence[str], **options: Any) -> Any:
    """Tokens of texts; what the tokenizer refuses is named by its place."""
    try:
        return tokenizer(texts, **options)
    except (TypeError, ValueError, OverflowError, NotImplementedError) as error:
        for text, where in zip(texts, places, strict=True):
            try:
                tokenizer([text], **options)
            except (TypeError, ValueError, OverflowError, NotImplementedError) as own:
                raise InputError(f"{where}: the tokenizer refuses it: {shorten(str(own), 120)}") from own
        raise InputError(f"{places[0]}: the tokenizer refuses it: {shorten(str(error), 120)}") from error
