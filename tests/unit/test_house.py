"""No room is so full, no file so long and no way so winding that a person cannot hold it in the head."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from tests.conftest import TOGETHER

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("planner", "launcher", "vramwise")
MOST_MODULES, MOST_AT_THE_DOOR = 20, 12
LONGEST_MODULE, LONGEST_FUNCTION = 400, 60


def modules() -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the packages that a file imports when it is imported: what it does for type checkers, and
    inside functions, is left out.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_folder_is_too_full() -> None:
    folders = {path.parent for path in modules().values()}
    counts = {folder.relative_to(ROOT): len(list(folder.glob("*.py"))) for folder in folders}
    assert {str(folder): count for folder, count in counts.items() if count > MOST_MODULES} == {}
    assert all(counts[Path(package)] <= MOST_AT_THE_DOOR for package in PACKAGES)


def test_no_module_and_no_function_is_too_long() -> None:
    long = []
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > LONGEST_MODULE:
            long.append(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                start = min([node.lineno, *(one.lineno for one in node.decorator_list)])
                if node.end_lineno - start + 1 > LONGEST_FUNCTION:
                    long.append(f"{name}.{node.name}")
    assert long == []


def test_no_imports_go_in_a_circle() -> None:
    known = modules()
    graph = {
        name: {one for one in imported(path, known) if one in known and one != name}
        for name, path in known.items()
        # A package that hands its names on imports them when they are asked for.
        if path.name != "__init__.py"
    }
    order = tuple(TopologicalSorter(graph).static_order())
    assert set(graph) <= set(order)


FORKING = ("tests.forks", "tests.faults.small_runs", "tests.stack.local_ranks")


def test_files_that_fork_trainers_are_given_to_one_worker() -> None:
    """A worker that forks one imports the training stack a second time for it."""
    assert [name for name in (*TOGETHER, *TOGETHER.values()) if not (ROOT / name).is_file()] == []
    forking = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        if any(name.startswith(FORKING) for name in names):
            forking.add(str(path.relative_to(ROOT)))
    assert forking
    together = "tests/faults/test_resume.py"
    assert {TOGETHER.get(name, name) for name in forking} == {together}
