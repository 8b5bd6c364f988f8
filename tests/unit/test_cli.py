"""The commands as a person or a script meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import cli as launcher_cli
from planner import cli as planner_cli
from planner.commands.program import guarded
from planner.setup.training_setup import FIELD_NAMES

Cli = Callable[..., Any]

PLAN = ("plan", "--model", "qwen2.5-0.5b", "--gpu", "16GB")
SETUP = {"model": "qwen2.5-0.5b", "max_length": 512}
ESTIMATE_KEYS = [
    "version",
    "setup",
    "weights_bytes",
    "allocated_bytes",
    "reserved_bytes",
    "process_bytes",
    "process_upper_bytes",
    "components",
    "phases",
    "tokens_per_second",
    "fits",
    "basis",
]


def program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        **options,
    )


def test_exit_codes_tell_the_verdict(cli: Cli) -> None:
    assert cli(*PLAN).code == 0
    assert cli("plan", "--model", "llama-3.1-70b", "--gpu", "24GB").code == 3
    assert cli("plan", "--model", "llama-3.1-70b", "--gpu", "24GB", "--json").code == 3


def test_the_verdict_comes_first_and_names_the_smallest_cards(cli: Cli) -> None:
    assert cli(*PLAN).out.startswith("FITS: qwen2.5-0.5b with QLoRA")
    out = " ".join(cli("plan", "--model", "llama-3.1-70b", "--gpu", "24GB").out.split())
    assert out.startswith("DOES NOT FIT: llama-3.1-70b")
    plan = json.loads(cli("plan", "--model", "llama-3.1-70b", "--gpu", "24GB", "--json").out)
    desktop, rented = plan["smallest_cards"]
    assert f"Smallest cards that take it: {desktop['gpu']} for a desktop (" in out
    assert f", {rented['gpu']} to rent (" in out


def test_plan_and_vramwise_plan_are_one() -> None:
    arguments = ("--model", "qwen2.5-0.5b", "--gpu", "16GB", "--json")
    assert program("planner.cli", *arguments).stdout == program("launcher.cli", "plan", *arguments).stdout
    assert planner_cli.COMMANDS["plan"].module == launcher_cli.COMMANDS["plan"].module


def test_every_setup_key_is_an_option() -> None:
    words = program("launcher.cli", "plan", "--help").stdout.replace(",", " ").split()
    for name in FIELD_NAMES:
        assert f"--{name.replace('_', '-')}" in words


def test_options_may_be_spelt_as_trl_spells_them(cli: Cli) -> None:
    dashes = cli(*PLAN, "--max-length", "512", "--json").out
    assert cli(*PLAN, "--max_length", "512", "--json").out == dashes
    assert cli(*PLAN, "--max_length=512", "--json").out == dashes


@pytest.mark.parametrize("command", sorted(launcher_cli.COMMANDS))
def test_every_command_has_help(command: str) -> None:
    if command == "calibrate":
        pytest.importorskip("launcher.commands.calibrate")
    done = program("launcher.cli", command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: vramwise {command}")


def test_without_a_command_help_is_shown(cli: Cli) -> None:
    finished = cli()
    assert finished.code == 0
    for command in launcher_cli.COMMANDS:
        assert command in finished.out


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--model", "qwen2.5-14b", "--gpu", "16GB", "--explain"),
        ("plan", "--model", "llama-3.1-70b", "--gpu", "24GB"),
        ("compare", "--model", "llama-3.1-8b", "--model", "phi-4", "--gpu", "16GB", "--gpu", "rtx-4090"),
        ("compare", "--model", "mistral-nemo-12b"),
        ("models", "qwen"),
        ("gpus", "rtx-40"),
    ],
    ids=lambda arguments: arguments if isinstance(arguments, str) else " ".join(arguments[:3]),
)
def test_no_line_is_wider_than_the_terminal(
    arguments: tuple[str, ...], width: int, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    finished = cli(*arguments)
    assert finished.code in (0, 3)
    assert finished.err == ""
    lines = finished.out.splitlines()
    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)
    assert "…" not in finished.out


def test_colour_only_where_it_is_wanted(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" not in cli(*PLAN).out
    monkeypatch.delenv("NO_COLOR")
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    coloured = program("planner.cli", *PLAN[1:], env=environment).stdout
    assert "\x1b[" in coloured
    no_colour = program("planner.cli", *PLAN[1:], env={**environment, "NO_COLOR": "1"}).stdout
    assert "\x1b[32m" not in no_colour
    assert "\x1b[1;32m" not in no_colour


def test_stdout_that_is_not_utf_8(cli: Cli) -> None:
    done = program("planner.cli", *PLAN[1:], env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert done.stdout.startswith("FITS")


@pytest.mark.parametrize("command", [PLAN, (*PLAN, "--json"), ("models",), ("gpus",)])
def test_a_closed_pipe_ends_quietly(command: tuple[str, ...]) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == b""
    assert child.wait(500) == 0


def test_a_closed_pipe_in_the_middle_of_estimates(tmp_path: Path) -> None:
    path = tmp_path / "setups.jsonl"
    path.write_text((json.dumps(SETUP) + "\n") * 3000)
    child = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "estimate", "--gpu", "16GB", "--setups", str(path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    assert json.loads(child.stdout.readline())["fits"]
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait(500) == 0


def test_ctrl_c_ends_with_130_and_one_line() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "estimate", "--gpu", "16GB", "--setups", "-", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps(SETUP) + "\n")
    child.stdin.flush()
    assert json.loads(child.stdout.readline())["fits"]
    child.send_signal(signal.SIGINT)
    _, talk = child.communicate(timeout=500)
    assert child.returncode == 130
    assert talk.splitlines() == ["vramwise: interrupted"]


def test_ctrl_c_in_a_batch_that_processes_share(tmp_path: Path) -> None:
    path = tmp_path / "setups.jsonl"
    path.write_text((json.dumps(SETUP) + "\n") * 40_000)
    child = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "estimate", "--gpu", "16GB", "--setups", str(path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert json.loads(child.stdout.readline())["fits"]
    os.killpg(child.pid, signal.SIGINT)
    _, talk = child.communicate(timeout=500)
    assert child.returncode == 130
    assert talk.splitlines() == ["vramwise: interrupted"]


def test_an_error_nobody_expected_is_shown_whole() -> None:
    def broken() -> int:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        guarded("vramwise", broken)


def test_estimate_keeps_the_contract(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "setups.jsonl"
    setups = [{**SETUP, "max_length": length} for length in (256, 512, 1024)]
    path.write_text("\n".join(map(json.dumps, setups)))
    finished = cli("estimate", "--gpu", "2x24GB", "--setups", path, "--json")
    assert (finished.code, finished.err) == (0, "")
    answers = [json.loads(line) for line in finished.out.splitlines()]
    assert [answer["setup"]["max_length"] for answer in answers] == [256, 512, 1024]
    for answer in answers:
        assert list(answer) == ESTIMATE_KEYS
        assert set(answer["setup"]) == set(FIELD_NAMES)
        assert sum(answer["components"].values()) == answer["process_bytes"]
        assert set(answer["phases"]) == {"load", "step", "evaluation", "save"}
        assert answer["allocated_bytes"] <= answer["reserved_bytes"] <= answer["process_bytes"]
        assert answer["process_bytes"] <= answer["process_upper_bytes"]
        assert answer["tokens_per_second"] > 0
        assert all(isinstance(size, int) for size in answer["components"].values())
    one_card = cli("estimate", "--gpu", "24GB", "--setups", path, "--json").out
    assert one_card == finished.out


def test_estimate_exits_0_whether_or_not_a_setup_fits(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "setups.jsonl"
    path.write_text(json.dumps({"model": "llama-3.1-70b", "max_length": 4096}))
    finished = cli("estimate", "--gpu", "16GB", "--setups", path, "--json")
    assert finished.code == 0
    assert json.loads(finished.out)["fits"] is False


def test_estimate_as_a_table_still_reports_bad_lines(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "setups.jsonl"
    path.write_text(json.dumps(SETUP) + "\n\n{\n")
    finished = cli("estimate", "--gpu", "16GB", "--setups", path)
    assert finished.code == 2
    assert "qwen2.5-0.5b" in finished.out
    assert finished.err.startswith("vramwise: line 3: broken JSON")


def test_estimate_answers_each_line_of_a_pipe_at_once() -> None:
    """A program can hold the other end: write a setup, read its answer, write the next."""
    child = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "estimate", "--gpu", "16GB", "--setups", "-", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    for length in (128, 256):
        child.stdin.write(json.dumps({**SETUP, "max_length": length}) + "\n")
        child.stdin.flush()
        assert json.loads(child.stdout.readline())["setup"]["max_length"] == length
    child.stdin.close()
    assert child.wait(500) == 0


def test_estimate_answers_two_thousand_setups_in_order(tmp_path: Path) -> None:
    path = tmp_path / "setups.jsonl"
    rows = [
        {**SETUP, "max_length": 64 + i, "lora_r": 8 << (i % 3), "gradient_checkpointing": i % 2 == 0}
        for i in range(2000)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    done = program("launcher.cli", "estimate", "--gpu", "16GB", "--setups", str(path), "--json")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["setup"]["max_length"] for answer in answers] == [row["max_length"] for row in rows]


def test_models_and_gpus_are_listed(cli: Cli) -> None:
    models = json.loads(cli("models", "--json").out)["models"]
    assert len(models) >= 30
    assert {"qwen2.5-14b", "qwen3-30b-a3b", "llama-3.1-8b"} <= {model["id"] for model in models}
    filtered = json.loads(cli("models", "Llama 3.1", "--json").out)["models"]
    assert {"llama-3.1-8b", "llama-3.1-70b"} <= {model["id"] for model in filtered}
    assert len(filtered) < len(models)
    gpus = json.loads(cli("gpus", "--json").out)
    assert len(gpus["gpus"]) >= 45
    assert isinstance(gpus["here"], list)
    assert "On this machine" in cli("gpus", "4090").out


@pytest.mark.slow
def test_compare_tells_cards_and_lengths(cli: Cli) -> None:
    rows = json.loads(
        cli("compare", "--model", "llama-3.1-8b", "--gpu", "8GB", "--gpu", "24GB", "--json").out
    )["rows"]
    assert [row["gpu"] for row in rows] == ["8GB", "24GB"]
    cards = json.loads(cli("compare", "--model", "llama-3.1-8b", "--json").out)["smallest_cards"]
    assert {card["method"] for card in cards} == {"qlora", "lora", "full"}
    found = json.loads(cli("compare", "--gpu", "12GB", "--json").out)["models"]
    sizes = [one["parameter_count"] for one in found]
    assert sizes == sorted(sizes, reverse=True)
    one = next(model for model in found if model["model"] == "mistral-nemo-12b")
    for length, fits in ((one["max_length"], 0), (one["max_length"] + 512, 3)):
        arguments = ("--model", "mistral-nemo-12b", "--gpu", "12GB", "--max-length", length)
        assert cli("plan", *arguments).code == fits


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from planner.commands.program import guarded, run_command\n"
        "from planner.cli import COMMANDS\n"
        "a = ['--model', 'qwen2.5-14b', '--gpu', '16GB']\n"
        "guarded('plan', lambda: run_command('plan', COMMANDS['plan'], a + sys.argv[1:]))\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr)\n"
    )
    heavy = {"torch", "transformers", "trl", "peft", "pandas", "textual", "launcher", "huggingface_hub"}
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    loaded = set(eval(text))
    assert not loaded & (heavy | {"numpy", "pynvml"})
    text = subprocess.run(
        [sys.executable, "-c", code, "--json"], capture_output=True, text=True, check=True
    ).stderr
    assert not set(eval(text)) & (heavy | {"numpy", "pynvml", "rich"})


def test_public_names_are_what_they_say() -> None:
    import planner

    for name in planner.__all__:
        assert getattr(planner, name) is not None
    assert planner.estimate(SETUP, gpu="16GB").fits
    assert planner.make_plan(planner.make_request("qwen2.5-0.5b", gpu="16GB")).fits
    with pytest.raises(AttributeError):
        planner.nothing  # noqa: B018
