"""What is trained of each kind of data is the tokenizer's own rendering of it, and what the plan counted."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
import trl

from launcher.models import limits
from launcher.training import dataset
from launcher.training.build import load_tokenizer
from planner.base.data_files import PROFILES
from planner.base.errors import InputError
from planner.data.examples import Conversation, Message, TrainingData
from planner.data.reader import check_rows
from tests.data_rows import ANSWER, CALLED, READ, RESULT, TOOL, USER

MODEL = str(PROFILES / "demo" / "model")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SYSTEM = {"role": "system", "content": "Be brief."}
# A template that renders all that a row may hold, and the end of a turn outside of any mark.
FULL = (
    "{% for tool in tools or [] %}<|im_start|>tools\n{{ tool | tojson }}<|im_end|>\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set thought = m.reasoning_content or m.thinking %}"
    "{% if thought %}<think>{{ thought }}</think>\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "{% if m.name %} ({{ m.name }}, {{ m.tool_call_id }}){% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALPACA_PROMPT = "Below is an instruction that describes a task{}\n\n### Instruction:\n{}\n\n{}### Response:\n"
MORE = ", paired with an input that provides further context"
ASKED = ". Write a response that appropriately completes the request."
# The turns, and tools, that a row stands for, and from which turn on the loss is taken.
TURNS: dict[str, tuple[list[dict[str, Any]], list[Any] | None, int]] = {
    "messages": ([USER, ANSWER], None, 0),
    "messages with a system turn": ([SYSTEM, USER, ANSWER], None, 0),
    "role developer": ([SYSTEM, USER, ANSWER], None, 0),
    "key system beside messages": ([SYSTEM, USER, ANSWER], None, 0),
    "tools": ([USER, ANSWER], [TOOL], 0),
    "tool_calls": (
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALLED]}, RESULT, ANSWER],
        [TOOL],
        0,
    ),
    "empty or null tool_calls": ([USER, ANSWER], None, 0),
    "reasoning_content": ([USER, {**ANSWER, "reasoning_content": "Two and two."}], None, 0),
    "thinking or reasoning": ([USER, {**ANSWER, "thinking": "Two and two."}], None, 0),
    "content in parts of text": ([{"role": "user", "content": "Hi"}, ANSWER], None, 0),
    "ShareGPT conversations": (
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        None,
        0,
    ),
    "ShareGPT with system and tools": (
        [
            SYSTEM,
            {"role": "user", "content": "2+2?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
            },
            {"role": "tool", "content": "4"},
            ANSWER,
        ],
        None,
        0,
    ),
    "prompt and completion of turns": ([USER, ANSWER], [TOOL], 1),
    "Alpaca with system and history": (
        [
            SYSTEM,
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Add.\n2 and 2"},
            {"role": "assistant", "content": "4"},
        ],
        None,
        4,
    ),
    "question and answer": (
        [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Four."}],
        None,
        1,
    ),
}
TEXTS = {
    "prompt and completion": ("2+2=", " 4"),
    "Alpaca": (ALPACA_PROMPT.format(MORE + ASKED, "Add.", "### Input:\n2 and 2\n\n"), "4"),
    "Alpaca without input": (ALPACA_PROMPT.format(ASKED, "Sing.", ""), "La"),
    "text": ("", "Once upon a time"),
}


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(MODEL, allow_download=False)


def read(*rows: object) -> TrainingData:
    return check_rows(((f"line {i}", row) for i, row in enumerate(rows, 1)), source="data")


def trained(data: TrainingData, tokenizer: Any, **options: Any) -> dict[str, list[int]]:
    """The only row that the trainer is given, after its own preparation of it."""
    made = dataset.to_trl_dataset(data, tokenizer, max_length=2048, **options)
    assert len(made) == 1
    return made[0]


def learned(row: dict[str, list[int]], tokenizer: Any) -> list[str]:
    """Text of each run of tokens that the loss is taken on."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, dataset.NOT_LEARNED)
        if label == token:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_every_kind_is_here() -> None:
    assert {*TURNS, *TEXTS, "weight"} == READ.keys()


@pytest.mark.parametrize("template", ["own", "full"])
@pytest.mark.parametrize("name", TURNS)
def test_turns_are_trained_as_the_tokenizer_renders_them(name: str, template: str, tokenizer: Any) -> None:
    if template == "full":
        tokenizer.chat_template = FULL
    turns, tools, start = TURNS[name]
    row = trained(read(READ[name]), tokenizer)
    whole = tokenizer.apply_chat_template(turns, tools=tools, tokenize=True, return_dict=True)["input_ids"]
    assert row["input_ids"] == whole
    before = 0
    if start:
        asked = tokenizer.apply_chat_template(
            turns[:start], tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        before = len(asked["input_ids"])
        assert whole[:before] == asked["input_ids"]
    assert row["labels"] == [dataset.NOT_LEARNED] * before + whole[before:]


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_trained_as_the_tokenizer_reads_them(name: str, tokenizer: Any) -> None:
    prompt, completion = TEXTS[name]
    row = trained(read(READ[name]), tokenizer)
    whole = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]
    before = len(tokenizer(prompt)["input_ids"]) if prompt else 0
    assert row["input_ids"] == whole
    assert row["labels"] == [dataset.NOT_LEARNED] * before + whole[before:]


