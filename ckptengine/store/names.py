"""Names of files and directories beneath a root."""

from __future__ import annotations

import re
from collections.abc import Iterable

STEP_PATTERN = re.compile(r"step-(\d{9,})\Z")
MANIFEST_PATTERN = re.compile(r"manifest-a(\d{6,})-n(\d{4,})\.json\Z")
RANK_PATTERN = re.compile(r"rank-(\d{5,})-a(\d{6,})-n(\d{4,})\.bin\Z")
WEIGHTS_PATTERN = re.compile(r"weights-only-step-(\d{9,})\Z")
ATTEMPTS = "attempts"
LOCK = ".lock"


def step_dir(step: int) -> str:
    return f"step-{step:09d}"


def is_step(folder: str, entries: Iterable[str]) -> bool:
    """Whether a folder of this name, with these entries, is one step of a root."""
    return STEP_PATTERN.match(folder) is not None and any(
        MANIFEST_PATTERN.match(entry) or RANK_PATTERN.match(entry) for entry in entries
    )


def weights_dir(step: int) -> str:
    """A root of its own beneath the root: the weights of a step that there was no time to save whole."""
    return f"weights-only-step-{step:09d}"


def rank_file(rank: int, attempt: int, save: int) -> str:
    return f"rank-{rank:05d}-a{attempt:06d}-n{save:04d}.bin"


def manifest(attempt: int, save: int) -> str:
    return f"manifest-a{attempt:06d}-n{save:04d}.json"


def attempt_claim(attempt: int) -> str:
    return f"{attempt:06d}.claim"


def attempt_record(attempt: int, copy: int) -> str:
    return f"{attempt:06d}.{copy}.json"


ATTEMPT_PATTERN = re.compile(r"(\d{6,})\.(claim|0\.json|1\.json)\Z")
