"""What a repository page, a hook or an action reads: each names commands and options that there are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import cli
from planner.commands.program import Parser, declare

ROOT = Path(__file__).resolve().parents[2]


def loaded(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def parsed(words: list[str]) -> Any:
    """What a command line of `vramwise` is read as."""
    assert words[0] == "vramwise"
    command = cli.COMMANDS[words[1]]
    parser = Parser(prog="vramwise")
    declare(parser, command)
    return parser.parse_args(words[2:])


def test_the_hook_s_command_is_one_that_there_is() -> None:
    (hook,) = loaded(".pre-commit-hooks.yaml")
    args = parsed([*hook["entry"].split(), *hook["args"], "axolotl.yml", "conf/sft.yaml"])
    assert args.gpu == "24GB"
    assert args.files == [Path("axolotl.yml"), Path("conf/sft.yaml")]
    named = re.compile(hook["files"])
    ours = ("axolotl.yml", "conf/sft.yaml", "llamafactory-8b.yaml", "unsloth_train.py")
    assert all(named.search(name) for name in ours)
    assert not any(named.search(name) for name in ("docker-compose.yml", "train.py"))


@pytest.mark.parametrize(("length", "code"), [(512, 0), (65_536, 3)])
def test_the_action_s_last_step_fails_where_a_config_does_not_fit(
    tmp_path: Path, length: int, code: int
) -> None:
    """Its script is run as GitHub runs it, with this checkout in place of the installed program."""
    step = loaded("action.yml")["runs"]["steps"][-1]
    program = tmp_path / "vramwise" / "bin" / "vramwise"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/bash\nexec "{sys.executable}" -m launcher.cli "$@"\n')
    program.chmod(0o755)
    config = tmp_path / "sft.yaml"
    settings = {
        "model_name_or_path": "llama-3.1-8b",
        "use_peft": True,
        "load_in_4bit": True,
        "dtype": "bfloat16",
    }
    settings |= {"lora_target_modules": "all-linear", "max_length": length, "per_device_train_batch_size": 1}
    config.write_text(yaml.safe_dump(settings))
    given = {
        "RUNNER_TEMP": str(tmp_path),
        "FILES": f"{config} {config}",
        "GPU": "16GB",
        "PYTHONPATH": str(ROOT),
    }
    assert set(step["env"]) <= given.keys()
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", step["run"]],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.count("fits:" if code == 0 else "does not fit:") == 2


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = loaded("CITATION.cff")
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


def test_issue_forms_ask_for_the_doctor() -> None:
    for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.stem == "config":
            continue
        (asked,) = (part for part in form["body"] if part["id"] == "doctor")
        command = re.search(r"`(.+)`", asked["attributes"]["label"])
        assert command is not None
        assert parsed(command[1].split()).json is True
        assert asked["validations"]["required"] is True
