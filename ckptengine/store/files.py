"""File operations under the store: one narrow class, so that tests can fail, tear or kill at each of them.

Everything that writes a checkpoint's metadata, and the portable engine's data, goes through `FileOps`.  The native
engine has a fault hook of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from ckptengine.errors import NotFound, StorageFailed, Truncated, UnreadableFormat

T = TypeVar("T")

_REMEDY = {
    errno.ENOSPC: "free space on that file system or point the root elsewhere",
    errno.EDQUOT: "free space within the quota or point the root elsewhere",
    errno.EFBIG: "the file system or a limit of the process (ulimit -f) takes no file of that size; raise it",
    errno.EROFS: "the file system is read-only; remount it or point the root elsewhere",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the machine is out of file handles",
    errno.EIO: "the device reported an I/O error; check it and its logs",
    errno.EACCES: "check the permissions of the path",
    errno.EPERM: "check the permissions of the path",
    errno.ENOTDIR: "a part of that path is a file; point the root at a directory",
}


def storage_failed(action: str, path: str | Path, error: OSError) -> StorageFailed:
    """The `StorageFailed` for a refused file operation, with its errno name and a remedy."""
    name = errno.errorcode.get(error.errno or 0, "unknown error")
    remedy = _REMEDY.get(error.errno or 0, "see the operating system's logs")
    failed = StorageFailed(f"cannot {action} {path}: {error.strerror or error} ({name}); {remedy}")
    failed.__cause__ = error
    return failed


class Unsettled(StorageFailed):
    """A publication that failed after its name had appeared: what it names must not be removed."""


class FileOps:
    """The real file operations.  Each raises OSError; `guarded` turns that into `StorageFailed`."""

    def create(self, path: Path, mode: int = 0o666) -> int:
        """A new file open for reading and writing; FileExistsError when it is there already."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def preallocate(self, fd: int, nbytes: int) -> None:
        if nbytes:
            os.posix_fallocate(fd, 0, nbytes)

    def truncate(self, fd: int, nbytes: int) -> None:
        os.ftruncate(fd, nbytes)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        os.mkdir(path, mode)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def fsync_dir(self, path: Path) -> None:
        """Make the names in ``path`` durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def guarded(action: str, path: str | Path, call: Callable[[], T]) -> T:
    """``call()``, its OSError turned into `StorageFailed`."""
    try:
        return call()
    except OSError as error:
        raise storage_failed(action, path, error) from error


def write_all(ops: FileOps, fd: int, data: bytes | memoryview, offset: int, path: Path) -> None:
    """Write all of ``data`` at ``offset``; continues short writes where they stopped."""
    view = memoryview(data).cast("B")
    while len(view):
        written = guarded("write", path, lambda v=view, o=offset: ops.pwrite(fd, v, o))  # type: ignore[misc]
        if written <= 0:
            raise StorageFailed(f"cannot write {path}: the file system accepted 0 of {len(view)} bytes at {offset}")
        view = view[written:]
        offset += written


def make_dirs(ops: FileOps, path: Path, mode: int | None = None) -> None:
    """Create ``path`` and its parents, each name made durable in its parent before the next is used."""
    missing: list[Path] = []
    probe = path
    while not guarded("look at", probe, lambda p=probe: _exists(p)):  # type: ignore[misc]
        missing.append(probe)
        if probe.parent == probe:
            break
        probe = probe.parent
    if not probe.is_dir():
        raise StorageFailed(f"cannot create {path}: {probe} is not a directory; point the root at a directory")
    _flush_name(ops, probe)
    for directory in reversed(missing):
        try:
            ops.mkdir(directory, mode if mode is not None else 0o777)
        except FileExistsError:
            continue
        except OSError as error:
            raise storage_failed("create directory", directory, error) from error
        guarded("flush directory", directory.parent, lambda d=directory.parent: ops.fsync_dir(d))  # type: ignore[misc]


def _exists(path: Path) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return False
    return True


def _flush_name(ops: FileOps, directory: Path) -> None:
    """Make the name of a directory durable that is there already: whoever made it may have died before it did so."""
    try:
        ops.fsync_dir(directory.parent)
    except PermissionError:
        return  # a parent that we may not even read was not made by us
    except OSError as error:
        raise storage_failed("flush directory", directory.parent, error) from error


def publish(ops: FileOps, path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write ``data`` durably under a name that must not exist yet: all of it or nothing is ever visible.

    Temporary name, flush, exclusive link, flush of the directory.  Raises FileExistsError when ``path`` exists,
    `Unsettled` when it failed after the name had appeared and the name could not be withdrawn, and `StorageFailed` for
    every other refusal of the operating system; nothing is left behind then, as far as it can be removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    linked = False
    try:
        _write_new(ops, temporary, data, mode)
        _link_exclusive(ops, temporary, path)
        linked = True
        if temporary.exists():  # not where it was renamed
            guarded("remove", temporary, lambda: ops.unlink(temporary))
        guarded("flush directory", path.parent, lambda: ops.fsync_dir(path.parent))
    except (StorageFailed, FileExistsError) as error:
        linked = linked or _same(temporary, path)  # a link may be made and yet reported as refused
        discard(ops, temporary)
        if linked:
            _withdraw(ops, path, error)
        raise


def _write_new(ops: FileOps, path: Path, data: bytes, mode: int) -> None:
    fd = guarded("create", path, lambda: _create_over(ops, path, mode))
    try:
        write_all(ops, fd, data, 0, path)
        guarded("flush", path, lambda: ops.fsync(fd))
    except BaseException:
        close_after_failure(ops, fd)
        raise
    guarded("close", path, lambda: ops.close(fd))


def _same(temporary: Path, path: Path) -> bool:
    try:
        return os.path.samestat(os.lstat(temporary), os.lstat(path))
    except OSError:
        return False


def _withdraw(ops: FileOps, path: Path, error: Exception) -> None:
    """Take a name back that appeared but may not be durable."""
    try:
        ops.unlink(path)
        ops.fsync_dir(path.parent)
    except OSError as second:
        told = f"{error}; and {path} could not be withdrawn ({second.strerror}): it may count or not"
        raise Unsettled(told) from error


def discard(ops: FileOps, path: Path) -> None:
    """Remove a file on the way out of a failure.

    A failing disk may refuse even this: the failure that led here is the one to report, and retention sweeps up.
    """
    with contextlib.suppress(OSError):
        ops.unlink(path)


def close_after_failure(ops: FileOps, fd: int) -> None:
    """Close on the way out of a failure; the descriptor is gone whatever close says."""
    with contextlib.suppress(OSError):
        ops.close(fd)


def _create_over(ops: FileOps, path: Path, mode: int) -> int:
    try:
        return ops.create(path, mode)
    except FileExistsError:  # left by a process that died with our number
        ops.unlink(path)
        return ops.create(path, mode)


def _link_exclusive(ops: FileOps, temporary: Path, path: Path) -> None:
    try:
        ops.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        # File systems without hard links (some FUSE and network ones): rename, after looking.
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise storage_failed("publish", path, error) from error
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        guarded("publish", path, lambda: ops.rename(temporary, path))


def read_file(path: Path, limit_bytes: int) -> bytes:
    """The whole of a small file; `NotFound`, `Truncated` (larger than the limit reads as damage) or `StorageFailed`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"no file {path}") from None
    except OSError as error:
        raise storage_failed("open", path, error) from error
    with open(fd, "rb") if stat.S_ISREG(os.fstat(fd).st_mode) else _refuse(fd, path) as file:
        size = os.fstat(fd).st_size
        if size > limit_bytes:
            raise Truncated(f"{path} has {size} bytes, more than the {limit_bytes} that such a file can have")
        return guarded("read", path, file.read)


def _refuse(fd: int, path: Path) -> NoReturn:
    os.close(fd)
    raise UnreadableFormat(f"{path} is not a regular file")
