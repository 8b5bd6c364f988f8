"""Every kind of bad input ends in one line on stderr and exit code 2: no traceback, nothing like a result."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]

PLAN = ("plan", "--model", "qwen2.5-0.5b", "--gpu", "16GB")
ESTIMATE = ("estimate", "--gpu", "16GB", "--json", "--setups")
MODEL = "qwen2.5-0.5b"

# What makes the arguments; where it needs files, it writes them into the folder.
Make = Callable[[Path], tuple[str, ...]]


def plan(*extra: str) -> Make:
    return lambda _: (*PLAN, *extra)


def plain(*arguments: str) -> Make:
    return lambda _: arguments


def with_data(name: str, content: bytes, *, command: tuple[str, ...] = PLAN) -> Make:
    def make(folder: Path) -> tuple[str, ...]:
        (folder / name).write_bytes(content)
        return (*command, "--data", str(folder / name))

    return make


def with_config(content: bytes | None) -> Make:
    def make(folder: Path) -> tuple[str, ...]:
        model = folder / "model"
        model.mkdir()
        if content is not None:
            (model / "config.json").write_bytes(content)
        return ("plan", "--model", str(model), "--gpu", "16GB")

    return make


def config(**changes: object) -> bytes:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    }
    return json.dumps({**values, **changes}).encode()


def directory_as_file(folder: Path) -> tuple[str, ...]:
    return (*ESTIMATE, str(folder))


def file_as_model(folder: Path) -> tuple[str, ...]:
    (folder / "model.txt").write_text("no model")
    return ("plan", "--model", str(folder / "model.txt"), "--gpu", "16GB")


def train_without_weights(folder: Path) -> tuple[str, ...]:
    (folder / "d.jsonl").write_text('{"text": "a"}\n')
    return ("train", "--model", str(folder / "nowhere"), "--data", str(folder / "d.jsonl"))


CASES: dict[str, Make] = {
    # names
    "unknown command": plain("plann"),
    "unknown option": plan("--sequence-length", "4096"),
    "abbreviated option": plan("--max-len", "4096"),
    "option without value": plan("--max-length"),
    "stray argument": plan("something"),
    "no model": plain("plan", "--gpu", "16GB"),
    "unknown model": plain("plan", "--model", "qwen2.5-15b", "--gpu", "16GB"),
    "empty model": plain("plan", "--model", "", "--gpu", "16GB"),
    "model with control characters": plain("plan", "--model", "qwen\x1b[31m\nx", "--gpu", "16GB"),
    "model name of a megabyte": plain("plan", "--model", "q" * 2**20, "--gpu", "16GB"),
    "Hub id that is not on this machine": plain("plan", "--model", "nobody/nothing-7b", "--gpu", "16GB"),
    "unknown GPU": plain("plan", "--model", MODEL, "--gpu", "rtx-9090"),
    "empty GPU": plain("plan", "--model", MODEL, "--gpu", ""),
    "AMD GPU": plain("plan", "--model", MODEL, "--gpu", "rx7900xtx"),
    "Apple GPU": plain("plan", "--model", MODEL, "--gpu", "m3 max"),
    "CPU as GPU": plain("plan", "--model", MODEL, "--gpu", "cpu"),
    "GPU size without a card": plain("plan", "--model", MODEL, "--gpu", "17GB"),
    "negative GPU size": plain("plan", "--model", MODEL, "--gpu=-16GB"),
    "GPU size zero": plain("plan", "--model", MODEL, "--gpu", "0GB"),
    "GPU size NaN": plain("plan", "--model", MODEL, "--gpu", "nanGB"),
    "no GPUs": plain("plan", "--model", MODEL, "--gpu", "0x24GB"),
    "a million GPUs": plain("plan", "--model", MODEL, "--gpu", "1000000x24GB"),
    "display without GPU": plain("plan", "--model", MODEL, "--display"),
    # numbers
    "length zero": plan("--max-length", "0"),
    "length negative": plan("--max-length", "-4096"),
    "length huge": plan("--max-length", "99999999999999999"),
    "length with thousands of digits": plan("--max-length", "9" * 5000),
    "length a fraction": plan("--max-length", "4096.5"),
    "length NaN": plan("--max-length", "nan"),
    "length a word": plan("--max-length", "long"),
    "length with a unit": plan("--max-length", "4k"),
    "length twice": plan("--max-length", "512", "--max-length", "1024"),
    "rank zero": plan("--lora-r", "0"),
    "rank huge": plan("--lora-r", "1000000"),
    "alpha negative": plan("--lora-alpha", "-1"),
    "dropout NaN": plan("--lora-dropout", "nan"),
    "dropout infinite": plan("--lora-dropout", "inf"),
    "dropout one": plan("--lora-dropout", "1"),
    "batch zero": plan("--per-device-train-batch-size", "0"),
    "accumulation negative": plan("--gradient-accumulation-steps", "-2"),
    "effective batch zero": plan("--effective-batch-size", "0"),
    "epochs zero": plan("--epochs", "0"),
    "epochs infinite": plan("--epochs", "inf"),
    "learning rate NaN": plan("--learning-rate", "nan"),
    "learning rate negative": plan("--learning-rate", "-0.001"),
    "price negative": plan("--price-per-hour", "-1"),
    "price NaN": plan("--price-per-hour", "nan"),
    "processes zero": plan("--num-processes", "0"),
    "more checkpointed layers than the model has": plan("--checkpointed-layers", "9999"),
    # choices
    "unknown method": plan("--method", "galore"),
    "unknown dtype": plan("--dtype", "fp8"),
    "unknown optimizer": plan("--optim", "adam"),
    "unknown attention": plan("--attn-implementation", "xformers"),
    "unknown quantisation": plan("--bnb-4bit-quant-type", "int4"),
    "unknown target module": plan("--target-modules", "q_proj,no_such_proj"),
    "empty target module": plan("--target-modules", "q_proj,,v_proj"),
    "target module twice": plan("--target-modules", "q_proj,q_proj"),
    # contradictions
    "DoRA with full fine-tuning": plan("--method", "full", "--use-dora"),
    "dropout with full fine-tuning": plan("--method", "full", "--lora-dropout", "0.1"),
    "k-bit preparation without 4 bits": plan("--method", "lora", "--prepare-for-kbit-training"),
    "checkpointed layers without checkpointing": plan(
        "--no-gradient-checkpointing", "--checkpointed-layers", "4"
    ),
    "checkpointing on and off": plan("--gradient-checkpointing", "--no-gradient-checkpointing"),
    "memory budget without compilation": plan("--activation-memory-budget", "0.5"),
    "distributed on one GPU": plan("--distributed", "ddp"),
    "batch that cannot give the effective batch": plan(
        "--per-device-train-batch-size", "3", "--effective-batch-size", "16"
    ),
    "batch and accumulation against the effective batch": plan(
        "--per-device-train-batch-size",
        "2",
        "--gradient-accumulation-steps",
        "2",
        "--effective-batch-size",
        "16",
    ),
    "compare nothing": plain("compare"),
    "compare models without a GPU": plain("compare", "--model", MODEL, "--model", "phi-4"),
    "compare with data and no GPU": plain("compare", "--model", MODEL, "--data", "x.jsonl"),
    "longest length with a length": plain("compare", "--gpu", "16GB", "--max-length", "512"),
    # models
    "folder without config.json": with_config(None),
    "config.json empty": with_config(b""),
    "config.json truncated": with_config(config()[:40]),
    "config.json a list": with_config(b"[]"),
    "config.json not UTF-8": with_config(b'{"model_type": "\xff\xfe"}'),
    "config.json without model type": with_config(b'{"hidden_size": 64}'),
    "config.json with negative size": with_config(config(hidden_size=-64)),
    "config.json with a text for a size": with_config(config(hidden_size="wide")),
    "config.json nested without end": with_config(b"[" * 100_000),
    "config.json of ten megabytes": with_config(b'{"a": "' + b"x" * 10_000_000 + b'"}'),
    "file instead of a model folder": file_as_model,
    "folder that is not there": plain("plan", "--model", "./no-such-folder", "--gpu", "16GB"),
    "model filter that matches nothing": plain("models", "zzzzzz"),
    "GPU filter that matches nothing": plain("gpus", "zzzzzz"),
    # data
    "data file that is not there": plan("--data", "/no/such/file.jsonl"),
    "data of unknown kind": with_data("data.xlsx", b"PK"),
    "data empty": with_data("data.jsonl", b""),
    "data broken JSON": with_data("data.jsonl", b'{"text": "a"}\n{"text": \n'),
    "data not UTF-8": with_data("data.jsonl", b'{"text": "\xff"}\n'),
    "data without known keys": with_data("data.jsonl", b'{"question": "a"}\n'),
    "data with an empty answer": with_data(
        "data.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}\n',
    ),
    "data with a wrong role": with_data("data.jsonl", b'{"messages": [{"role": "bot", "content": "a"}]}\n'),
    "data of two formats": with_data("data.jsonl", b'{"text": "a"}\n{"prompt": "a", "completion": "b"}\n'),
    # files of setups
    "setups file that is not there": plain(*ESTIMATE, "/no/such/setups.jsonl"),
    "setups file that is a folder": directory_as_file,
    "estimate without setups": plain("estimate", "--gpu", "16GB"),
    # the launcher
    "train without data": plain("train", "--model", MODEL),
    "train a model that is not there": train_without_weights,
    "follow a run that is not there": plain("runs", "follow", "no-such-run"),
    "stop without a run": plain("runs", "stop"),
    "terminal interface without a terminal": plain("tui"),
    "inspect nothing": plain("models", "inspect"),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_one_line_and_exit_code_2(
    make: Make, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    finished = cli(*make(tmp_path))
    assert finished.code == 2, finished
    assert finished.out == ""
    lines = finished.err.splitlines()
    assert len(lines) == 1, finished.err
    assert lines[0].startswith("vramwise: ")
    assert len(lines[0]) > len("vramwise: ") + 8
    assert len(lines[0]) < 1000
    assert lines[0].isprintable()
    assert "Traceback" not in finished.err


def test_there_are_at_least_sixty_kinds() -> None:
    assert len(CASES) >= 60


def test_without_the_fault_the_commands_work(cli: Cli, tmp_path: Path) -> None:
    """The cases add one fault to these, so that nothing else can be what is refused."""
    assert cli(*PLAN).code == 0
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    assert cli(*PLAN, "--data", data).code == 0
    assert cli("compare", "--model", MODEL).code == 0
    assert cli(*PLAN, "--target-modules", "q_proj,v_proj", "--lora-dropout", "0.1").code == 0
    assert cli(*PLAN, "--method", "full").code == 0


BAD_LINES = {
    "not JSON": "{",
    "a list": "[]",
    "a number": "7",
    "null": "null",
    "no model": '{"max_length": 512}',
    "no length": '{"model": "qwen2.5-0.5b"}',
    "unknown key": '{"model": "qwen2.5-0.5b", "max_length": 512, "max_seq_length": 512}',
    "text for a number": '{"model": "qwen2.5-0.5b", "max_length": "512"}',
    "number for a bool": '{"model": "qwen2.5-0.5b", "max_length": 512, "packing": 1}',
    "bool for a number": '{"model": "qwen2.5-0.5b", "max_length": true}',
    "float for an int": '{"model": "qwen2.5-0.5b", "max_length": 512.0}',
    "NaN": '{"model": "qwen2.5-0.5b", "max_length": NaN}',
    "infinity": '{"model": "qwen2.5-0.5b", "max_length": 512, "lora_dropout": Infinity}',
    "negative": '{"model": "qwen2.5-0.5b", "max_length": -1}',
    "huge": '{"model": "qwen2.5-0.5b", "max_length": 1' + "0" * 400 + "}",
    "digits without end": '{"model": "qwen2.5-0.5b", "max_length": ' + "9" * 5000 + "}",
    "null for a required key": '{"model": null, "max_length": 512}',
    "empty target list": '{"model": "qwen2.5-0.5b", "max_length": 512, "target_modules": []}',
    "object for a name": '{"model": {}, "max_length": 512}',
    "unknown model": '{"model": "no-such-model", "max_length": 512}',
    "DoRA with full": '{"model": "qwen2.5-0.5b", "max_length": 512, "method": "full", "use_dora": true}',
    "nested without end": "[" * 50_000,
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_answered_and_the_rest_still_runs(line: str, cli: Cli, tmp_path: Path) -> None:
    good = json.dumps({"model": MODEL, "max_length": 512})
    path = tmp_path / "setups.jsonl"
    path.write_text(f"{good}\n{line}\n{good}\n")
    finished = cli(*ESTIMATE, path)
    assert finished.code == 2
    assert finished.err == ""
    answers = [json.loads(answer) for answer in finished.out.splitlines()]
    assert [set(answer) == {"error", "line"} for answer in answers] == [False, True, False]
    assert answers[1]["line"] == 2
    assert "\n" not in answers[1]["error"]
    assert len(answers[1]["error"]) < 1000


def test_bytes_that_are_not_text_and_lines_without_end(cli: Cli, tmp_path: Path) -> None:
    good = json.dumps({"model": MODEL, "max_length": 512}).encode()
    path = tmp_path / "setups.jsonl"
    path.write_bytes(good + b"\n\xff\xfe\n" + b"x" * (3 * 2**20) + b"\n" + good)
    answers = [json.loads(answer) for answer in cli(*ESTIMATE, path).out.splitlines()]
    assert [answer.get("line") for answer in answers] == [None, 2, 3, None]


def test_a_file_that_may_not_be_read(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> io.BytesIO:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "setups.jsonl"
    path.write_text("")
    monkeypatch.setattr(Path, "open", refuse)
    finished = cli(*ESTIMATE, path)
    assert (finished.code, finished.out) == (2, "")
    assert "Permission denied" in finished.err


@pytest.mark.parametrize("name", ["unknown model", "DoRA with full fine-tuning", "length with a unit"])
def test_the_program_itself_says_it_in_one_line(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", *CASES[name](tmp_path)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--batch-size", "--per-device-train-batch-size"),
        ("--price", "--price-per-hour"),
        ("--max-seq-length=4096", "--max-length"),
        ("--gpus", "--gpu"),
    ],
)
def test_an_option_that_there_is_none_of_names_the_one_that_may_be_meant(
    cli: Cli, option: str, meant: str
) -> None:
    finished = cli(*PLAN, option, "4096")
    assert (finished.code, finished.out) == (2, "")
    assert f"unknown option '{option.partition('=')[0]}'; did you mean" in finished.err
    assert meant in finished.err.partition("mean")[2]
