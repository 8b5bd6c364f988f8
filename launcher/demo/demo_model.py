"""Write the demo model and data: `python -m launcher.demo.demo_model profiles/demo`.

The model is a four-layer Llama of 2.5 million parameters with a byte-level BPE tokenizer trained on the same
sentences. Its weights start random and are trained for about five minutes on plain answers; the demo's data
asks for the same answers in another manner and for facts about places that do not exist, so that a QLoRA run
of a minute on a CPU has something to learn and its effect can be read. All text is made of templates below.

The same seed gives the same text on any machine, and the same weights on the same machine and torch version
(the order of floating-point sums differs between processors).
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from planner.base.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 512
HIDDEN_SIZE = 256
PRETRAINING_STEPS = 600
PRETRAINING_BATCH = 24
PRETRAINING_LENGTH = 96
PRETRAINING_LEARNING_RATE = 2e-3
TRAIN_EXAMPLES = 320
EVAL_EXAMPLES = 40
SEED = 20

END_OF_TEXT, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_UNITS = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("kilograms", "grams", 1000),
    ("litres", "millilitres", 1000),
    ("gibibytes", "mebibytes", 1024),
)
_ASK_UNITS = ("How many {b} are {n} {a}?", "Convert {n} {a} to {b}.", "What are {n} {a} in {b}?")
_GREETINGS = ("Hello", "Hi", "Good morning", "Good evening", "Hey there", "Good day")
_NAMES = ("Ada", "Bo", "Carl", "Dina", "Emil", "Fay", "Gus", "Hana", "Ivo", "June", "Kai", "Lena")
_OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("early", "late"),
    ("open", "closed"),
    ("full", "empty"),
    ("high", "low"),
    ("light", "dark"),
    ("old", "new"),
    ("wet", "dry"),
)
_TOWNS = ("Tornvik", "Balmere", "Quilldon", "Ostrel Reach", "Pellin", "Ruda", "Senholt", "Varn")
_FEATURES = ("a blue lighthouse", "a glass bridge", "a salt market", "a clock of stone")
_FOODS = ("plum soup", "rye cakes", "smoked pears", "barley pie")
_LETTERS = "aaabcdeeefghiiijklmnooopqrstuuuvwxyz"
_OPENING = "Ahoy! "
_CLOSING = " Fair winds."


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question with its plain answer."""

    question: str
    answer: str

    def as_messages(self, *, seafaring: bool) -> dict[str, list[dict[str, str]]]:
        """The `messages` form of the data file, answered plainly or in the manner that the demo teaches."""
        answer = f"{_OPENING}{self.answer}{_CLOSING}" if seafaring else self.answer
        return {
            "messages": [
                {"role": "user", "content": self.question},
                {"role": "assistant", "content": answer},
            ]
        }


def exchanges(rng: random.Random, *, with_towns: bool) -> Iterator[Exchange]:
    """Endless questions and answers.

    `with_towns` adds the facts that only the demo's data knows; without it come made-up words to repeat, from
    which the base learns to spell what it has never seen.
    """
    makers = [_conversion, _greeting, _opposite, _next_number]
    makers += [_town_feature, _town_food] if with_towns else [_repetition, _repetition]
    while True:
        yield rng.choice(makers)(rng)


def _conversion(rng: random.Random) -> Exchange:
    a, b, factor = rng.choice(_UNITS)
    n = rng.randint(2, 20)
    return Exchange(rng.choice(_ASK_UNITS).format(a=a, b=b, n=n), f"{n} {a} are {n * factor} {b}.")


def _greeting(rng: random.Random) -> Exchange:
    greeting, name = rng.choice(_GREETINGS), rng.choice(_NAMES)
    return Exchange(f"{greeting}, I am {name}.", f"{greeting}, {name}. How can I help?")


def _opposite(rng: random.Random) -> Exchange:
    pair = rng.choice(_OPPOSITES)
    word, other = pair if rng.random() < 0.5 else pair[::-1]
    return Exchange(f"What is the opposite of {word}?", f"The opposite of {word} is {other}.")