@pytest.mark.parametrize("assistant_only", [False, True])
def test_a_turn_of_weight_0_is_not_learned(assistant_only: bool, tokenizer: Any) -> None:
    turns = [USER, {**ANSWER, "content": "Wrong.", "weight": 0}, USER, {**ANSWER, "weight": 1}]
    row = trained(read({"messages": turns}), tokenizer, assistant_only_loss=assistant_only)
    found = learned(row, tokenizer)
    assert "Wrong" not in "".join(found)
    if assistant_only:
        assert found == ["Four.<|im_end|>"]
    else:
        assert "".join(found).count("What is 2+2?") == 2
    same = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
    whole = tokenizer.apply_chat_template(same, tokenize=True, return_dict=True)["input_ids"]
    assert row["input_ids"] == whole


def test_the_plan_counts_what_is_trained(tokenizer: Any) -> None:
    silent = {"messages": [USER, {**ANSWER, "weight": 0}]}
    data = read(READ["messages"], silent, {"messages": [{**USER, "content": "long " * 400}, ANSWER]})
    stats = dataset.measure_stats(data, tokenizer, assistant_only_loss=True)
    assert (stats.examples, stats.untrained, stats.masked(256), stats.masked(4096)) == (2, 1, 1, 0)
    for length, count in ((256, 1), (4096, 2)):
        rows = dataset.to_trl_dataset(data, tokenizer, max_length=length, assistant_only_loss=True)
        assert len(rows) == count
        assert f"{3 - count:,} of 3 examples are not trained" in stats.not_trained(length)[0]
        assert sum(n for _, n in stats.clipped(length)) == count
    with pytest.raises(InputError, match="nothing would be trained"):
        dataset.to_trl_dataset(data, tokenizer, max_length=4, assistant_only_loss=True)
    with pytest.raises(InputError, match="none of the 1 examples has a token to learn"):
        dataset.measure_stats(read(silent), tokenizer, assistant_only_loss=True)


def test_what_a_template_leaves_out_is_said(tokenizer: Any) -> None:
    data = read(READ["tool_calls"])
    said = "".join(dataset.measure_stats(data, tokenizer).notes)
    assert "tools of 1 examples are not trained" in said
    assert "tool_calls of 1 examples are not trained" in said
    tokenizer.chat_template = FULL
    assert dataset.measure_stats(data, tokenizer).notes == ()


CHATS = [
    [USER, ANSWER],
    [SYSTEM, USER, ANSWER, {"role": "user", "content": "And 3+3?"}, {**ANSWER, "content": "Six,\n I think."}],
]
TOLD_APART = ["llama3_1", "llama3_2", "gemma3", "gemma4", "gemma4_v5", "qwen2_5", "qwen3", "qwen3_8", "phi3"]
TOLD_APART += ["phi3_5", "cohere", "deepseekv3", "lfm2", "qwen3_instruct_2507", "nemotron_3_nano"]


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("name", TOLD_APART)
@pytest.mark.parametrize("turns", CHATS, ids=["one", "several"])
def test_answers_are_told_apart_in_templates_without_marks(
    name: str, turns: list[dict[str, Any]], edited: bool, tokenizer: Any
) -> None:
    """Also in one edited by a blank line, which TRL then no longer knows."""
    source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = "\n" + source if edited else source
    found = learned(trained(read({"messages": turns}), tokenizer, assistant_only_loss=True), tokenizer)
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert len(found) == len(answers)
    for run, answer in zip(found, answers, strict=True):
        assert answer in run
        assert run.rstrip().endswith((">", "]"))
        assert not any(said in run for said in ("What is", "Be brief", "And 3", "user"))


@pytest.mark.parametrize("name", ["cohere", "phi3", "lfm2", "qwen3_instruct_2507", "gemma3"])
def test_answers_are_those_that_trl_marks(name: str, tokenizer: Any) -> None:
    """TRL's training templates, white space behind the end of a turn apart."""
    found = []
    for kind in ("", "_training"):
        tokenizer.chat_template = (TEMPLATES / f"{name}{kind}.jinja").read_text(encoding="utf-8")
        row = trained(read({"messages": CHATS[1]}), tokenizer, assistant_only_loss=True)
        found.append([run.rstrip() for run in learned(row, tokenizer)])
    assert found[0] == found[1]


def test_a_template_that_does_not_tell_turns_apart_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | map(attribute='content') | join(' ') }} {{ messages | length }}"
    with pytest.raises(InputError, match="example 1: message 2: the chat template's text does not tell"):
        dataset.measure_stats(read({"messages": [USER, ANSWER]}), tokenizer, assistant_only_loss=True)
    with pytest.raises(InputError, match="needs conversations"):
        dataset.measure_stats(read(READ["text"]), tokenizer, assistant_only_loss=True)


