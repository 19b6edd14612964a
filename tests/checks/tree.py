"""The project's sources as syntax trees, for the checks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "ckptengine"


@dataclass(frozen=True, slots=True)
class Module:
    """A source file; ``path`` is relative to the project, with slashes."""

    path: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        return self.text.count("\n")


@dataclass(frozen=True, slots=True)
class Imported:
    """One import of ``name`` (dotted); ``inside``: within a function."""

    module: str
    line: int
    name: str
    inside: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.name}"


@cache
def modules(*folders: str) -> tuple[Module, ...]:
    """Every module beneath ``folders`` of the project."""
    found = []
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            text = file.read_text(encoding="utf-8")
            found.append(Module(file.relative_to(ROOT).as_posix(), text, ast.parse(text)))
    assert found, f"nothing beneath {folders}"
    return tuple(found)


def imports(module: Module) -> Iterator[Imported]:
    """Every import of a module, those by ``import_module("literal")`` too; relative ones are left out."""
    inside = {
        child
        for node in ast.walk(module.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.walk(node)
    }
    for node in ast.walk(module.tree):
        for name in _names(node):
            yield Imported(module.path, getattr(node, "lineno", 0), name, node in inside)


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
        if node.module == PACKAGE:
            return [f"{PACKAGE}.{alias.name}" for alias in node.names]
        return [node.module]
    if (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("import_module", "importlib.import_module", "optional_module")
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ):
        return [str(node.args[0].value)]
    return []
