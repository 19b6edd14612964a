"""A name in host memory for each test, removed afterwards; one compute thread."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator

import pytest

from ckptengine.tiers.memory import SHARED_MEMORY
from tests.compute_threads import one_compute_thread

__all__ = ["memory", "one_compute_thread"]


@pytest.fixture
def memory() -> Iterator[str]:
    """The URL of host memory that nobody else uses."""
    if not SHARED_MEMORY.is_dir():
        pytest.skip(f"there is no memory file system at {SHARED_MEMORY}")
    name = f"test-{secrets.token_hex(6)}"
    yield f"shm://{name}"
    shutil.rmtree(SHARED_MEMORY / f"ckptengine-{os.getuid()}" / name, ignore_errors=True)
