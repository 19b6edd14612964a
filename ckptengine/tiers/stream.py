"""Uploads where parts cannot be addressed: one stream, parts in order, from the start again after a kill."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any, Protocol

from fsspec.spec import AbstractBufferedFile

from ckptengine.errors import AlreadyExists, StorageFailed, UnusableRequest
from ckptengine.tiers.port import Bytes, Entry, Receipt


class StreamPlace(Protocol):
    """What this module needs of `ckptengine.tiers.remote.RemoteTier`."""

    fs: Any

    @property
    def label(self) -> str: ...
    async def stat(self, name: str) -> Entry | None: ...
    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any: ...
    async def guard(self, action: str, name: str, attempt: Any) -> Any: ...


class StreamUpload:
    """An fsspec file object fed in a thread; parts that come early wait for their turn."""

    token = ""

    def __init__(self, tier: StreamPlace, name: str, path: str, partial: str, size_bytes: int, part_bytes: int) -> None:
        self._tier = tier
        self._name = name
        self._path = path
        self._partial = partial
        self._parts = -(-size_bytes // part_bytes)
        self._part_bytes = part_bytes
        self._next = 0
        self._turn = asyncio.Condition()
        self._file: Any = None
        self._failed = False
        self._published = False

    async def put(self, part: int, data: Bytes) -> Receipt:
        if not 0 <= part < self._parts:
            raise UnusableRequest(f"part {part} of {self._name} lies outside its {self._parts} parts")
        async with self._turn:
            await self._turn.wait_for(lambda: self._failed or self._next >= part)
            if self._failed or self._next > part:
                raise StorageFailed(f"the stream to {self._tier.label}/{self._name} broke; send it again")
            try:
                await self._tier.guard("write", self._name, lambda _: asyncio.to_thread(self._write, data))
                self._next += 1
            except BaseException:
                self._failed = True
                raise
            finally:
                self._turn.notify_all()
        return Receipt()

    def _write(self, data: Bytes) -> None:
        if self._file is None:
            self._file = self._tier.fs.open(self._partial, "wb", block_size=self._part_bytes)
        try:
            self._file.write(data)
        except Exception as error:
            # A stream that may have taken half of it cannot take it again.
            raise _Broken(f"{type(error).__name__}: {error}") from None

    async def finish(self, receipts: Mapping[int, Receipt]) -> None:
        if self._next != self._parts or len(receipts) != self._parts:
            raise UnusableRequest(f"{self._name} has {self._next} of its {self._parts} parts; it cannot be finished")
        if await self._tier.stat(self._name) is not None:
            raise AlreadyExists(f"{self._tier.label}/{self._name} exists already and is never overwritten")
        await self._tier.guard("write", self._name, lambda _: asyncio.to_thread(self._close))
        if self._partial != self._path:
            await self._tier.guard("publish", self._name, lambda _: self._tier.call("mv", self._partial, self._path))
        self._published = True

    def _close(self) -> None:
        if self._file is None:
            self._file = self._tier.fs.open(self._partial, "wb", block_size=self._part_bytes)
        self._file.close()

    async def release(self) -> None:
        await self.abort()

    async def abort(self) -> None:
        file, self._file = self._file, None
        self._failed = True
        if file is not None and not self._published:
            try:
                await self._tier.guard("give up", self._name, lambda _: asyncio.to_thread(_discard, file))
            finally:
                if self._partial != self._path:
                    await self._tier.guard("remove", self._name, lambda _: self._drop_partial())

    async def _drop_partial(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # some file systems show nothing before it is closed
            await self._tier.call("rm_file", self._partial)


class _Broken(Exception):
    """A stream in an unknown state."""


def _discard(file: Any) -> None:
    """Let go of a stream without publishing what it took."""
    if isinstance(file, AbstractBufferedFile):
        try:
            file.discard()
        finally:
            file.closed = True  # its destructor would publish otherwise
    else:
        file.close()
