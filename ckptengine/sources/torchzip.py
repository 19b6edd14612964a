"""Files of torch.save, read by range: the pickle is parsed, tensor bytes stay where they are.

The current format is a zip whose entries are stored uncompressed; it may lie anywhere in a larger file, as torch DCP's
items do.  The format of torch before 1.6 (a row of pickles, then raw storages) is read as well.
"""

from __future__ import annotations

import bisect
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ckptengine.errors import CheckpointError, Damaged, DigestMismatch, NotFound, Truncated, UnreadableFormat
from ckptengine.layout.dtypes import itemsize
from ckptengine.sources.pickle_scan import end_of_pickle
from ckptengine.sources.port import Files
from ckptengine.sources.stored import StoredStorage, plain_storage
from ckptengine.sources.unpickle import MAX_PICKLE_BYTES, StorageType, loads, unknown_storage

_END = b"PK\x05\x06"
_END64 = b"PK\x06\x06"
_LOCATOR64 = b"PK\x06\x07"
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_WINDOW_BYTES = 1 << 12
_CHUNK_BYTES = 4 << 20
_MAX_COMMENT_BYTES = 1 << 16
UNKNOWN = "unknown"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_STEP_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of a zip: the absolute offset of its local header, the bytes of its data, their CRC-32.

    ``altered``: it is compressed or encrypted.
    """

    header: int
    nbytes: int
    crc32: int
    altered: bool


class TorchZip:
    """A zip of torch.save at ``offset`` of a file (``nbytes`` long; default: the rest of the file).

    Raises `UnreadableFormat` for a zip that is not torch's, `Truncated` or `Damaged` for a broken one.
    """

    def __init__(self, files: Files, path: str, offset: int = 0, nbytes: int | None = None) -> None:
        self.files = files
        self.path = path
        self._start = offset
        self._nbytes = files.size(path) - offset if nbytes is None else nbytes
        self._end = self._start + self._nbytes
        self._offsets: dict[str, int] = {}
        self._windows: list[tuple[int, bytes]] = []
        self.entries = self._read_directory()
        self._headers = sorted(entry.header for entry in self.entries.values())
        pickles = [name for name in self.entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UnreadableFormat(f"{self.shown} is a zip, but not one of torch.save (no data.pkl)")
        self._prefix = pickles[0][: -len("data.pkl")]
        if self.has("constants.pkl"):
            raise UnreadableFormat(f"{self.shown} is a TorchScript program, not a checkpoint; save its state_dict")
        self._check_byte_order()

    @property
    def shown(self) -> str:
        """The file for error messages."""
        where = f" at byte {self._start}" if self._start else ""
        return f"{self.files.root.rstrip('/')}/{self.path}{where}"

    def record(self, name: str) -> bytes:
        """The bytes of a small record such as ``data.pkl``."""
        entry = self._entry(name)
        if entry.nbytes > MAX_PICKLE_BYTES:
            raise UnreadableFormat(
                f"record {name!r} of {self.shown} has {entry.nbytes} bytes, too many to read at once"
            )
        data = self._read(self.data_offset(name), entry.nbytes)
        if self.has_checksums and zlib.crc32(data) != entry.crc32:
            raise self._mismatch(self._prefix + name, zlib.crc32(data))
        return data

    @property
    def has_checksums(self) -> bool:
        """Whether the CRC-32 of records was computed; torch can leave it out, and writes zeros then."""
        return any(entry.crc32 for entry in self.entries.values())

    def damaged_records(self, read: Callable[[int], None] = lambda nbytes: None) -> Iterator[CheckpointError]:
        """Every record whose bytes are not those of its CRC-32, which nothing else that reads tensors looks at.

        ``read`` is told how many bytes have been read.  Bounded memory.
        """
        buffer, total = memoryview(bytearray(min(_CHUNK_BYTES, self._nbytes))), 0
        for name, entry in self.entries.items() if self.has_checksums else ():
            if entry.altered or not name.startswith(self._prefix):
                continue
            try:
                start, found = self.data_offset(name[len(self._prefix) :]), 0
                for done in range(0, entry.nbytes, _CHUNK_BYTES):
                    view = buffer[: min(_CHUNK_BYTES, entry.nbytes - done)]
                    self.files.read_into(self.path, start + done, view)
                    found = zlib.crc32(view, found)
                    total += len(view)
                    read(total)
            except CheckpointError as error:
                yield error
                continue
            if found != entry.crc32:
                yield self._mismatch(name, found)

    def _mismatch(self, name: str, found: int) -> DigestMismatch:
        recorded = self.entries[name].crc32
        return DigestMismatch(
            f"record {name!r} of {self.shown} has the CRC-32 {found:08x}, {recorded:08x} was recorded: it is damaged; "
            "fetch the file again"
        )

    def has(self, name: str) -> bool:
        """Whether there is such a record."""
        return self._prefix + name in self.entries

    def data_offset(self, name: str) -> int:
        """The absolute offset of a record's data in the file (reads the record's local header once)."""
        if name not in self._offsets:
            entry = self._entry(name)
            called = (self._prefix + name).encode("utf-8", "surrogateescape")
            if entry.header + _LOCAL.size + len(called) > self._end:
                raise Truncated(f"record {name!r} of {self.shown} reaches beyond its end")
            local = self._read(entry.header, _LOCAL.size + len(called))
            header = _LOCAL.unpack_from(local)
            if header[0] != b"PK\x03\x04" or header[9] != len(called) or local[_LOCAL.size :] != called:
                raise Damaged(f"record {name!r} of {self.shown} has no local header of its own at byte {entry.header}")
            offset = entry.header + _LOCAL.size + header[9] + header[10]
            if offset + entry.nbytes > self._end:
                raise Truncated(f"record {name!r} of {self.shown} reaches beyond its end")
            following = bisect.bisect_right(self._headers, entry.header)
            if following < len(self._headers) and offset + entry.nbytes > self._headers[following]:
                raise Damaged(f"record {name!r} of {self.shown} reaches into the one behind it")
            self._offsets[name] = offset
        return self._offsets[name]

    def load(self) -> object:
        """The saved object, its tensors as `StoredTensor`."""
        storages: dict[str, StoredStorage] = {}

        def persistent_load(pid: object) -> object:
            dtype, key, numel = _storage_id(pid, self.shown)
            if dtype == UNKNOWN:
                return unknown_storage(pid)
            if key not in storages:
                made = plain_storage(key, dtype, numel, lambda: (self.path, self.data_offset(f"data/{key}")))
                held = self._entry(f"data/{key}").nbytes
                if made.nbytes > held:
                    raise Damaged(f"storage {key!r} of {self.shown} has {held} bytes instead of {made.nbytes}")
                storages[key] = made
            return storages[key]

        return loads(self.record("data.pkl"), persistent_load, self.shown)

    def _read(self, offset: int, nbytes: int) -> bytes:
        """A small range: the head and the tail of the zip, where all but tensor data lies, are fetched only once."""
        for first, data in self._windows:
            if first <= offset and offset + nbytes <= first + len(data):
                return data[offset - first : offset - first + nbytes]
        if offset + nbytes <= self._start + _WINDOW_BYTES and len(self._windows) < 2:
            head = self.files.read(self.path, self._start, min(self._nbytes, _WINDOW_BYTES))
            self._windows.append((self._start, head))
            return self._read(offset, nbytes)
        return self.files.read(self.path, offset, nbytes)

    def _entry(self, name: str) -> Entry:
        entry = self.entries.get(self._prefix + name)
        if entry is None:
            raise Damaged(f"{self.shown} has no record {name!r}")
        if entry.altered:
            raise UnreadableFormat(
                f"record {name!r} of {self.shown} is compressed or encrypted; torch.save never does that"
            )
        return entry

    def _check_byte_order(self) -> None:
        if self.has("byteorder") and self.record("byteorder") != b"little":
            raise UnreadableFormat(f"{self.shown} was written on a big-endian machine; save it again on another")

    def _read_directory(self) -> Mapping[str, Entry]:
        tail_bytes = min(self._nbytes, _WINDOW_BYTES)
        while True:
            first = self._start + self._nbytes - tail_bytes
            tail = self.files.read(self.path, first, tail_bytes)
            self._windows = [(first, tail)]
            end = tail.rfind(_END)
            if 0 <= end <= len(tail) - 22:
                break
            if tail_bytes >= min(self._nbytes, _MAX_COMMENT_BYTES + 22):
                raise Truncated(f"{self.shown} has no zip directory at its end; it is cut off or not of torch.save")
            tail_bytes = min(self._nbytes, _MAX_COMMENT_BYTES + 22)
        count, nbytes, offset = struct.unpack_from("<H2I", tail, end + 10)
        limit = first + end
        if count == 0xFFFF or nbytes == 0xFFFFFFFF or offset == 0xFFFFFFFF:
            count, nbytes, offset, limit = self._zip64_end(limit)
        offset += self._start
        if offset < self._start or offset + nbytes > limit or count * _ENTRY.size > nbytes:
            raise Damaged(f"the zip directory of {self.shown} does not lie inside of the file")
        return self._parse_directory(self._read(offset, nbytes), count)

    def _zip64_end(self, end: int) -> tuple[int, int, int, int]:
        locator = self.files.read(self.path, end - 20, 20) if end - 20 >= self._start else b""
        if locator[:4] != _LOCATOR64:
            raise Damaged(f"{self.shown} says that it is a zip64, but has no zip64 record")
        where = self._start + int(struct.unpack_from("<Q", locator, 8)[0])
        if where + 56 > end:
            raise Damaged(f"the zip64 record of {self.shown} does not lie inside of the file")
        record = self.files.read(self.path, where, 56)
        if record[:4] != _END64:
            raise Damaged(f"{self.shown} has no zip64 record where it says")
        count, nbytes, offset = struct.unpack_from("<3Q", record, 32)
        return count, nbytes, offset, where

    def _parse_directory(self, data: bytes, count: int) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        position = 0
        for _ in range(count):
            if position + _ENTRY.size > len(data) or data[position : position + 4] != b"PK\x01\x02":
                raise Damaged(f"the zip directory of {self.shown} is damaged at entry {len(entries)}")
            fields = _ENTRY.unpack_from(data, position)
            flags, method, crc32, packed, nbytes = fields[3], fields[4], fields[7], fields[8], fields[9]
            name_end = position + _ENTRY.size + fields[10]
            name = data[position + _ENTRY.size : name_end].decode("utf-8", "surrogateescape")
            header = fields[16]
            if 0xFFFFFFFF in (packed, nbytes, header):
                extra = data[name_end : name_end + fields[11]]
                nbytes, packed, header = _zip64_sizes(extra, nbytes, packed, header, self.shown)
            if name in entries or header + nbytes > self._nbytes:
                raise Damaged(f"record {name!r} of {self.shown} occurs twice, or reaches beyond the end")
            altered = method != 0 or packed != nbytes or bool(flags & 1)
            entries[name] = Entry(self._start + header, nbytes, crc32, altered)
            position = name_end + fields[11] + fields[12]
        return entries


def _zip64_sizes(extra: bytes, nbytes: int, packed: int, header: int, shown: str) -> tuple[int, int, int]:
    position = 0
    while position + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, position)
        body = extra[position + 4 : position + 4 + length]
        if tag == 1:
            numbers = [int.from_bytes(body[at : at + 8], "little") for at in range(0, len(body) - 7, 8)]
            wanted = [value == 0xFFFFFFFF for value in (nbytes, packed, header)]
            if len(numbers) >= sum(wanted):
                values = iter(numbers)
                given = zip(wanted, (nbytes, packed, header), strict=True)
                nbytes, packed, header = (next(values) if more else value for more, value in given)
                return nbytes, packed, header
        position += 4 + length
    raise Damaged(f"the zip directory of {shown} has an entry without its zip64 sizes")


def _storage_id(pid: object, shown: str) -> tuple[str | None, str, object]:
    """Element type (None: untyped, `UNKNOWN`: of a class not known), key and size of a storage's persistent id."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[2], str):
        raise UnreadableFormat(f"{shown} refers to something that is no storage")
    kind = pid[1]
    return kind.dtype if isinstance(kind, StorageType) else UNKNOWN, pid[2], pid[4]


