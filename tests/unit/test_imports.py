"""What importing the planner and running `plan` may load: a cold start is a promise."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import planner
from tests.each import for_each

HEAVY = {
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "pandas",
    "numpy",
    "textual",
    "huggingface_hub",
    "pynvml",
    "launcher",
}
PLANNER = Path(planner.__file__).parent
LOADED = (
    "\nimport json, sys\nprint('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
)
PLAN = """
import planner.cli
try:
    planner.cli.plan_main({arguments!r})
except SystemExit:
    pass
"""


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", code + LOADED], capture_output=True, text=True, check=True, timeout=500
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import planner",
        "from vramwise import make_plan, make_request, estimate, resolve_gpu",
        PLAN.format(arguments=["--model", "qwen2.5-14b", "--gpu", "16GB"]),
        PLAN.format(arguments=["--model", "qwen2.5-14b", "--gpu", "16GB", "--json"]),
        PLAN.format(arguments=["--model", "llama-3.1-70b", "--gpu", "24GB"]),
        PLAN.format(arguments=["--model", "qwen2.5-14b", "--gpu", "15GX"]),
        "from launcher import cli\ncli.run(['models'])\ncli.run(['gpus'])",
    ],
    ids=["import", "api", "plan", "plan-json", "plan-too-large", "bad-input", "vramwise"],
)
def test_light_commands_load_nothing_heavy(code: str) -> None:
    allowed = {"launcher"} if "launcher" in code else set()
    # `vramwise gpus` asks the driver what is here.
    allowed |= {"pynvml"} if "gpus" in code else set()
    assert loaded_by(code) & HEAVY <= allowed


@for_each(sorted(PLANNER.rglob("*.py")), name=lambda path: path.relative_to(PLANNER))
def test_the_planner_names_no_part_of_the_launcher(path: Path) -> None:
    named = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            named.add((node.module or "").partition(".")[0])
    assert "launcher" not in named
