"""The README's programs run, and every document is reachable and points at things that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

from ckptengine.cli import COMMANDS

from .tree import ROOT

DOCUMENTS = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]


def targets(document: str) -> list[Path]:
    """What a document's links point at, those to other hosts left out."""
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    return [((ROOT / document).parent / link).resolve() for link in links if "://" not in link]


def test_links() -> None:
    broken = [f"{document}: {link}" for document in DOCUMENTS for link in targets(document) if not link.exists()]
    assert not broken


def test_the_index_lists_every_document() -> None:
    listed = {path.relative_to(ROOT).as_posix() for path in targets("docs/README.md")}
    assert listed == set(DOCUMENTS) - {"README.md", "docs/README.md"}


def test_the_programs_of_the_readme(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(programs) == 2
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search}
    command = [sys.executable, "-W", "error", "-c", "\n".join(programs)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("200 {'loss': ")
    assert sorted(path.name for path in (tmp_path / "runs/first").glob("step-*")) == [
        f"step-{step:09d}" for step in (100, 150, 200)
    ]


def test_the_readme_lists_the_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `ckptengine (\w+)", text, re.MULTILINE)) == sorted(COMMANDS)


def test_no_machine_path_in_the_project() -> None:
    wrong = re.compile(r"(?<![\w.])/(work|root|home/\w+)/\w")
    found = [
        f"{path.relative_to(ROOT)}: {hit[0]}"
        for folder in ("ckptengine", "bench", "native", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".cpp", ".hpp", ".toml", ".json", ".txt", ".sh")
        for hit in wrong.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert not found


def test_presets_are_part_of_the_package() -> None:
    folder = resources.files("ckptengine.sources.rules") / "presets"
    assert {"gpt2.toml", "llama.toml"} <= {entry.name for entry in folder.iterdir()}