def load_torch(files: Files, path: str) -> object:
    """The object of a torch.save file in either format, its tensors as `StoredTensor`.

    Raises `NotFound`, `UnreadableFormat`, `Damaged` or `Truncated`, each naming the file.
    """
    head = files.read(path, 0, min(files.size(path), 512))
    if head[:4] == b"PK\x03\x04":
        return TorchZip(files, path).load()
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return _load_legacy(files, path)
    shown = f"{files.root.rstrip('/')}/{path}"
    if head[257:262] == b"ustar":
        raise UnreadableFormat(f"{shown} is in the tar format of torch before 0.2; load and save it again with torch")
    raise UnreadableFormat(f"{shown} is not a file of torch.save")


def own_record(files: Files, path: str, name: str) -> bytes | None:
    """A record of a torch.save zip that torch does not know; None where there is none."""
    head = files.read(path, 0, min(files.size(path), 4))
    if head != b"PK\x03\x04":
        return None
    zipped = TorchZip(files, path)
    return zipped.record(name) if zipped.has(name) else None


def is_torch_file(files: Files, path: str) -> bool:
    """True when a file's first bytes are those of torch.save (or of a zip or pickle that claims to be)."""
    try:
        head = files.read(path, 0, min(files.size(path), 4))
    except NotFound:
        return False
    return head == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


