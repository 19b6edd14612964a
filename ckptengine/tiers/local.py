"""A directory as a tier: a node's own disk or a mounted network file system.

Publishing is: a temporary name, fsync, a hard link to the final name (which fails where that exists), fsync of the
directory, and of its parent where the directory is new.  Names are resolved beneath the root, one component at a time,
without following links.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import secrets
import stat as stat_bits
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar, cast

try:
    import aiofiles
except ImportError:  # an extra: without it large reads hold a thread each, as small ones do
    aiofiles = None  # type: ignore[assignment]

from ckptengine.errors import NotFound, StorageFailed, UnusableRequest
from ckptengine.tiers.cancelling import unbroken
from ckptengine.tiers.local_files import (
    NO_LINKS,
    allocate,
    exists,
    links_work,
    make_root,
    too_short,
    walk,
    write_all,
)
from ckptengine.tiers.mounts import is_volatile
from ckptengine.tiers.port import PARTIAL, Abilities, Bytes, Entry, Receipt, Spare, check_name, check_range, nothing
from ckptengine.tiers.refusals import refusals

T = TypeVar("T")

_TRIES = 4
_SMALL_BYTES = 1 << 20
"""Up to this size one read in one thread is cheaper than an asynchronous file."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_UNPUBLISHED = re.compile(re.escape(PARTIAL) + r"[0-9a-f]{16}-(.+)|\.(.+)\.\d+\.tmp|\.drain-[0-9a-f]{8}-(.+)\.log")
"""Temporaries of this module and of the store, and what a drain noted of what it has sent."""


