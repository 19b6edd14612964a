"""Small pieces: a module is at most 400 lines, a function at most 60."""

from __future__ import annotations

import ast

from .tree import modules

MODULE_LINES = 400
FUNCTION_LINES = 60


def test_modules_are_small() -> None:
    large = {m.path: m.lines for m in modules("ckptengine", "bench") if m.lines > MODULE_LINES}
    assert not large


def test_functions_are_small() -> None:
    large = {
        f"{module.path}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module in modules("ckptengine", "bench")
        for node in ast.walk(module.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES
    }
    assert not large


def test_every_module_says_what_it_is() -> None:
    silent = [m.path for m in modules("ckptengine", "bench") if m.text.strip() and not ast.get_docstring(m.tree)]
    assert not silent
