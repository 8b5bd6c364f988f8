"""Every command that a page shows is run, in a folder that has the files it names; those that cannot be are
held to their parser, and are listed here with the reason.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import cli as launcher_cli
from planner.base.data_files import PROFILES
from planner.calibration.records import append_record, read_records
from planner.commands.program import Parser, declare

pytestmark = pytest.mark.slow

Cli = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", *(path for path in (ROOT / "docs").glob("*.md") if path.name != "commands.md")]
)
NOT_RUN = {
    "train": "trains: tests/faults and tests/unit/test_cli_train.py start it",
    "demo": "trains: tests/faults/test_demo_run.py starts it",
    "merge": "needs a trained run: tests/stack/test_merging.py makes one",
    "calibrate": "needs a GPU: tests/gpu",
    "tui": "needs a terminal: tests/tui",
    "doctor": "imports torch in a process of its own: tests/unit/test_doctor.py",
    "accuracy": "fits all records: docs quote it, and test_docs.py compares",
    "models inspect": "describes a model in a process of its own: tests/stack/test_inspect_model.py",
    "compare --gpu": "looks at every model: tests/golden has it",
    "gpus --update-prices": "asks the network: tests/unit/test_prices.py has the lists in a folder",
    "runs resume": "needs a run that was ended: tests/faults/test_resume.py",
}
ENDS_WITH = {"check": 3}
"""Commands whose exit code is not 0: the claims that pages quote are beyond their cards."""
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z0-9_-]{2,}\b|\.\.\.")


def shown() -> list[tuple[str, list[str]]]:
    """(page, words) of each indented line of a page that is a command of ours, each once."""
    found: dict[str, str] = {}
    for page in PAGES:
        for line in page.read_text().splitlines():
            if re.match(r" {4}(\$ )?(plan|vramwise) [\"\w./-]", line) and "  cli > " not in line:
                command = (
                    line.strip().removeprefix("$ ").partition("  #")[0].partition(" | ")[0].rstrip(" \\")
                )
                found.setdefault(command, page.name)
    lines = [(page, shlex.split(command, comments=True)) for command, page in found.items()]
    return [(page, words) for page, words in lines if words[0] == "plan" or words[1] in launcher_cli.COMMANDS]


def why_not(words: list[str]) -> str | None:
    """Why a command is not run, or None."""
    text = " ".join(words[1:])
    if text.startswith("compare --gpu"):
        return NOT_RUN["compare --gpu"]
    for name, reason in NOT_RUN.items():
        if text == name or text.startswith(f"{name} "):
            return reason
    return "a placeholder stands in it" if PLACEHOLDER.search(text.replace("16GB", "")) else None


def parsed(words: list[str]) -> None:
    """Hold a command to its parser."""
    sub = launcher_cli.SUBCOMMANDS.get((words[1], words[2])) if len(words) > 2 else None
    command = sub or launcher_cli.COMMANDS[words[1]]
    parser = Parser(prog="vramwise")
    declare(parser, command)
    importlib.import_module(command.module)
    parser.parse_args(words[3:] if sub else words[2:])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that pages name."""
    made = tmp_path / "here"
    (made / "my-model").mkdir(parents=True)
    shutil.copy(PROFILES / "configs" / "llama-3.2-1b.json", made / "my-model" / "config.json")
    config = json.loads((PROFILES / "configs" / "llama-3.1-8b.json").read_text())
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantised |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    (made / "llama-3.1-8b-bnb-4bit").mkdir()
    (made / "llama-3.1-8b-bnb-4bit" / "config.json").write_text(
        json.dumps({**config, "quantization_config": quantised})
    )
    lines = (PROFILES / "demo" / "data" / "train.jsonl").read_text().splitlines(keepends=True)[:20]
    for name in ("examples.jsonl", "profiles/demo/data/train.jsonl"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text("".join(lines))
    shutil.copytree(PROFILES / "demo" / "images", made / "profiles" / "demo" / "images")
    setups = (ROOT / "tests" / "golden" / "setups.jsonl").read_text().splitlines(keepends=True)
    (made / "setups.jsonl").write_text("".join(setups[:2]))
    axolotl = "base_model: meta-llama/Llama-3.2-1B\nadapter: qlora\nload_in_4bit: true\nlora_r: 8\n"
    (made / "axolotl.yml").write_text(axolotl + "lora_target_linear: true\nsequence_len: 1024\n")
    (made / "sft.yaml").write_text(
        "model_name_or_path: meta-llama/Llama-3.2-1B\nmax_length: 512\ndtype: bfloat16\n"
    )
    claims = (PROFILES / "guide_claims.csv").read_text().splitlines(keepends=True)
    (made / "claims.csv").write_text("".join(claims[:3]))
    record = next(read_records(PROFILES / "runs" / "adapters-h200.jsonl"))
    append_record(tmp_path / "user-data" / "runs" / "train.jsonl", record)
    monkeypatch.chdir(made)
    return made


def test_every_command_that_a_page_shows_does_what_it_is_shown_for(cli: Cli, folder: Path) -> None:
    run, faults = set(), {}
    for page, words in shown():
        words = ["vramwise", *words] if words[0] == "plan" else words
        name = f"{page}: {shlex.join(words)}"
        reason = why_not(words)
        if reason == "a placeholder stands in it":
            continue
        if reason is not None:
            parsed(words)
            continue
        done = cli(*words[1:])
        run.add(words[1])
        if done.code != ENDS_WITH.get(words[1], 0) or "Traceback" in done.err:
            faults[name] = (done.code, done.err[-300:])
        elif "--json" in words:
            lines = done.out.splitlines() if words[1] == "estimate" else [done.out]
            assert all(json.loads(line)["version"] == 1 for line in lines), name
    assert faults == {}
    assert run >= {
        "plan",
        "estimate",
        "compare",
        "check",
        "check-setup",
        "models",
        "gpus",
        "records",
        "schema",
    }
    # What commands wrote, where the pages say that they do.
    for made in ("plan.json", "there/axolotl.yml", "job/vramwise.dstack.yml", "mine.jsonl"):
        assert (folder / made).is_file(), made


def test_what_is_not_run_is_shown_and_is_run_elsewhere() -> None:
    texts = [" ".join(words[1:]) for _, words in shown()]
    for name, reason in NOT_RUN.items():
        assert any(text.startswith(name) for text in texts), name
        for path in re.findall(r"tests/[\w/.]+", reason):
            assert (ROOT / path).exists(), path
