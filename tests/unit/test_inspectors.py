"""`plan` describes unknown architectures through whatever installed package offers to, and only then."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from launcher.models.inspect import inspect_in_child
from planner import cli
from planner.base.errors import MissingExtraError
from planner.models.inspectors import GROUP, installed_inspector

CONFIG = {"model_type": "llama"}


def test_an_inspector_is_looked_up_for_every_command_that_takes_models() -> None:
    for name in ("plan", "estimate", "compare"):
        assert dict(cli.COMMANDS[name].defaults)["inspector"] is installed_inspector


def test_the_installed_package_offers_the_launchers_inspector() -> None:
    (offered,) = metadata.entry_points(group=GROUP)
    assert offered.load() is inspect_in_child


def test_without_one_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda **_: ())
    with pytest.raises(MissingExtraError, match=r"vramwise\[train\]"):
        installed_inspector(CONFIG, model_id="x", hub_id="a/x")


@pytest.mark.slow
def test_plan_describes_an_architecture_outside_the_catalog(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = tmp_path / "mine"
    model.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 2048,
    }
    (model / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "planner.cli", "--model", str(model), "--gpu", "16GB", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"]
