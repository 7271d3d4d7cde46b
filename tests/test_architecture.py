"""Imports point downward: the directions that CONTRIBUTING.md promises, read off the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rkd_cli

PACKAGE = Path(rkd_cli.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MATHEMATICS = ("losses", "mining", "geometry", "metrics", "retrieval", "approximate", "compress")
LEAVES = (*MATHEMATICS, "models", "data", "runtime")
ABOVE = {"settings", "commands", "embedding", "report", "screen", "training", "bench"}  # of the leaves
LIGHT = ("runtime.signals", "runtime.processes")
NO_TORCH = ("cli", "manual", "settings", "errors", "events", "schemas", "report", "screen", *LIGHT)
OF_SETTINGS = ("plan", "images", "notes", "objective", "open", "dry_run")
MEASURES = ("report.gallery", "report.picture", "report.projection")  # of pages: loaded when a page is made


def module_of(path: Path) -> str:
    name = ".".join(("rkd_cli", *path.relative_to(PACKAGE).with_suffix("").parts))
    return name.removesuffix(".__init__")


def imports_of(path: Path, at_load: bool = False) -> set[str]:
    """Every module that a file imports; ``at_load``: only what importing the file itself imports."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if at_load and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if at_load and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.add(child.module)
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def part_of(module: str) -> str:
    """``rkd_cli.data.images`` -> ``data``."""
    return [*module.split("."), ""][1]


def parts_imported(path: Path) -> set[str]:
    return {part_of(name) for name in imports_of(path) if name.startswith("rkd_cli.")}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_downward(path: Path) -> None:
    part, imported = part_of(module_of(path)), parts_imported(path)
    others = imports_of(path)
    if part not in ("cli", "__main__"):
        assert "typer" not in others, "only cli.py speaks typer"
        assert "cli" not in imported
    if part != "screen":
        assert not any(name.split(".")[0] == "rich" for name in others), "only screen/ draws"
    if part not in ("cli", "__main__", "screen"):
        assert "screen" not in imported
    if part not in ("cli", "__main__", "commands", "training", "screen"):
        assert part == "report" or "report" not in imported
    if part in LEAVES:
        assert not imported & ABOVE, "the mathematics and the leaves know no settings and nothing that uses them"
    if part == "embedding":  # plain values; `rkd_cli.load` alone checks what a caller gives as the flags are
        assert not imported & {"commands", "training", "report", "bench"}
        assert path.stem == "loaded" or "settings" not in imported
    if part in ("report", "screen"):  # what they draw is above them, as types alone
        at_load = {part_of(name) for name in imports_of(path, at_load=True) if name.startswith("rkd_cli.")}
        assert not at_load & {"commands", "embedding", "training", "bench"}
    if part == "commands" and path.stem != "demo":  # which trains
        assert not imported & {"training", "bench"}
    if part == "runtime":
        assert imported <= {"runtime", "errors", "__version__"}
    if part == "data":
        assert "models" not in imported
    if part == "models":
        assert "data" not in imported
    if part in ("errors", "events", "schemas"):
        assert imported <= {"errors", "events", "schemas", "__version__"}
    if part == "settings":
        assert imported <= {"schemas", "settings"} | ({"errors", "runtime"} if path.stem == "resolve" else set())
    if part == "training" and path.stem not in OF_SETTINGS:
        assert "settings" not in imported, "what makes a run of settings knows them, what trains it does not"


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if (name := module_of(p).removeprefix("rkd_cli.")).startswith(NO_TORCH) and name not in MEASURES],
    ids=module_of,
)
def test_what_help_needs_is_light(path: Path) -> None:
    heavy = {name for name in imports_of(path, at_load=True) if name.split(".")[0] in ("torch", "torchvision", "numpy")}
    assert not heavy


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from rkd_cli.cli import app, main\n"
        "for name in ('', *(command.name for command in app.registered_commands)):\n"
        "    try: main([*name.split(), '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "    if 'torch' in sys.modules or 'numpy' in sys.modules: sys.exit(f'rkd {name} --help')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") > 10
