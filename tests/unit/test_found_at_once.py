"""What a newcomer types first is understood, or answered with what is nearest."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import cli as launcher_cli
from planner.commands.completion import SHELLS

Cli = Callable[..., Any]


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=500, check=False
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("qwen2.5-0.5b", "16GB", "--max-length", "512"),
        ("qwen2.5-0.5b", "--max-length", "512", "16GB"),
        ("--max-length", "512", "qwen2.5-0.5b", "16GB"),
        ("qwen2.5-0.5b", "--gpu", "16GB", "--max-length", "512"),
        ("--gpu", "16GB", "--max-length", "512", "qwen2.5-0.5b"),
    ],
)
def test_model_and_card_may_be_given_by_position(arguments: tuple[str, ...], cli: Cli) -> None:
    asked = cli("plan", "--model", "qwen2.5-0.5b", "--gpu", "16GB", "--max-length", "512", "--json")
    assert cli("plan", *arguments, "--json").out == asked.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name a model, for example: plan llama-3.1-8b 12GB"),
        (("qwen2.5-0.5b", "--model", "phi-4"), "argument MODEL: given twice"),
        (("--model", "phi-4", "16GB", "--gpu", "24GB", "12GB"), "given twice"),
        (("qwen2.5-0.5b", "16GB", "24GB"), "unrecognized arguments: 24GB"),
    ],
)
def test_what_is_missing_or_too_much_is_one_line(arguments: tuple[str, ...], said: str, cli: Cli) -> None:
    done = cli("plan", *arguments)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert said in done.err


@pytest.mark.parametrize(
    "words", [(), *((name,) for name in launcher_cli.COMMANDS), *launcher_cli.SUBCOMMANDS]
)
def test_every_command_tells_the_version(words: tuple[str, ...]) -> None:
    done = program("launcher.cli", *words, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("vramwise ")


def test_plan_as_a_program_tells_it_too() -> None:
    assert program("planner.cli", "--version").stdout.startswith("vramwise ")


def test_help_is_a_word_too() -> None:
    assert program("launcher.cli", "help", "plan").stdout == program("launcher.cli", "plan", "--help").stdout
    assert program("launcher.cli", "help").stdout == program("launcher.cli", "--help").stdout


@pytest.mark.parametrize(
    ("size", "cards", "others"),
    [
        (
            "16gb",
            {"rtx-4080", "rtx-5080", "rtx-5070-ti", "t4", "rtx-5060-ti-16gb", "v100-16gb"},
            {"rtx-3090"},
        ),
        ("24GB", {"rtx-3090", "rtx-4090", "a10", "l4"}, {"rtx-4080", "rtx-5090"}),
        ("12 GB", {"rtx-3060-12gb", "rtx-4070"}, {"rtx-2080-ti", "gtx-1080-ti"}),
        ("48g", {"a40", "l40"}, {"a100-40gb"}),
    ],
)
def test_cards_are_listed_by_memory(size: str, cards: set[str], others: set[str], cli: Cli) -> None:
    listed = {line.split()[0] for line in cli("gpus", size).out.splitlines() if line}
    assert cards <= listed
    assert not others & listed


def test_a_size_that_no_card_has_is_answered_with_those_that_are(cli: Cli) -> None:
    done = cli("gpus", "17gb")
    assert (done.code, done.out) == (2, "")
    assert "no card of the catalog has 17 GB; the sizes are 6GB, 8GB" in done.err


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (("plna",), "plan"),
        (("plan", "--explian"), "--explain"),
        (("plan", "llama-3.1-8", "16GB"), "llama-3.1-8b"),
        (("plan", "qwen2.5-0.5b", "rtx-4900"), "rtx-4090"),
        (("gpus", "rtx-4900"), "rtx-4090"),
        (("models", "qwen2.5-41b"), "qwen2.5-14b"),
        (("runs", "folow", "x"), "follow"),
        (("completion", "bsh"), "bash"),
        (("plan", "qwen2.5-0.5b", "--compile", "regionl"), "regional"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(
    arguments: tuple[str, ...], nearest: str, cli: Cli
) -> None:
    done = cli(*arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert f"did you mean {nearest}" in done.err


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_models_cards_and_knobs(shell: str, cli: Cli) -> None:
    done = cli("completion", shell)
    assert (done.code, done.err) == (0, "")
    for word in ("train", "llama-3.1-8b", "rtx-4090", "24GB", "lora-r", "flash_attention_2"):
        assert word in done.out


COMPLETE = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()
$(complete -p ${{COMP_WORDS[0]}} | sed 's/.*-F \\([^ ]*\\).*/\\1/')
echo "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("vramwise pl", "plan"),
        ("vramwise plan --gpu rtx-409", "rtx-4090"),
        ("vramwise plan qwen2.5-14b rtx-309", "rtx-3090 rtx-3090-ti"),
        ("plan qwen2.5-14", "qwen2.5-14b"),
        ("plan --attn-implementation fle", "flex_attention"),
    ],
)
def test_bash_completes(words: str, completed: str, cli: Cli, tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(cli("completion", "bash").out, encoding="utf-8")
    asked = COMPLETE.format(script=script, words=words)
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == completed
