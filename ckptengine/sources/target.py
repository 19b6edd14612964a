"""Where a conversion writes: a local folder, or a prefix of an fsspec file system."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import posixpath
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from ckptengine.errors import CheckpointError, StorageFailed
from ckptengine.sources import buffers
from ckptengine.sources.files import beneath
from ckptengine.sources.writer import Sink
from ckptengine.store.files import guarded, storage_failed
from ckptengine.tiers.redact import for_fsspec, redacted_url

BUFFER_BYTES = 4 << 20
"""What a local file is written in: one aligned buffer per file that is open."""

DIRECT_BYTES = 1 << 20
"""Files below this size go through the page cache."""

SYNC_BYTES = 64 << 20
"""Files from this size on are synced when they are closed, so that the last sync of all has little left to do.

To sync each of many smaller ones takes several times as long as to sync them together."""

AHEAD_BYTES = 128 << 20
"""After so many bytes in small files a sync is begun beside the work."""

_ALIGNMENT = 4096
_MODE = 0o666


class LocalTarget:
    """Files beneath a local folder, which exists.

    Large files go past the page cache, which only slows a copy of data that nobody reads again soon.  Each is synced
    when it is closed; what is smaller becomes durable with `sync`.
    """

    def __init__(self, folder: Path, shown: str | None = None) -> None:
        self.folder = folder
        self._shown = shown or str(folder)
        self._made: set[str] = set()
        self._lock = threading.Lock()
        self._unsynced_bytes = 0
        self._syncing: threading.Thread | None = None
        self._failed: list[CheckpointError] = []

    @property
    def root(self) -> str:
        return self._shown

    def local_path(self, path: str) -> str | None:
        return os.path.join(self.folder, beneath(path))

    def create(self, path: str) -> AbstractContextManager[Sink]:
        return self._create(os.path.join(self.folder, beneath(path)))

    def put(self, path: str, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        if len(view) >= DIRECT_BYTES:
            with self.create(path) as sink:
                sink.write(view)
            return
        full, size_bytes = os.path.join(self.folder, beneath(path)), len(view)
        try:
            self._make_parent(full)
            fd = os.open(full, _FLAGS, _MODE)
            try:
                while len(view):
                    done = os.write(fd, view)
                    if done <= 0:
                        raise StorageFailed(f"cannot write {full}: the file system accepts no bytes; free some space")
                    view = view[done:]
            finally:
                os.close(fd)
        except OSError as error:
            raise storage_failed("write", full, error) from error
        self._sync_ahead(size_bytes)

    def _sync_ahead(self, size_bytes: int) -> None:
        """Let what was put reach the disk while more is made: the last sync would have to wait for all of it."""
        with self._lock:
            self._unsynced_bytes += size_bytes
            if self._unsynced_bytes < AHEAD_BYTES or (self._syncing is not None and self._syncing.is_alive()):
                return
            self._unsynced_bytes = 0
            self._syncing = threading.Thread(target=self._sync_aside, name="ckptengine-sync", daemon=True)
            self._syncing.start()

    def _sync_aside(self) -> None:
        try:
            self._syncfs()
        except CheckpointError as error:
            self._failed.append(error)  # told by `sync`

    def _syncfs(self) -> bool:
        fd = guarded("open", self.folder, lambda: os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            return _syncfs(fd)
        finally:
            os.close(fd)

    def _make_parent(self, full: str) -> None:
        parent = full.rpartition("/")[0]
        if parent in self._made:  # asking the file system again costs more than a small file
            return
        if parent.rpartition("/")[0] in self._made:
            with contextlib.suppress(FileExistsError):
                os.mkdir(parent)
        else:
            os.makedirs(parent, exist_ok=True)
            self._made.add(parent.rpartition("/")[0])
        self._made.add(parent)

    @contextlib.contextmanager
    def _create(self, full: str) -> Iterator[Sink]:
        guarded("create", full, lambda: self._make_parent(full))
        sink = LocalSink(full)
        try:
            yield sink
            sink.finish()
        finally:
            sink.close()

    def sync(self) -> None:
        """Make every file and name below the folder durable."""
        if self._syncing is not None:
            self._syncing.join()
        if self._failed:
            raise self._failed[0]
        if self._syncfs():
            return
        for folder, _, names in os.walk(self.folder, topdown=False):
            for name in [*names, "."]:
                _fsync(os.path.join(folder, name))


class LocalSink:
    """One local file, appended through an aligned buffer; direct once it has grown beyond `DIRECT_BYTES`."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._fd = guarded("create", path, lambda: os.open(path, _FLAGS, _MODE))
        self._buffer: mmap.mmap | None = None
        self._small = bytearray()
        self._filled = 0
        self._flushed = 0
        self._direct = False

    @property
    def position(self) -> int:
        return self._flushed + (self._filled if self._buffer is not None else len(self._small))

    def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        if self._buffer is None:
            if len(self._small) + len(view) < DIRECT_BYTES:
                self._small += view
                return
            self._buffer = buffers.take(BUFFER_BYTES)
            self._direct = _set_direct(self._fd, True)
            small, self._small = self._small, bytearray()
            self.write(small)
        view = view[self._write_in_place(view) :]
        while len(view):
            part = min(len(view), BUFFER_BYTES - self._filled)
            with memoryview(self._buffer) as whole:
                buffers.copy(whole[self._filled : self._filled + part], view[:part])
            self._filled += part
            view = view[part:]
            if self._filled == BUFFER_BYTES:
                self._flush(BUFFER_BYTES)
                self._filled = 0

    def _write_in_place(self, view: memoryview) -> int:
        """Write what needs no buffer: whole pages at an aligned address, while nothing waits in the buffer."""
        pages = len(view) // _ALIGNMENT * _ALIGNMENT
        if pages < DIRECT_BYTES or self._filled or not self._direct or self._flushed % _ALIGNMENT:
            return 0
        if np.frombuffer(view, np.uint8).ctypes.data % _ALIGNMENT:
            return 0
        self._write_all(view[:pages])
        return pages

    def _flush(self, nbytes: int) -> None:
        assert self._buffer is not None
        with memoryview(self._buffer) as whole:
            self._write_all(whole[:nbytes])

    def _write_all(self, view: memoryview) -> None:
        while len(view):
            try:
                done = os.write(self._fd, view)
            except OSError as error:
                if error.errno == errno.EINVAL and self._direct:  # this file system takes no direct write of this kind
                    self._direct = _set_direct(self._fd, False)
                    continue
                guarded("write", self._path, lambda error=error: _raise(error))  # type: ignore[misc]
            if done <= 0:
                raise StorageFailed(f"cannot write {self._path}: the file system accepts no bytes; free some space")
            self._flushed += done
            view = view[done:]
            if self._direct and done % _ALIGNMENT:  # a short write left an offset that direct I/O refuses
                self._direct = _set_direct(self._fd, False)

    def finish(self) -> None:
        """Write what is left; large files are synced."""
        if self._buffer is None:
            self._write_all(memoryview(self._small))
            self._small = bytearray()
            return
        aligned = self._filled // _ALIGNMENT * _ALIGNMENT
        self._flush(aligned)
        if self._direct:
            self._direct = _set_direct(self._fd, False)
        with memoryview(self._buffer) as whole:
            self._write_all(whole[aligned : self._filled])
        self._filled = 0
        if self._flushed >= SYNC_BYTES:
            guarded("sync", self._path, lambda: os.fdatasync(self._fd))

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
            if self._buffer is not None:
                buffers.give(self._buffer)
                self._buffer = None


