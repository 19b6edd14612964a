"""The body of one part on its way to S3, sent from where it lies without a copy.

botocore sees a file, aiohttp a payload of its own.  (A ``BytesIO`` would be copied whole by aiohttp, plain bytes block
its loop, and any other file is read in a thread by 64 KiB.)
"""

from __future__ import annotations

from typing import Any

from aiohttp.payload import Payload, register_payload

_PIECE_BYTES = 256 << 10


class PartBody:
    """A read-only file over a block of memory."""

    def __init__(self, data: bytes) -> None:
        self.view = memoryview(data)
        self._position = 0

    def __len__(self) -> int:
        return len(self.view)

    def read(self, size: int = -1) -> bytes:
        end = len(self.view) if size is None or size < 0 else self._position + size
        piece = bytes(self.view[self._position : end])
        self._position += len(piece)
        return piece

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, len(self.view))[whence]
        return self._position

    def tell(self) -> int:
        return self._position


class PartPayload(Payload):
    """A `PartBody` for aiohttp."""

    _value: PartBody

    def __init__(self, value: PartBody, *args: Any, **kwargs: Any) -> None:
        super().__init__(value, *args, **kwargs)
        self._size = len(value)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return bytes(self._value.view).decode(encoding, errors)

    async def write(self, writer: Any) -> None:
        await self.write_with_length(writer, None)

    async def write_with_length(self, writer: Any, content_length: int | None) -> None:
        size_bytes = len(self._value) if content_length is None else min(content_length, len(self._value))
        for start in range(0, size_bytes, _PIECE_BYTES):
            await writer.write(self._value.view[start : min(start + _PIECE_BYTES, size_bytes)])


class Changeling(PartBody):
    """A body that is signed as one thing and sent as another, to find out whether a server compares the two."""

    def __init__(self, signed: bytes, sent: bytes) -> None:
        super().__init__(sent)
        self._signed = signed

    def read(self, size: int = -1) -> bytes:
        del size
        piece, self._signed = self._signed, b""
        return piece


register_payload(PartPayload, PartBody)
