"""Zips as torch.save writes them, appended to a sink in one pass: records are streamed, their CRC follows them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from ckptengine.sources.writer import Sink

ALIGNMENT = 64
PREFIX = "archive/"
_FLAGS = 0x0808  # sizes and CRC follow the data; names are UTF-8
_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LARGE = 0xFFFFFFFF
_CRC_IN_DESCRIPTOR = 4
_CRC_IN_ENTRY = 16


@dataclass(frozen=True, slots=True)
class _Written:
    name: bytes
    header: int
    nbytes: int
    crc32: int


class ZipWriter:
    """One zip that begins at the sink's position.

    Each record is either given whole to `add`, or begun with `begin`, filled with `write` and closed by the next call.
    The data of every record begins at a multiple of `ALIGNMENT` from the zip's first byte.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._start = sink.position
        self._written: list[_Written] = []
        self._open: tuple[bytes, int, int] | None = None
        self._crc32 = 0

    def add(self, name: str, data: bytes) -> None:
        """A whole record."""
        self.begin(name)
        self.write(memoryview(data))

    def begin(self, name: str) -> None:
        """Begin a record; the one before it ends."""
        self._end()
        encoded = (PREFIX + name).encode()
        header = self._sink.position - self._start
        room = -(header + _LOCAL.size + len(encoded) + 4) % ALIGNMENT
        padding = b"FB" + struct.pack("<H", room) + b"Z" * room  # an extra field, as torch pads
        fields = (b"PK\x03\x04", 0, _FLAGS, 0, 0, 0, 0, 0, 0, len(encoded), len(padding))
        self._sink.write(_LOCAL.pack(*fields) + encoded + padding)
        self._open = (encoded, header, self._sink.position)
        self._crc32 = 0

    def write(self, data: memoryview) -> None:
        """Append to the record that was begun."""
        self._crc32 = zlib.crc32(data, self._crc32)
        self._sink.write(data)

    def _end(self) -> None:
        if self._open is None:
            return
        name, header, first = self._open
        nbytes = self._sink.position - first
        sizes = struct.pack("<QQ" if nbytes >= _LARGE else "<II", nbytes, nbytes)
        self._sink.write(b"PK\x07\x08" + struct.pack("<I", self._crc32) + sizes)
        self._written.append(_Written(name, header, nbytes, self._crc32))
        self._open = None

    def finish(self) -> None:
        """Write the directory that ends the zip."""
        self._end()
        first = self._sink.position - self._start
        for record in self._written:
            self._sink.write(_directory_entry(record))
        nbytes = self._sink.position - self._start - first
        self._sink.write(_end_records(len(self._written), first, nbytes))


class ZipForm:
    """Everything of a zip of given small records and one large one at its end but that one's data and CRC.

    Thousands of tensors of one shape and type have the same form, and making it takes longer than copying a small
    tensor: so it is made once, and begins with ``head``; then come the data, and then `tail`.
    """

    def __init__(self, small: Mapping[str, bytes], name: str, nbytes: int) -> None:
        sink = _Kept()
        zipped = ZipWriter(sink)
        for record, data in small.items():
            zipped.add(record, data)
        zipped.begin(name)
        self.head = bytes(sink.data)
        sink.data.clear()
        sink.position += nbytes
        zipped.finish()
        self._tail = bytes(sink.data)
        descriptor_bytes = 24 if nbytes >= _LARGE else 16
        before = sum(len(_directory_entry(record)) for record in zipped._written[:-1])
        self._entry = descriptor_bytes + before + _CRC_IN_ENTRY
        self.nbytes = len(self.head) + nbytes + len(self._tail)

    def tail(self, crc32: int) -> bytes:
        """What follows the data whose CRC this is."""
        data = bytearray(self._tail)
        struct.pack_into("<I", data, _CRC_IN_DESCRIPTOR, crc32)
        struct.pack_into("<I", data, self._entry, crc32)
        return bytes(data)


def _directory_entry(record: _Written) -> bytes:
    extra = b""
    if record.nbytes >= _LARGE:
        extra += struct.pack("<QQ", record.nbytes, record.nbytes)
    if record.header >= _LARGE:
        extra += struct.pack("<Q", record.header)
    if extra:
        extra = struct.pack("<HH", 1, len(extra)) + extra
    nbytes, header = min(record.nbytes, _LARGE), min(record.header, _LARGE)
    fields = (b"PK\x01\x02", 0, 0, _FLAGS, 0, 0, 0, record.crc32, nbytes, nbytes, len(record.name), len(extra))
    return _ENTRY.pack(*fields, 0, 0, 0, 0, header) + record.name + extra


def _end_records(count: int, first: int, nbytes: int) -> bytes:
    wide = b""
    if count >= 0xFFFF or first >= _LARGE or nbytes >= _LARGE:
        wide = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, nbytes, first)
        wide += b"PK\x06\x07" + struct.pack("<IQI", 0, first + nbytes, 1)
    counts = struct.pack("<4HIIH", 0, 0, *(min(count, 0xFFFF),) * 2, min(nbytes, _LARGE), min(first, _LARGE), 0)
    return wide + b"PK\x05\x06" + counts


def zip_bytes(names: list[str], nbytes: list[int]) -> int:
    """The size of a zip of these records."""
    sink = _Counter()
    zipped = ZipWriter(sink)
    for name, size in zip(names, nbytes, strict=True):
        zipped.begin(name)
        sink.position += size
    zipped.finish()
    return sink.position


class _Counter:
    """A sink that only counts."""

    def __init__(self) -> None:
        self.position = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.position += len(data)


class _Kept:
    """A sink in memory."""

    def __init__(self) -> None:
        self.position = 0
        self.data = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.position += len(data)
        self.data += data