_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW


def _raise(error: OSError) -> None:
    raise error


def _set_direct(fd: int, on: bool) -> bool:
    """Switch direct I/O of an open file; returns whether it is on."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | direct if on else flags & ~direct)
    except OSError:
        return False
    return on and bool(direct)


def _syncfs(fd: int) -> bool:
    """Sync the whole file system of a descriptor; False where the system has no such call."""
    try:
        call = ctypes.CDLL(None, use_errno=True).syncfs
    except (AttributeError, OSError):
        return False
    if call(fd) == 0:
        return True
    code = ctypes.get_errno()
    raise StorageFailed(f"cannot sync the target: {os.strerror(code)}; nothing was committed, check the device")


def _fsync(path: str) -> None:
    fd = guarded("open", path, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    try:
        guarded("sync", path, lambda: os.fsync(fd))
    finally:
        os.close(fd)


class RemoteTarget:
    """Files beneath an fsspec URL.  There is no rename: what makes the target a checkpoint must be written last."""

    def __init__(self, system: Any, base: str, shown: str) -> None:
        self.system = system
        self.base = base.rstrip("/")
        self._shown = shown

    @classmethod
    def from_url(cls, url: str) -> RemoteTarget:
        """Open ``protocol://...`` for writing; the protocol's own package must be installed."""
        import fsspec  # only URLs need it

        shown = redacted_url(url)
        try:
            bare, carried = for_fsspec(url)
            system, base = fsspec.core.url_to_fs(bare, **carried)
        except Exception as error:  # any file system may raise anything here, credentials in the text included
            raise StorageFailed(f"cannot open {shown} for writing: {type(error).__name__}") from None
        return cls(system, str(base), shown)

    @property
    def root(self) -> str:
        return self._shown

    def local_path(self, path: str) -> str | None:
        return None

    def create(self, path: str) -> AbstractContextManager[Sink]:
        return self._create(beneath(path))

    def put(self, path: str, data: bytes | bytearray | memoryview) -> None:
        with self.create(path) as sink:
            sink.write(data)

    @contextlib.contextmanager
    def _create(self, path: str) -> Iterator[Sink]:
        full = posixpath.join(self.base, path)
        with self.errors(path):
            self.system.makedirs(posixpath.dirname(full), exist_ok=True)
            stream = self.system.open(full, "wb")
        sink = _StreamSink(stream, self, path)
        try:
            yield sink
        except BaseException:
            _abandon(stream)
            raise
        with self.errors(path):
            stream.close()

    @contextlib.contextmanager
    def errors(self, path: str) -> Iterator[None]:
        """Turn what a file system raises into `StorageFailed`, without its text, which may hold credentials."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            raise StorageFailed(
                f"cannot write {self._shown.rstrip('/')}/{path}: {type(error).__name__}; check the credentials, the "
                "connection and the free space there"
            ) from None

    def sync(self) -> None:
        """Objects are durable when their upload has ended."""


class _StreamSink:
    def __init__(self, stream: Any, target: RemoteTarget, path: str) -> None:
        self._stream, self._target, self._path = stream, target, path
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        with self._target.errors(self._path):
            self._stream.write(bytes(view))
        self._position += len(view)


def _abandon(stream: Any) -> None:
    """Give an upload up without publishing it, where the file system can."""
    with contextlib.suppress(Exception):
        stream.discard()
