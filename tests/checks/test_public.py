"""What users build on does not change by accident: public names, errors and their codes, commands, start-up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ckptengine as ce
from ckptengine import errors
from ckptengine.cli import COMMANDS

from .tree import ROOT

NAMES = [
    "AutoInterval",
    "Checkpoint",
    "CheckpointError",
    "Checkpointer",
    "Every",
    "Keep",
    "PerRank",
    "SaveHandle",
    "Sharded",
    "Tier",
    "Tolerate",
    "__version__",
    "convert",
    "load",
    "open",
    "register",
    "save",
    "steps",
]

CODES = {
    "CheckpointError": ("checkpoint", "Exception"),
    "UnusableRequest": ("unusable-request", "CheckpointError"),
    "NotFound": ("not-found", "UnusableRequest"),
    "UnreadableFormat": ("unreadable-format", "UnusableRequest"),
    "StateMismatch": ("state-mismatch", "UnusableRequest"),
    "UnsupportedValue": ("unsupported-value", "UnusableRequest"),
    "LayoutError": ("layout", "UnusableRequest"),
    "RuleError": ("rule", "UnusableRequest"),
    "Damaged": ("damaged", "CheckpointError"),
    "DigestMismatch": ("digest-mismatch", "Damaged"),
    "Truncated": ("truncated", "Damaged"),
    "ForeignFile": ("foreign-file", "Damaged"),
    "RestoreIncomplete": ("restore-incomplete", "Damaged"),
    "SaveFailed": ("save-failed", "CheckpointError"),
    "StorageFailed": ("storage-failed", "SaveFailed"),
    "TornCapture": ("torn-capture", "SaveFailed"),
    "ReplicasDiffer": ("replicas-differ", "SaveFailed"),
    "Stalled": ("stalled", "SaveFailed"),
    "Conflict": ("conflict", "CheckpointError"),
    "RootInUse": ("root-in-use", "Conflict"),
    "Superseded": ("superseded", "Conflict"),
    "AlreadyExists": ("already-exists", "Conflict"),
    "CoordinationFailed": ("coordination-failed", "CheckpointError"),
    "RankTimeout": ("rank-timeout", "CoordinationFailed"),
    "RanksDisagree": ("ranks-disagree", "CoordinationFailed"),
}
"""Class -> code and parent.  Only ever added to: programs match on them."""

START_S = 1.0
COMMAND_NAMES = ["bench", "convert", "demo", "diff", "ls", "prune", "show", "verify"]


def test_public_names() -> None:
    assert ce.__all__ == NAMES
    assert dir(ce) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(ce, name)
    if name != "__version__":
        assert value.__doc__


def test_no_other_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Checkpointers'"):
        ce.Checkpointers  # noqa: B018


def test_errors_and_their_codes() -> None:
    found = {
        name: (value.code, value.__base__.__name__)
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.CheckpointError)
    }
    assert found == CODES
    assert len({code for code, _ in found.values()}) == len(found)


def test_the_drawn_tree_of_errors_is_the_tree() -> None:
    drawn = errors.__doc__ or ""
    depth = {"CheckpointError": 0}
    for line in drawn.splitlines():
        for name in CODES:
            if f"- {name} " in line:
                depth[name] = line.index(name) // 4 - 1
    for name, (_, parent) in CODES.items():
        if name != "CheckpointError":
            assert depth[name] == depth[parent] + 1, name


def test_commands() -> None:
    assert sorted(COMMANDS) == COMMAND_NAMES


def run(*arguments: str) -> tuple[str, float]:
    """Output of the command line and its processor time in seconds, torch not loaded."""
    program = (
        "import sys, time\n"
        "from ckptengine.cli import main\n"
        f"status = main({list(arguments)!r})\n"
        "assert status == 0, status\n"
        "assert 'torch' not in sys.modules\n"
        "print(time.process_time(), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, float(done.stderr.split()[-1])


def test_help_and_ls_start_without_torch(tmp_path: Path) -> None:
    ce.save({"a": 1}, tmp_path / "run", 7)
    text, seconds = run("--help")
    assert all(command in text for command in COMMANDS)
    assert seconds < START_S
    text, seconds = run("ls", str(tmp_path / "run"))
    assert "7" in text
    assert "committed" in text
    assert seconds < START_S