# They end within a second and a few dozen megabytes by themselves: limits are lowered, not tried with harm.
LOOP = "{% for a in range(5000) %}{% for b in range(1000) %}{% endfor %}{% endfor %}"
BAD_TEMPLATES = {
    "a loop that is too long": (LOOP, r"takes more than 0\.02 s of CPU time"),
    "a loop that is too long, amid a turn": (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}"
        + LOOP
        + "{% endif %}{% endfor %}",
        r"takes more than 0\.02 s of CPU time",
    ),
    "a string that is too large": ("{{ 'x' * 50000000 }}", r"takes more than 0\.015625 GiB of memory"),
    # The last of them is above 32 MiB: malloc serves what is smaller from what it has freed before, which is
    # no more memory than the process had.
    "strings that grow": (
        "{% set ns = namespace(s='x' * 500000) %}{% for a in range(8) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}{{ ns.s | length }}",
        r"takes more than 0\.015625 GiB of memory",
    ),
    "a range that jinja's sandbox refuses": (
        "{{ range(10000000) | length }}",
        "the chat template refuses it",
    ),
    "a division by nothing": ("{{ 1 // 0 }}", "the chat template refuses it"),
    "what is not there": ("{{ messages[99].content }}", "the chat template refuses it"),
    "a macro that calls itself": (
        "{% macro deeper(n) %}{{ deeper(n + 1) }}{% endmacro %}{{ deeper(0) }}",
        "the chat template refuses it",
    ),
    "a file": ("{% include '/etc/hostname' %}", "the chat template refuses it"),
}


@pytest.mark.parametrize("kind", BAD_TEMPLATES)
def test_a_template_that_takes_too_much_or_fails_is_one_line(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tokenizer.chat_template, said = BAD_TEMPLATES[kind]
    monkeypatch.setattr(limits, "CPU_SECONDS", 0.02 if "loop" in kind else 5.0)
    monkeypatch.setattr(limits, "MORE_BYTES", 2**24)
    before = resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGVTALRM)
    begun = time.process_time()
    with pytest.raises(InputError, match=f"example 1: .*{said}") as caught:
        dataset.measure_stats(read({"messages": [USER, ANSWER]}), tokenizer, assistant_only_loss=True)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert time.process_time() - begun < 5
    assert (resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_what_the_tokenizer_refuses_is_named(tokenizer: Any) -> None:
    half = Conversation((Message("user", "\ud83d"), Message("assistant", "x")))
    whole = Conversation((Message("user", "Hi"), Message("assistant", "x")))
    with pytest.raises(InputError, match="example 2: the tokenizer refuses it"):
        dataset.measure_stats(TrainingData("messages", (whole, half), "data"), tokenizer)


@pytest.fixture(scope="module")
def trainer_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("train")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_the_trainer_is_given_these_tokens(packing: bool, trainer_folder: Path) -> None:
    """All kinds through the trainer as `vramwise train` builds it: TRL's preparation changes nothing."""
    import torch

    from launcher.runs.training_job import TrainingJob
    from launcher.training import build
    from planner.setup.training_setup import TrainingSetup

    setup = TrainingSetup(model="demo", max_length=512, per_device_train_batch_size=2, packing=packing)
    job = TrainingJob(
        setup=setup, model_source=MODEL, data_path="data", max_steps=1, assistant_only_loss=False
    )
    tokenizer = load_tokenizer(MODEL, allow_download=False)
    model = build.load_model(setup, MODEL, device=torch.device("cpu"), allow_download=False)
    rows = [dataset.to_trl_dataset(read(row), tokenizer, max_length=512)[0] for row in READ.values()]
    from datasets import Dataset

    trainer = build.build_trainer(
        setup,
        job,
        model=model,
        tokenizer=tokenizer,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None,
        output_dir=trainer_folder,
        on_gpu=False,
    )
    given = trainer.train_dataset
    if packing:
        flat = [label for row in given for label in row["labels"]]
        assert sorted(flat) == sorted(label for row in rows for label in row["labels"])
    else:
        assert [(r["input_ids"], r["labels"]) for r in given] == [(r["input_ids"], r["labels"]) for r in rows]
        batch = trainer.data_collator([given[0], given[1]])
        assert batch["labels"][0][: len(rows[0]["labels"])].tolist() == rows[0]["labels"]
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))


@pytest.mark.slow
def test_train_starts_nothing_that_is_all_masked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launcher.cli import main

    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [USER, {**ANSWER, "weight": 0}]}) + "\n")
    asked = [
        "train",
        "--model",
        MODEL,
        "--gpu",
        "16GB",
        "--data",
        str(path),
        "--runs",
        str(tmp_path / "runs"),
    ]
    with pytest.raises(SystemExit) as ended:
        main([*asked, "--assistant-only-loss"])
    assert ended.value.code == 2
    assert f"{path}: none of the 1 examples has a token to learn" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
