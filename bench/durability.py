"""Files at rest: making them durable, putting them out of the page cache, and counting them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def files_under(path: Path) -> Iterator[Path]:
    """Every file at or under `path`."""
    if not path.is_dir():
        yield path
        return
    for folder, _, names in os.walk(path):
        for name in names:
            yield Path(folder) / name


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_durable(path: Path) -> None:
    """Sync every file under `path`, then every directory from the bottom up, then the directory that holds it."""
    for file in files_under(path):
        _sync(file)
    if path.is_dir():
        for folder, _, _ in os.walk(path, topdown=False):
            _sync(Path(folder))
    _sync(path.parent)


def evict(path: Path) -> None:
    """Write back and drop the page cache of every file under `path`, without touching anything else's."""
    for file in files_under(path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def warm(path: Path) -> None:
    """Read every file under `path` once, so that it is in the page cache."""
    for file in files_under(path):
        with open(file, "rb", buffering=0) as stream:
            while stream.read(1 << 22):
                pass


def count(path: Path) -> tuple[int, int]:
    """Bytes allocated on the file system and number of files under `path`."""
    stats = [file.stat() for file in files_under(path)]
    return sum(stat.st_blocks * 512 for stat in stats), len(stats)
