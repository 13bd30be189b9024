"""The runtime folder travels with a checkpoint: flat, closed in itself, importable with torch and transformers alone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import linearize

FOLDER = Path(linearize.__file__).parent / "modeling"
FILES = sorted(path for path in FOLDER.iterdir() if path.suffix == ".py" and path.name != "__init__.py")
ENTRY = "modeling_linearized"
OUTSIDE = {"torch", "transformers"}
OPTIONAL = {"fla"}  # kernels that a checkpoint runs without


def imports(path: Path) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Each import statement and whether it stands inside a try, or inside TYPE_CHECKING, which transformers skips too."""

    def walk(node: ast.AST, guarded: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child, guarded
            yield from walk(child, guarded or isinstance(child, ast.Try))

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def neighbours(path: Path) -> set[str]:
    return {node.module for node, _ in imports(path) if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module}


def test_the_folder_is_flat() -> None:
    """But for what a checkpoint does without: the sources of kernels."""
    assert [path.name for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"] == ["cpu"]
    assert {path.suffix for path in (FOLDER / "cpu").iterdir()} == {".cpp", ".h"}
    assert not (FOLDER / "__init__.py").read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports(path: Path) -> None:
    for node, guarded in imports(path):
        where = f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{where}: transformers does not follow .."
            assert node.module, f"{where}: transformers does not follow 'from . import'"
            assert "." not in node.module, f"{where}: there are no packages in a checkpoint"
            assert FOLDER.joinpath(f"{node.module}.py") in FILES, f"{where}: no such file"
            assert not any(name.name == "*" for name in node.names), f"{where}: name what is imported"
            continue
        modules = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
        for module in modules:
            package = str(module).partition(".")[0]
            if package in sys.stdlib_module_names:
                continue
            assert package in OUTSIDE | OPTIONAL, f"{where}: a checkpoint may need torch and transformers only"
            assert guarded, f"{where}: put it inside try, or transformers demands it before it reads the file"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_import_by_name(path: Path) -> None:
    """importlib and __import__ would hide a file from transformers, which copies what `from .x import` names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not {name for name in called if name == "__import__" or name.startswith("importlib.")}


def test_every_file_is_reachable_from_the_entry() -> None:
    found, waiting = set(), [ENTRY]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += neighbours(FOLDER / f"{name}.py")
    assert found == {path.stem for path in FILES}


def test_specs_need_the_standard_library_only() -> None:
    """A plan is made without torch."""
    for name in ("spec", "spec_rules", "spec_maps"):
        for node, _ in imports(FOLDER / f"{name}.py"):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module in ("spec_rules", "spec_maps")
                continue
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert all(str(module).partition(".")[0] in sys.stdlib_module_names for module in modules)
