"""A committed checkpoint at rest, read and verified: tails on demand, bytes only with their digests."""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_left
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ckptengine import native
from ckptengine.errors import DigestMismatch, NotFound, Truncated
from ckptengine.layout.digest import GRANULE_BYTES
from ckptengine.store import rankfile
from ckptengine.store.manifest import Manifest

_WHOLE_READ_BYTES = 16 << 20


class StepFiles(Protocol):
    """Read-only bytes of one step directory."""

    def size(self, path: str) -> int: ...
    def read(self, path: str, offset: int, nbytes: int) -> bytes: ...
    def read_into(self, path: str, offset: int, view: memoryview) -> None: ...


class Reader:
    """The rank files of one manifest.  Thread-safe.  Nothing is returned before it matched its digest."""

    def __init__(self, manifest: Manifest, files: StepFiles, prefix: str = "") -> None:
        self.manifest = manifest
        self._files, self._prefix = files, prefix
        self._ranks = {self.path(rank): rank for rank in range(manifest.world)}
        self._tails: dict[int, rankfile.Tail] = {}
        self._by_offset: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
        self._keys: dict[int, list[int]] = {}
        self._granules: dict[tuple[int, int], npt.NDArray[np.uint64]] = {}
        self._lock = threading.Lock()

    def path(self, rank: int) -> str:
        """The rank file's path beneath the source's root."""
        return self._prefix + self.manifest.file_name(rank)

    def check_sizes(self) -> None:
        """`Truncated` for the first rank file that is missing or has another size than was committed."""
        for rank in range(self.manifest.world):
            self._checked_size(rank)

    def _checked_size(self, rank: int) -> int:
        record, path = self.manifest.files[rank], self.path(rank)
        try:
            size = self._files.size(path)
        except NotFound:
            raise Truncated(f"{path}: missing; the manifest of step {self.manifest.step} names it") from None
        if size != record.nbytes:
            raise Truncated(f"{path}: has {size} bytes, {record.nbytes} were committed")
        return size

    def tail(self, rank: int) -> rankfile.Tail:
        """The checked tail of a rank's file, read once."""
        with self._lock:
            if rank not in self._tails:
                self._tails[rank] = self._read_tail(rank)
            return self._tails[rank]

    def _read_tail(self, rank: int) -> rankfile.Tail:
        record, path = self.manifest.files[rank], self.path(rank)
        size = self._checked_size(rank)
        header = self._files.read(path, 0, rankfile.HEADER_BYTES)
        rankfile.check_header(header, self.manifest.identity(rank), path)
        end = self._files.read(path, size - rankfile.FOOTER_BYTES, rankfile.FOOTER_BYTES)
        footer = rankfile.decode_footer(end, size, path)
        data = self._files.read(path, footer.index, size - footer.index)
        if native.crc64(data) != record.tail_crc:
            raise DigestMismatch(f"{path}: the index is not the one that was committed; the file is damaged or stale")
        tail = rankfile.decode_tail(data, size, path)
        if len(tail.index) and int(tail.index["tensor"].max()) >= len(self.manifest.tensors):
            raise DigestMismatch(f"{path}: the index names a tensor that the manifest does not have")
        return tail

    def values(self, rank: int) -> Any:
        """The values that belong to one rank alone."""
        return self.tail(rank).values

    def extent(self, rank: int, tensor: int, piece: int) -> int:
        """The row of an extent in the rank's index; `DigestMismatch` where there is none."""
        keys = self._keys.get(rank)
        if keys is None:
            keys = self._keys[rank] = _keys(self.tail(rank).index).tolist()
        key = tensor << 32 | piece
        row = bisect_left(keys, key)
        if row < len(keys) and keys[row] == key:
            return row
        name = self.manifest.tensors[tensor].name
        raise DigestMismatch(f"{self.path(rank)}: piece {piece} of tensor {name!r} is not in its index")

    def located(self, rank: int, tensor: int, piece: int, nbytes: int) -> tuple[int, int]:
        """(row in the rank's index, file offset) of an extent; `DigestMismatch` unless it has ``nbytes`` bytes."""
        row = self.extent(rank, tensor, piece)
        record = self.tail(rank).index[row]
        if int(record["nbytes"]) != nbytes:
            name = self.manifest.tensors[tensor].name
            raise DigestMismatch(
                f"{self.path(rank)}: piece {piece} of tensor {name!r} has {record['nbytes']} bytes, {nbytes} follow "
                "from its sharding; the file is damaged"
            )
        return row, int(record["offset"])

    def located_all(
        self, rank: int, tensors: npt.NDArray[np.int64], pieces: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """`located` of many extents of one rank at once: their rows in its index; raises the same."""
        index = self.tail(rank).index
        keys, wanted = _keys(index), _keys_of(tensors, pieces)
        rows = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0)).astype(np.int64)
        good = np.zeros(len(rows), np.bool_)
        if len(keys):
            good = (keys[rows] == wanted) & (index["nbytes"][rows] == nbytes)
        for place in np.flatnonzero(~good).tolist():
            self.located(rank, int(tensors[place]), int(pieces[place]), int(nbytes[place]))
        return rows

    def row_at(self, path: str, offset: int) -> Any:
        """The index record of the extent that begins at ``offset`` of a rank file, None where there is none."""
        rank = self._ranks[path]
        tail = self.tail(rank)
        order, starts = self._order(rank, tail)
        place = int(np.searchsorted(starts, offset))
        return tail.index[order[place]] if place < len(starts) and starts[place] == offset else None

    # ---- verified bytes

    def read_verified(self, path: str, offset: int, view: memoryview) -> None:
        """Fill ``view`` from the body of ``path``, each byte checked; `Damaged` when any is wrong."""
        rank = self._ranks.get(path)
        if rank is None:
            raise NotFound(f"{path} is no rank file of step {self.manifest.step}")
        view = view.cast("B")
        done = 0
        while done < len(view):
            done += self._read_next(rank, offset + done, view[done:])

    def _read_next(self, rank: int, offset: int, view: memoryview) -> int:
        """Fill the beginning of ``view``: whole extents, the part of one that lies in it, or what lies between two."""
        tail = self.tail(rank)
        order, starts = self._order(rank, tail)
        place = int(np.searchsorted(starts, offset, "right")) - 1
        row = int(order[place]) if place >= 0 else -1
        begin = int(tail.index["offset"][row]) if row >= 0 else 0
        end = begin + int(tail.index["nbytes"][row]) if row >= 0 else 0
        if offset >= end:
            count = min(len(view), (int(starts[place + 1]) if place + 1 < len(starts) else tail.table) - offset)
            self._read_gap(self.path(rank), offset, view[:count])
            return count
        count = self._read_wholes(rank, place, view) if offset == begin else 0
        if not count:
            count = min(len(view), end - offset)
            self._read_extent(rank, row, offset - begin, view[:count])
        return count

    def _read_wholes(self, rank: int, place: int, view: memoryview) -> int:
        """One read for all extents that lie whole in ``view``, which begins where the one at ``place`` does.

        How many bytes that were; 0, and nothing is read, where it would be fewer than two extents.
        """
        index, path = self.tail(rank).index, self.path(rank)
        order, starts = self._order(rank, self.tail(rank))
        base = int(starts[place])
        stop = int(np.searchsorted(starts, base + len(view)))
        rows = order[place:stop]
        ends = starts[place:stop] + index["nbytes"][rows].astype(np.int64) - base
        count = int(np.searchsorted(ends, len(view), "right"))
        if count < 2:
            return 0
        cuts = list(zip((starts[place : place + count] - base).tolist(), ends[:count].tolist(), strict=True))
        view = view[: cuts[-1][1]]
        self._files.read_into(path, base, view)
        found = np.array([native.crc64(view[low:high]) for low, high in cuts], np.uint64)
        wrong = np.flatnonzero(found != index["crc"][rows[:count]])
        if len(wrong):
            row = int(rows[wrong[0]])
            raise self.mismatch(rank, row, 0, int(index["nbytes"][row]))
        for (_, low), (high, _) in itertools.pairwise(cuts):
            _check_gap(path, base + low, view[low:high])
        return len(view)

    def _read_gap(self, path: str, offset: int, view: memoryview) -> None:
        """Bytes between extents: zeros, which is all that there is to check."""
        if not len(view):
            raise Truncated(f"{path}: byte {offset} lies behind the extents")
        self._files.read_into(path, offset, view)
        _check_gap(path, offset, view)

    def _order(self, rank: int, tail: rankfile.Tail) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The rows of the index by offset, and those offsets."""
        with self._lock:
            if rank not in self._by_offset:
                order = np.argsort(tail.index["offset"], kind="stable").astype(np.int64)
                self._by_offset[rank] = order, tail.index["offset"][order].astype(np.int64)
            return self._by_offset[rank]

    def _read_extent(self, rank: int, row: int, start: int, view: memoryview) -> None:
        """Bytes [start, start + len(view)) of one extent: read whole granules, check them, keep what is wanted."""
        record = self.tail(rank).index[row]
        base, nbytes = int(record["offset"]), int(record["nbytes"])
        if start == 0 and len(view) == nbytes and nbytes <= _WHOLE_READ_BYTES:
            self._files.read_into(self.path(rank), base, view)
            if native.crc64(view) != int(record["crc"]):
                raise self.mismatch(rank, row, 0, nbytes)
            return
        granules = self.granules(rank, row)
        stop = start + len(view)
        first, last = start // GRANULE_BYTES, -(-stop // GRANULE_BYTES)
        low, high = first * GRANULE_BYTES, min(last * GRANULE_BYTES, nbytes)
        if (low, high) == (start, stop):
            self._files.read_into(self.path(rank), base + low, view)
            self._check_granules(rank, row, view, granules, first)
            return
        buffer = bytearray(high - low)
        self._files.read_into(self.path(rank), base + low, memoryview(buffer))
        self._check_granules(rank, row, memoryview(buffer), granules, first)
        view[:] = buffer[start - low : stop - low]

    def _check_granules(
        self, rank: int, row: int, view: memoryview, granules: npt.NDArray[np.uint64], first: int
    ) -> None:
        found = native.raw_granules(view, GRANULE_BYTES)
        wrong = np.flatnonzero(found != granules[first : first + len(found)])
        if len(wrong):
            at = (first + int(wrong[0])) * GRANULE_BYTES
            raise self.mismatch(rank, row, at, at + GRANULE_BYTES)

    def granules(self, rank: int, row: int) -> npt.NDArray[np.uint64]:
        """The raw CRCs of an extent's granules, checked against the CRC of the extent."""
        key = (rank, row)
        with self._lock:
            if key in self._granules:
                return self._granules[key]
        tail = self.tail(rank)
        first, last = int(tail.starts[row]), int(tail.starts[row + 1])
        data = self._files.read(self.path(rank), tail.table + 8 * first, 8 * (last - first))
        granules = np.frombuffer(data, "<u8").astype(np.uint64)
        if rankfile.extent_crc(granules, int(tail.index["nbytes"][row])) != int(tail.index["crc"][row]):
            raise self._table_damaged(rank)
        with self._lock:
            self._granules[key] = granules
        return granules

    def check_granules(self, rank: int) -> None:
        """Compare a rank file's whole granule table with its index, by one read; `DigestMismatch` when it differs."""
        tail = self.tail(rank)
        granules = np.frombuffer(self._files.read(self.path(rank), tail.table, 8 * int(tail.starts[-1])), "<u8")
        wrong = np.flatnonzero(rankfile.extent_crcs(granules, tail) != tail.index["crc"])
        if len(wrong):
            raise self._table_damaged(rank)

    def _table_damaged(self, rank: int) -> DigestMismatch:
        return DigestMismatch(f"{self.path(rank)}: the granule table does not match the index; the table is damaged")

    def mismatch(self, rank: int, row: int, start: int, stop: int) -> DigestMismatch:
        """The error for bytes ``[start, stop)`` of an extent that do not match their digest."""
        record = self.tail(rank).index[row]
        name = self.manifest.tensors[int(record["tensor"])].name
        base = int(record["offset"])
        return DigestMismatch(
            f"{self.path(rank)}: bytes {base + start}..{base + min(stop, int(record['nbytes']))} of tensor {name!r} do "
            "not match their digest; the file is damaged"
        )


def _check_gap(path: str, offset: int, view: memoryview) -> None:
    if any(view):
        raise DigestMismatch(f"{path}: the padding at byte {offset} is not zero; the file is damaged")


def _keys(index: rankfile.Index) -> npt.NDArray[np.uint64]:
    return _keys_of(index["tensor"], index["piece"])


def _keys_of(tensors: npt.NDArray[Any], pieces: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    return tensors.astype(np.uint64) << np.uint64(32) | pieces.astype(np.uint64)
