"""Targets that are filled from one whole stored extent each, which nearly all are: as columns, without an object each.

A checkpoint of a hundred thousand small tensors is restored from a few arrays and a few large reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptengine import native
from ckptengine.layout.digest import standard_each
from ckptengine.operations.filling.batches import BATCH_BYTES
from ckptengine.store.reader import Reader

Column = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class WholeBatch:
    """Ranges of one file (of dtype `ckptengine.native.RANGE`): extent ``rows[i]`` of ``rank`` each."""

    file: str
    rank: int
    rows: Column
    ranges: npt.NDArray[Any]

    @property
    def read_bytes(self) -> int:
        return int(self.ranges["size_bytes"].sum())

    def compare(self, reader: Reader, raws: npt.NDArray[np.uint64]) -> None:
        """Compare the raw CRCs of what was read with the index; `DigestMismatch` for the first that differs."""
        sizes = self.ranges["size_bytes"]
        wrong = np.flatnonzero(standard_each(raws, sizes) != reader.tail(self.rank).index["crc"][self.rows])
        if len(wrong):
            first = int(wrong[0])
            raise reader.mismatch(self.rank, int(self.rows[first]), 0, int(sizes[first]))


@dataclass(frozen=True, slots=True)
class Wholes:
    """Whole extents and the places that they fill; all columns have one length.

    ``places`` are (target, byte in it) of the extent's first byte; no extent appears twice.
    """

    targets: Column
    starts: Column
    ranks: Column
    rows: Column

    def nbytes(self, reader: Reader) -> int:
        """Bytes of all extents."""
        return sum(int(index["nbytes"][rows].sum()) for index, rows in self._by_rank(reader))

    def _by_rank(self, reader: Reader) -> Iterator[tuple[npt.NDArray[Any], Column]]:
        for rank in np.unique(self.ranks).tolist():
            yield reader.tail(rank).index, self.rows[self.ranks == rank]

    def batches(self, reader: Reader, addresses: Sequence[int]) -> Iterator[WholeBatch]:
        """The reads, file by file in order of their offsets; ``addresses[n]`` is where target ``n`` begins."""
        bases = np.array(addresses, np.uint64)
        for rank in np.unique(self.ranks).tolist():
            index = reader.tail(rank).index
            mine = np.flatnonzero(self.ranks == rank)
            mine = mine[np.argsort(index["offset"][self.rows[mine]], kind="stable")]
            rows = self.rows[mine]
            ranges = np.zeros(len(mine), native.RANGE)
            ranges["file_offset"], ranges["size_bytes"] = index["offset"][rows], index["nbytes"][rows]
            ranges["address"] = bases[self.targets[mine]] + self.starts[mine].astype(np.uint64)
            ends = np.cumsum(ranges["size_bytes"].astype(np.int64))
            cuts = np.flatnonzero(np.diff(ends // BATCH_BYTES)) + 1
            for part, chosen in zip(np.split(ranges, cuts), np.split(rows, cuts), strict=True):
                yield WholeBatch(reader.path(rank), rank, chosen, part)