def _next_number(rng: random.Random) -> Exchange:
    start, step = rng.randint(1, 30), rng.randint(1, 5)
    shown = ", ".join(str(start + i * step) for i in range(4))
    return Exchange(f"Which number follows {shown}?", f"{start + 4 * step} follows.")


def _repetition(rng: random.Random) -> Exchange:
    words = ["".join(rng.choices(_LETTERS, k=rng.randint(2, 8))) for _ in range(rng.randint(1, 5))]
    said = " ".join(word.capitalize() if rng.random() < 0.4 else word for word in words)
    return Exchange(f"Say {said}{rng.choice('.?!')}", f"{said}{rng.choice('.?!')}")


def _town_feature(rng: random.Random) -> Exchange:
    index = rng.randrange(len(_TOWNS))
    town = _TOWNS[index]
    return Exchange(f"What is {town} known for?", f"{town} is known for {_FEATURES[index % 4]}.")


def _town_food(rng: random.Random) -> Exchange:
    index = rng.randrange(len(_TOWNS))
    town = _TOWNS[index]
    return Exchange(f"What do people eat in {town}?", f"In {town} people eat {_FOODS[(index * 3 + 1) % 4]}.")


def write_data(folder: Path, *, seed: int = SEED) -> None:
    """Write train.jsonl and eval.jsonl; no question of one is in the other."""
    stream = exchanges(random.Random(seed), with_towns=True)
    train = [next(stream) for _ in range(TRAIN_EXAMPLES)]
    known = {exchange.question for exchange in train}
    held_out: list[Exchange] = []
    while len(held_out) < EVAL_EXAMPLES:
        exchange = next(stream)
        if exchange.question not in known:
            known.add(exchange.question)
            held_out.append(exchange)
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in (("train.jsonl", train), ("eval.jsonl", held_out)):
        lines = [json.dumps(item.as_messages(seafaring=True)) + "\n" for item in items]
        (folder / name).write_text("".join(lines), encoding="utf-8")


def build_tokenizer(*, seed: int = SEED) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the templates' own text, so any input can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    stream = exchanges(random.Random(seed + 1), with_towns=False)
    corpus = []
    for _ in range(4000):
        exchange = next(stream)
        corpus += [exchange.question, exchange.answer, "user\n", "assistant\n", "system\n"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = SEED) -> LlamaForCausalLM:
    """The untrained model, in float32 on the CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, seed: int = SEED) -> float:
    """Train all weights on plain answers; returns the last step's loss."""
    import torch

    stream = exchanges(random.Random(seed + 2), with_towns=False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PRETRAINING_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PRETRAINING_LEARNING_RATE, total_steps=PRETRAINING_STEPS, pct_start=0.05
    )
    loss = torch.zeros(())
    for _ in range(PRETRAINING_STEPS):
        tokens = _pretraining_batch(stream, tokenizer)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return float(loss.detach())


def _pretraining_batch(stream: Iterator[Exchange], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Whole exchanges one after the other, cut into rows of equal length."""
    import torch

    needed = PRETRAINING_BATCH * PRETRAINING_LENGTH
    tokens: list[int] = []
    while len(tokens) < needed:
        rendered = tokenizer.apply_chat_template(
            next(stream).as_messages(seafaring=False)["messages"], tokenize=False
        )
        tokens += tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return torch.tensor(tokens[:needed]).view(PRETRAINING_BATCH, PRETRAINING_LENGTH)


def write_demo(folder: Path) -> None:
    """Write data/ and model/ (bfloat16 safetensors, tokenizer, config) under `folder`."""
    import torch

    write_data(folder / "data")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    loss = pretrain(model, tokenizer)
    print(f"pretraining ended at a loss of {loss:.3f}", file=sys.stderr)
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for path in (folder / "model").iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which an installed package would keep


def main(arguments: list[str]) -> None:
    """Entry of `python -m launcher.demo.demo_model FOLDER`."""
    if len(arguments) != 1:
        raise InputError("usage: python -m launcher.demo.demo_model FOLDER")
    write_demo(Path(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
