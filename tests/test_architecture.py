"""The house rules: who may import whom, how long files and functions may be, what must stay light."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bnfctl
from bnfctl import tables
from bnfctl.losses import Loss

PACKAGE = Path(bnfctl.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    {"errors"},
    {"console", "durable", "tables", "hub", "machine", "shape"},
    {"options", "pool"},
    {"config", "digests", "shards"},
    {"artifact", "footprint", "recipes"},
    {"data"},
    {"model", "losses", "client"},
    {"samplers", "scorers", "training", "tasks", "analysis"},
    {"evaluation"},
    {"report"},
    {"stages", "lab"},
    {"ranks"},
    {"launch"},
    {"pipeline"},
    {"browse", "dryrun"},
    {"doctor"},
    {"verbs"},
    {"cli"},
    {"__main__"},
]
"""Lowest first.  A module imports from lower layers only; a package may also import from itself."""

LIGHT = {"cli", "verbs", "options", "config", "errors", "console", "artifact", "shards", "pool", "pipeline", "launch", "ranks", "tables", "hub",
         "digests", "durable", "browse", "dryrun", "machine", "footprint", "recipes", "shape", "__main__"}  # fmt: skip
HEAVY = {"torch", "transformers", "datasets", "vllm", "accelerate", "matplotlib"}


def top_name(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def rank(name: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if name in layer)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute module, is it at the top of the file) for every import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "bnfctl":
                yield from ((f"bnfctl.{alias.name}", id(node) in top) for alias in node.names)
            else:
                yield str(node.module), id(node) in top


@pytest.mark.parametrize(
    "path", [p for p in FILES if p != PACKAGE / "__init__.py"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_only_go_down(path: Path) -> None:
    mine = top_name(path)
    for module, _ in imports(path):
        if not module.startswith("bnfctl.") or module == "bnfctl.__version__":
            continue
        other = module.split(".")[1]
        if other == mine:
            sibling = module.split(".")[2:3]
            allowed = mine != "stages" or not sibling or sibling[0] in ("Prerequisite", "module", "name_served")
            assert allowed, f"{path}: stages don't import each other ({module})"
        else:
            assert rank(other) < rank(mine), f"{path}: {mine} may not import {other}"


def test_the_lab_is_reached_through_the_tables_only() -> None:
    for path in FILES:
        if top_name(path) != "lab":
            assert not [m for m, _ in imports(path) if m.startswith("bnfctl.lab")], path


def test_loss_files_import_torch_and_the_loss_types_only() -> None:
    for path in (PACKAGE / "losses").glob("*.py"):
        if path.name == "__init__.py":
            continue
        outside = [m for m, _ in imports(path) if m.split(".")[0] not in sys.stdlib_module_names]
        assert all(m.split(".")[0] == "torch" or m == "bnfctl.losses" for m in outside), (path, outside)


def test_light_modules_import_nothing_heavy() -> None:
    for path in FILES:
        if top_name(path) in LIGHT or path.parent.name == "stages" or path.name in ("records.py", "pairing.py"):
            heavy = [m for m, top in imports(path) if top and m.split(".")[0] in HEAVY]
            assert not heavy, (path, heavy)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400, path
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 60, f"{path}: {node.name} has {lines} lines"


def test_no_file_is_called_utils() -> None:
    assert not [p for p in FILES if p.stem in ("utils", "common", "helpers", "helper", "manager", "handler")]


TABLES = {
    "losses": tables.LOSSES,
    "scorers": tables.SCORERS,
    "rules": tables.RULES,
    "tasks": tables.TASKS,
    "models": tables.MODELS,
    "prompts": tables.PROMPTS,
    "samplers": tables.SAMPLERS,
}


@pytest.mark.parametrize(("table", "name"), [(t, n) for t, entries in TABLES.items() for n in entries])
def test_every_table_entry_exists(table: str, name: str) -> None:
    assert tables.load(TABLES[table], name, table) is not None


@pytest.mark.parametrize("name", tables.LOSSES)
def test_every_loss_is_a_loss(name: str) -> None:
    made: Loss = tables.load(tables.LOSSES, name, "loss")()
    assert isinstance(made.needs_reference, bool)
    assert isinstance(made.needs_pairs, bool)


def test_help_loads_no_heavy_package() -> None:
    code = (
        "import sys; sys.argv = ['bnfctl', '--help']\n"
        "from bnfctl.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"loaded = {HEAVY!r} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


def test_no_pickle() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in text.replace("no pickle", ""), path
        assert "torch.save(" not in text, path


def test_stage_modules_match_the_configs() -> None:
    from bnfctl.config import CONFIGS

    for stage in CONFIGS:
        module = importlib.import_module(f"bnfctl.stages.{stage}")
        assert module.STAGE == stage
        assert isinstance(module.VERSION, int)
