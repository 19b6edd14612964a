"""``ckptengine demo``."""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ckptengine.cli import parser
from ckptengine.cli.text import size_text, table
from ckptengine.demo.story import Story, tell
from ckptengine.errors import UnusableRequest


def main(argv: Sequence[str]) -> int:
    arguments = parser(
        "demo",
        "Train a small byte-level GPT on the Python standard library with asynchronous checkpoints, kill it in the "
        "middle of a save, resume it, and show that the result is bit-identical to a run that was never killed.",
    )
    arguments.add_argument("--dir", help="where to run (default: a new temporary directory, which is kept)")
    arguments.add_argument("--ranks", type=int, default=1, help="processes; more than 1: FSDP2 over gloo (default 1)")
    options = arguments.parse_args(argv)
    if options.ranks < 1:
        raise UnusableRequest(f"--ranks {options.ranks}: at least one process is needed")
    directory = Path(options.dir or tempfile.mkdtemp(prefix="ckptengine-demo-"))
    if directory.exists() and not directory.is_dir():
        raise UnusableRequest(f"--dir {directory} is a file; name a directory, or one that does not exist yet")
    started_s = time.monotonic()
    story = tell(directory, options.ranks, lambda text: print(text, flush=True))
    print(f"\nsaves of the killed and resumed run\n\n{_saves(story)}")
    _picture(story, directory / "demo.png")
    print(_verdict(story, directory, time.monotonic() - started_s))
    return 0 if story.same else 1


def _saves(story: Story) -> str:
    rows = [["step", "stage", "blocked ms", "fence ms", "s to durable", "size", "copied"]]
    for save in story.resumed.saves:
        rows.append(
            [
                str(save["step"]),
                save["stage"],
                f"{save.get('blocked_ms', 0.0):.2f}",
                f"{save.get('fence_ms', 0.0):.2f}",
                f"{save.get('durable_s', float('nan')):.3f}",
                size_text(save.get("total_bytes", 0)),
                size_text(save.get("copied_bytes", 0)),
            ]
        )
    return table(rows)


def _picture(story: Story, path: Path) -> None:
    try:
        drawing = importlib.import_module("ckptengine.demo.picture")
    except ImportError as error:
        sys.stderr.write(f"no picture: {error.name} is not installed (pip install 'ckptengine[plot]')\n")
        return
    drawing.draw(story, path)
    print(f"picture: {path}")


def _verdict(story: Story, directory: Path, seconds: float) -> str:
    if story.same:
        tensors = "weights, optimizer state and loss curve"
        same = "BIT-IDENTICAL to the run that was never stopped"
        return f"after SIGKILL and resume, {tensors} are {same} ({seconds:.0f} s)"
    told = ", ".join(story.differing[:5]) or "none"
    return (
        f"THE RUNS DIFFER: tensors {told}; first differing loss at step "
        f"{story.differing_losses[0] if story.differing_losses else '-'}; see {directory}"
    )
