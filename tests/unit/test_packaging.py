"""The image and the conda recipe install what pyproject.toml says: neither is built here."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from pathlib import Path

import yaml

from launcher import cli

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_image_copies_what_the_wheel_is_built_of() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    assert [name for name in copied if not (ROOT / name).exists()] == []
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {
        *wheel["packages"],
        PROJECT["project"]["readme"],
        *PROJECT["project"]["license-files"],
        "pyproject.toml",
    }
    needed |= {str(Path(one).parent) for one in wheel["shared-data"]}
    assert needed <= copied
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert set(let_in) == copied
    stages = [line.split()[-1] for line in lines if line.startswith("FROM ")]
    assert stages == ["base", "train", "plan"]
    (entry,) = [json.loads(line.partition(" ")[2]) for line in lines if line.startswith("ENTRYPOINT")]
    assert set(entry) <= set(PROJECT["project"]["scripts"])
    told = [line for line in lines if line.startswith("#") and "docker run" in line]
    assert len(told) == 2
    assert "plan" in cli.COMMANDS


def test_the_recipe_has_the_base_install_s_packages_and_programs() -> None:
    recipe = yaml.safe_load((ROOT / "packaging" / "conda" / "recipe.yaml").read_text())
    project = PROJECT["project"]
    assert recipe["context"]["version"] == project["version"]
    run = {line.replace(" ", "").replace("_", "-") for line in recipe["requirements"]["run"]}
    assert run == {*project["dependencies"], f"python{project['requires-python']}"}
    scripts = dict(re.split(r"\s*=\s*", line) for line in recipe["build"]["python"]["entry_points"])
    assert scripts == project["scripts"]
    assert recipe["about"]["summary"] == project["description"]
    assert fnmatch.filter(recipe["requirements"]["host"], "hatchling*")
