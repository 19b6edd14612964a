"""File operations under the local tier, each durable or refused."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from ckptengine.errors import Truncated
from ckptengine.tiers.port import PARTIAL, Bytes
from ckptengine.tiers.refusals import refusals

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
"""How file systems without hard links refuse to make one."""


def too_short(label: str, name: str, offset: int, size_bytes: int) -> Truncated:
    return Truncated(f"{label}/{name} ends before byte {offset + size_bytes}; take another copy or an older step")


def write_all(file: IO[bytes], data: Bytes, offset: int) -> None:
    rest = memoryview(data).cast("B")
    while len(rest):
        written = os.pwrite(file.fileno(), rest, offset)
        if written <= 0:
            raise OSError(errno.EIO, "a write took no bytes")
        rest, offset = rest[written:], offset + written


def allocate(fd: int, size_bytes: int) -> None:
    """Claim the space now, so that a full disk shows before anything is sent; sparse where that is not supported."""
    os.ftruncate(fd, size_bytes)
    if size_bytes:
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError as refusal:
            if refusal.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def exists(base: str, directory: int) -> bool:
    try:
        os.stat(base, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def make_root(root: Path, mode: int | None) -> None:
    if root.is_dir():
        return
    make_root(root.parent, None) if root.parent != root else None
    with suppress(FileExistsError):
        os.mkdir(root, 0o777 if mode is None else mode)
    above = os.open(root.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(above)
    finally:
        os.close(above)
    if not root.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(root))


def links_work(root: Path) -> bool:
    probe = root / f"{PARTIAL}{secrets.token_hex(8)}-probe"
    other = probe.with_name(probe.name + "-link")
    with refusals("write to", str(root)):
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        try:
            os.link(probe, other)
        except OSError as refusal:
            if refusal.errno not in NO_LINKS:
                raise
            return False
        else:
            other.unlink()
            return True
        finally:
            probe.unlink()


def walk(start: Path, root: Path, *, hidden: bool = False) -> Iterator[tuple[str, int]]:
    """Regular files below ``start`` as (name relative to ``root``, bytes); links are not followed."""
    try:
        entries = list(os.scandir(start))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path), root, hidden=hidden)
        elif entry.is_file(follow_symlinks=False) and (hidden or not entry.name.startswith(".")):
            with suppress(FileNotFoundError):
                yield os.path.relpath(entry.path, root), entry.stat(follow_symlinks=False).st_size
