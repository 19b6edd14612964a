"""Temporary folders in memory where there is such a file system: these tests sync many tiny files."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def memory_folder() -> Iterator[Path]:
    memory = "/dev/shm"
    folder = Path(tempfile.mkdtemp(prefix="ckptengine-test-", dir=memory if os.access(memory, os.W_OK) else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
