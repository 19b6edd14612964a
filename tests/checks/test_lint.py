"""Style and types, by the tools that the project names."""

from __future__ import annotations

import subprocess
import sys

from .tree import ROOT


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"


def test_types() -> None:
    run("mypy", "--strict", "ckptengine", "bench")


def test_style() -> None:
    run("ruff", "check", "ckptengine", "tests", "bench")