class _Legacy:
    """Consecutive pickles of a file whose lengths are found by reading on."""

    def __init__(self, files: Files, path: str) -> None:
        self._files = files
        self._path = path
        self._size = files.size(path)
        self.position = 0
        self.shown = f"{files.root.rstrip('/')}/{path}"

    def next(self) -> bytes:
        """The bytes of the next pickle."""
        wanted = _LEGACY_STEP_BYTES
        while True:
            wanted = min(wanted, self._size - self.position, MAX_PICKLE_BYTES)
            data = self._files.read(self._path, self.position, wanted)
            end = end_of_pickle(data)
            if end is not None:
                self.position += end
                return data[:end]
            if wanted == min(self._size - self.position, MAX_PICKLE_BYTES):
                raise Damaged(f"{self.shown} is cut off: the pickle at byte {self.position} does not end")
            wanted *= 4

    def number(self) -> int:
        """The next 8 bytes as an integer."""
        data = self._files.read(self._path, self.position, 8)
        self.position += 8
        return int.from_bytes(data, "little", signed=True)


def _load_legacy(files: Files, path: str) -> object:
    stream = _Legacy(files, path)
    if loads(stream.next(), what=stream.shown) != _LEGACY_MAGIC:
        raise UnreadableFormat(f"{stream.shown} is a pickle, but not one of torch.save")
    loads(stream.next(), what=stream.shown)
    system = loads(stream.next(), what=stream.shown)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise UnreadableFormat(f"{stream.shown} was written on a big-endian machine; save it again on another")
    offsets: dict[str, int] = {}
    storages: dict[str, StoredStorage] = {}

    def persistent_load(pid: object) -> object:
        dtype, key, numel = _storage_id(pid, stream.shown)
        if dtype == UNKNOWN:
            raise UnreadableFormat(
                f"{stream.shown} has quantized tensors in torch's old format; save it again with torch"
            )
        if isinstance(pid, tuple) and len(pid) > 5 and pid[5] is not None:
            raise UnreadableFormat(f"{stream.shown} has storage views, of torch before 0.4; save it again with torch")
        if key not in storages:
            storages[key] = plain_storage(key, dtype, numel, lambda: (path, offsets[key]))
        return storages[key]

    made = loads(stream.next(), persistent_load, stream.shown)
    keys = loads(stream.next(), what=stream.shown)
    if not isinstance(keys, list) or set(keys) != set(storages):
        raise Damaged(f"{stream.shown} does not list the storages that its tensors use")
    for key in keys:
        storage = storages[key]
        count = stream.number()
        if count * (itemsize(storage.dtype) if storage.dtype else 1) != storage.nbytes:
            raise Damaged(f"storage {key!r} of {stream.shown} has {count} elements, which is not what its tensors say")
        offsets[key] = stream.position
        stream.position += storage.nbytes
        if stream.position > files.size(path):
            raise Truncated(f"{stream.shown} ends inside of storage {key!r}")
    return made