class LocalTier:
    """Objects as files under ``root``, which is created (with its parents) when the tier is opened for writing.

    ``file_mode`` and ``directory_mode``: permissions of what is created; None leaves them to the umask.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        file_mode: int | None = None,
        directory_mode: int | None = None,
        create: bool = True,
    ) -> None:
        self.root = Path(os.path.abspath(os.fspath(root)))
        self._file_mode = file_mode
        self._directory_mode = directory_mode
        if create:
            with refusals("create directory", str(self.root)):
                make_root(self.root, directory_mode)
        lasting = not is_volatile(self.root)
        self._abilities = Abilities(
            atomic_rename=True,
            conditional_put=create and links_work(self.root),
            append=True,
            ranged_read=True,
            resumable_parts=True,
            survives_process=True,
            survives_power_cut=lasting,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.root)!r})"

    @property
    def label(self) -> str:
        return str(self.root)

    @property
    def abilities(self) -> Abilities:
        return self._abilities

    def local_path(self, name: str) -> Path:
        """Where an object lies as a file, for readers and writers that go to the file system directly."""
        return self.root / check_name(name)

    # -- reading ------------------------------------------------------------------------------------------------------

    async def entries(self, prefix: str = "") -> list[Entry]:
        return await asyncio.to_thread(self._list, prefix)

    def _list(self, prefix: str) -> list[Entry]:
        start = self.root / check_name(prefix.rpartition("/")[0]) if "/" in prefix else self.root
        with refusals("list", str(start)):
            found = sorted(walk(start, self.root))
        return [Entry(name, size) for name, size in found if name.startswith(prefix)]

    async def stat(self, name: str) -> Entry | None:
        return await asyncio.to_thread(self._stat, name)

    def _stat(self, name: str) -> Entry | None:
        try:
            with refusals("look at", f"{self.root}/{name}"), self._directory_of(name) as (directory, base):
                found = os.stat(base, dir_fd=directory, follow_symlinks=False)
        except NotFound:
            return None
        return Entry(name, found.st_size) if stat_bits.S_ISREG(found.st_mode) else None

    async def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        check_range(name, offset, size_bytes)
        entry = await self.stat(name)
        if entry is not None and entry.size_bytes < offset + size_bytes:
            raise too_short(self.label, name, offset, size_bytes)  # before anything of a wild size is allocated
        if aiofiles is None or size_bytes <= _SMALL_BYTES:
            with refusals("read", f"{self.root}/{name}"):
                return await asyncio.to_thread(self._read, name, offset, size_bytes)
        pieces: list[bytes] = []

        async def fill() -> None:
            async with aiofiles.open(str(self.root / name), "rb", buffering=0, opener=self._opener(name)) as file:
                await file.seek(offset)
                missing = size_bytes
                while missing:
                    piece = await file.read(missing)
                    if not piece:
                        raise too_short(self.label, name, offset, size_bytes)
                    pieces.append(piece)
                    missing -= len(piece)

        with refusals("read", f"{self.root}/{name}"):
            await unbroken(fill())
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read_into(self, name: str, offset: int, view: memoryview) -> None:
        check_range(name, offset, 0)
        if aiofiles is None:
            view.cast("B")[:] = await self.read(name, offset, view.nbytes)
            return

        async def fill() -> None:
            rest = view.cast("B")
            async with aiofiles.open(str(self.root / name), "rb", buffering=0, opener=self._opener(name)) as file:
                await file.seek(offset)
                while len(rest):
                    got = await file.readinto(rest)
                    if not got:
                        raise too_short(self.label, name, offset, len(view))
                    rest = rest[got:]

        with refusals("read", f"{self.root}/{name}"):
            await unbroken(fill())

    def _read(self, name: str, offset: int, size_bytes: int) -> bytes:
        fd = self._opener(name)("", os.O_RDONLY)
        try:
            data = b""
            while more := os.pread(fd, size_bytes - len(data), offset + len(data)):
                data += more
        finally:
            os.close(fd)
        if len(data) < size_bytes:
            raise too_short(self.label, name, offset, size_bytes)
        return data

    def _opener(self, name: str) -> Any:
        def opener(_: str, flags: int) -> int:
            with self._directory_of(name) as (directory, base):
                fd = os.open(base, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
            if not stat_bits.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise OSError(errno.ELOOP, "not a regular file")
            return fd

        return opener

    # -- writing ------------------------------------------------------------------------------------------------------

    async def create(self, name: str, data: Bytes) -> None:
        await asyncio.to_thread(self._create, name, data)

    def _create(self, name: str, data: Bytes) -> None:
        with refusals("write", f"{self.root}/{name}"):
            self._insist(lambda: self._create_once(name, data))

    def _insist(self, work: Callable[[], T]) -> T:
        """``work`` again where the directory that it made went before it was used: a sweep removes empty ones."""
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):
                return work()
        return work()

    def _create_once(self, name: str, data: Bytes) -> None:
        with self._directory_of(name, create=True) as (directory, base):
            partial = f"{PARTIAL}{secrets.token_hex(8)}-{base}"
            fd = self._open_new(partial, directory)
            try:
                with os.fdopen(fd, "wb", buffering=0) as file:
                    write_all(file, data, 0)
                    self._sync(file.fileno())
                self._publish(directory, partial, base)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(partial, dir_fd=directory)
            self._sync(directory)

    async def upload(self, name: str, size_bytes: int, part_bytes: int, token: str | None = None) -> LocalUpload:
        check_name(name)
        started: list[LocalUpload] = []

        async def start() -> None:
            started.append(await asyncio.to_thread(self._upload, name, size_bytes, part_bytes, token))

        try:
            await unbroken(start())
        except asyncio.CancelledError:
            for upload in started:
                await upload.release()
            raise
        return started[0]

    def _upload(self, name: str, size_bytes: int, part_bytes: int, token: str | None) -> LocalUpload:
        with refusals("write", f"{self.root}/{name}"):
            return self._insist(lambda: self._upload_once(name, size_bytes, part_bytes, token))

    def _upload_once(self, name: str, size_bytes: int, part_bytes: int, token: str | None) -> LocalUpload:
        with self._directory_of(name, create=True) as (directory, base):
            if token is None:
                token = f"{PARTIAL}{secrets.token_hex(8)}-{base}"
                fd = self._open_new(token, directory)
                try:
                    allocate(fd, size_bytes)
                except OSError:
                    os.close(fd)
                    os.unlink(token, dir_fd=directory)
                    raise
            else:
                if not token.startswith(PARTIAL) or not token.endswith(f"-{base}") or "/" in token:
                    raise UnusableRequest(f"{token!r} does not name an unfinished upload of {name}")
                try:
                    fd = os.open(token, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
                except FileNotFoundError:
                    raise NotFound(f"the unfinished upload of {name} is gone; start anew") from None
                if os.fstat(fd).st_size != size_bytes:
                    os.close(fd)
                    os.unlink(token, dir_fd=directory)
                    raise NotFound(f"the unfinished upload of {name} has another size than the object; start anew")
        return LocalUpload(self, name, token, fd, size_bytes, part_bytes)

    def finish_upload(self, name: str, token: str, fd: int) -> None:
        """Make the data safe, then give it its name.  After a failed flush the data counts as lost, for good."""
        with refusals("write", f"{self.root}/{name}"), self._directory_of(name) as (directory, base):
            try:
                self._sync(fd)
            except OSError:
                os.unlink(token, dir_fd=directory)
                raise
            self._publish(directory, token, base)
            with suppress(FileNotFoundError):
                os.unlink(token, dir_fd=directory)
            self._sync(directory)

    def drop_upload(self, name: str, token: str) -> None:
        with refusals("remove", f"{self.root}/{name}"), suppress(FileNotFoundError), self._directory_of(name) as found:
            os.unlink(token, dir_fd=found[0])

    async def delete(self, name: str) -> None:
        await asyncio.to_thread(self._delete, name)

    def _delete(self, name: str) -> None:
        with refusals("remove", f"{self.root}/{name}"), suppress(FileNotFoundError):
            with self._directory_of(name) as (directory, base):
                os.unlink(base, dir_fd=directory)
                self._sync(directory)
            self._drop_if_empty(name)

    async def sweep(self, prefix: str, spare: Spare = nothing) -> list[str]:
        return await asyncio.to_thread(self._sweep, prefix, spare)

    def _sweep(self, prefix: str, spare: Spare) -> list[str]:
        removed: list[str] = []
        with refusals("sweep", str(self.root)):
            for name, _ in list(walk(self.root, self.root, hidden=True)):
                folder, slash, base = name.rpartition("/")
                target = _UNPUBLISHED.fullmatch(base)
                object_name = folder + slash + (target[1] or target[2] or target[3]) if target else ""
                if target and object_name.startswith(prefix) and not spare(object_name):
                    os.unlink(self.root / name)
                    removed.append(name)
            for folder, _, _ in os.walk(self.root, topdown=False):
                relative = os.path.relpath(folder, self.root)
                if relative != "." and (relative + "/").startswith(prefix or relative):
                    self._drop_if_empty(f"{relative}/x")
        return sorted(removed)

    async def close(self) -> None:
        return None

    # -- file system --------------------------------------------------------------------------------------------------

    def _sync(self, fd: int) -> None:
        os.fsync(fd)

    def _open_new(self, base: str, directory: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(base, flags, 0o666 if self._file_mode is None else self._file_mode, dir_fd=directory)

    def _publish(self, directory: int, partial: str, base: str) -> None:
        try:
            os.link(partial, base, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        except OSError as refusal:
            if refusal.errno not in NO_LINKS:
                raise
            # No hard links here: look, then rename.  Two writers of one name could both pass, hence not conditional.
            if exists(base, directory):
                raise FileExistsError(errno.EEXIST, "exists", base) from refusal
            os.rename(partial, base, src_dir_fd=directory, dst_dir_fd=directory)

    def _drop_if_empty(self, name: str) -> None:
        folder = (self.root / name).parent
        if folder == self.root:
            return
        try:
            os.rmdir(folder)
        except OSError as refusal:
            if refusal.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise

    @contextmanager
    def _directory_of(self, name: str, *, create: bool = False) -> Iterator[tuple[int, str]]:
        """The open directory of ``name`` and its last component; parents are created durably where asked for."""
        *folders, base = check_name(name).split("/")
        current = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for folder in folders:
                if create:
                    with suppress(FileExistsError):
                        mode = 0o777 if self._directory_mode is None else self._directory_mode
                        os.mkdir(folder, mode, dir_fd=current)
                        self._sync(current)
                below = os.open(folder, _DIRECTORY, dir_fd=current)
                os.close(current)
                current = below
            yield current, base
        finally:
            os.close(current)


class LocalUpload:
    """A file under a temporary name, written part by part in any order."""

    def __init__(self, tier: LocalTier, name: str, token: str, fd: int, size_bytes: int, part_bytes: int) -> None:
        self.token = token
        self._tier = tier
        self._name = name
        self._file: IO[bytes] | None = cast("IO[bytes]", os.fdopen(fd, "r+b", buffering=0))
        self._size_bytes = size_bytes
        self._part_bytes = part_bytes

    async def put(self, part: int, data: Bytes) -> Receipt:
        offset = part * self._part_bytes
        if part < 0 or offset + len(data) > self._size_bytes:
            raise UnusableRequest(f"part {part} of {self._name} lies outside its {self._size_bytes} bytes")
        with refusals("write", f"{self._tier.label}/{self._name}"):
            await asyncio.to_thread(write_all, self._open_file(), data, offset)
        return Receipt()

    async def finish(self, receipts: Mapping[int, Receipt]) -> None:
        file = self._open_file()
        wanted = -(-self._size_bytes // self._part_bytes)
        if sorted(receipts) != list(range(wanted)):
            raise UnusableRequest(f"{self._name} has {len(receipts)} of its {wanted} parts; it cannot be finished")
        try:
            await asyncio.to_thread(self._tier.finish_upload, self._name, self.token, file.fileno())
        finally:
            await self.release()

    async def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    async def abort(self) -> None:
        await self.release()
        await asyncio.to_thread(self._tier.drop_upload, self._name, self.token)

    def _open_file(self) -> IO[bytes]:
        if self._file is None:
            raise StorageFailed(f"the upload of {self._name} has ended; begin another one")
        return self._file
