"""What a restore reads of our own format: wanted pieces against stored extents, whole or widened to whole granules.

Pure bookkeeping, no tensor byte is read here (indexes are).  The cover of every wanted piece is proven on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckptengine.errors import NotFound
from ckptengine.layout.digest import GRANULE_BYTES
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.piece import Piece
from ckptengine.layout.tensor import Fragment
from ckptengine.operations.filling.whole import Wholes
from ckptengine.plan.read import ReadPlan, Wanted, plan_reads
from ckptengine.plan.write import stored_overlapping
from ckptengine.sources.native import NativeSource
from ckptengine.state.target import Target
from ckptengine.store.manifest import TensorRecord

MAX_READ_BYTES = 16 << 20
"""Largest range that is planned as one; a multiple of the granule, so that cuts of a run need no widening."""


class Extents:
    """The stored extents that a restore touches, by file and offset."""

    def __init__(self, source: NativeSource) -> None:
        self._source = source
        self._rows: dict[tuple[str, int], tuple[int, int, int]] = {}
        self._plans: dict[object, tuple[tuple[int, int, Piece], ...]] = {}
        self._ordinals = {record.name: i for i, record in enumerate(source.manifest.tensors)}

    def _ordinal(self, name: str) -> int:
        ordinal = self._ordinals.get(name)
        if ordinal is None:
            ordinal = self._ordinals.get(self._source.aliases().get(name, name))
        if ordinal is None:
            raise NotFound(f"no tensor {name!r} in step {self._source.manifest.step}")
        return ordinal

    def wholes(self, targets: Sequence[Target]) -> tuple[Wholes, list[int]]:
        """The targets that one stored extent fills, from its first byte to its last, and the numbers of the others.

        The box of such an extent is the wanted one, so that nothing of its cover is left to prove.
        """
        records, ordinal_of = self._source.manifest.tensors, self._ordinal
        known: dict[tuple[object, ...], tuple[int, int, int, int] | None] = {}
        rows: list[tuple[int, int, int, int, int, int]] = []
        rest: list[int] = []
        for number, target in enumerate(targets):
            ordinal = ordinal_of(target.name)
            record = records[ordinal]
            # By identity, because equal tensors share the objects, and comparing pieces costs more than all the rest.
            key = (record.layout, id(record.writer), record.dtype, record.shape, id(target.pieces))
            try:
                found = known[key]
            except KeyError:
                found = known[key] = self._whole(record, target.pieces)
            if found is None:
                rest.append(number)
            else:
                rows.append((number, ordinal, *found))
        columns = np.array(rows, np.int64).reshape(-1, 6)
        extents = columns[:, 1:4]
        _, first, counts = np.unique(extents, axis=0, return_index=True, return_counts=True)
        if len(first) < len(columns):  # several targets want one extent: it is planned, to be read once
            once = np.zeros(len(columns), np.bool_)
            once[first[counts == 1]] = True
            rest = sorted([*rest, *columns[~once, 0].tolist()])
            columns = columns[once]
        numbers, ordinals, ranks, pieces, nbytes, starts = columns.T
        found_rows = np.zeros(len(columns), np.int64)
        for rank in np.unique(ranks).tolist():
            mine = np.flatnonzero(ranks == rank)
            found_rows[mine] = self._source.reader.located_all(rank, ordinals[mine], pieces[mine], nbytes[mine])
        return Wholes(numbers, starts, ranks, found_rows), rest

    def _whole(self, record: TensorRecord, pieces: tuple[Piece, ...]) -> tuple[int, int, int, int] | None:
        """(rank, piece, bytes, first byte in the target) of the extent that is all of ``pieces``; None for no such."""
        if len(pieces) != 1 or not pieces[0].size or not pieces[0].is_contiguous:
            return None
        found, item = self._overlapping(record, pieces), itemsize(record.dtype)
        nbytes = pieces[0].size * item
        if len(found) != 1 or found[0][2].box != pieces[0].box or nbytes > MAX_READ_BYTES:
            return None
        return found[0][0], found[0][1], nbytes, pieces[0].start * item

    def wanted(self, number: int, target: Target) -> Wanted:
        """One target as the planner takes it, with the fragments that overlap its pieces."""
        ordinal = self._ordinal(target.name)
        source = self._source
        record = source.manifest.tensors[ordinal]
        item = itemsize(record.dtype)
        fragments = [self._fragment(ordinal, item, *found) for found in self._overlapping(record, target.pieces)]
        return Wanted(number, record.name, record.shape, item, target.pieces, fragments)

    def _overlapping(self, record: TensorRecord, pieces: tuple[Piece, ...]) -> tuple[tuple[int, int, Piece], ...]:
        """(rank, ordinal, piece) of what overlaps ``pieces``, each once.  Layers of a model share the answer."""
        key = (record.layout, record.writer, record.shape, pieces)
        found = self._plans.get(key)
        if found is None:
            layout = self._source.layout(record.layout)
            by_place: dict[tuple[int, int], Piece] = {}
            for wanted in pieces:
                for rank, ordinal, piece in stored_overlapping(layout, record.writer, record.shape, wanted.box):
                    by_place[rank, ordinal] = piece
            found = self._plans[key] = tuple((rank, ordinal, piece) for (rank, ordinal), piece in by_place.items())
        return found

    def _fragment(self, tensor: int, item_bytes: int, rank: int, ordinal: int, piece: Piece) -> Fragment:
        row, offset = self._source.reader.located(rank, tensor, ordinal, piece.box.size * item_bytes)
        path = self._source.reader.path(rank)
        self._rows[path, offset] = rank, row, piece.box.size * item_bytes
        return Fragment(piece.box, path, offset)

    def widen(self, fragment: Fragment, start: int, stop: int) -> tuple[int, int]:
        """The whole granules of an extent that hold the file's bytes ``[start, stop)``."""
        base = fragment.offset
        end = base + self._rows[fragment.file, base][2]
        low = base + (start - base) // GRANULE_BYTES * GRANULE_BYTES
        return low, min(end, base - (base - stop) // GRANULE_BYTES * GRANULE_BYTES)

    def by_file(self) -> dict[str, list[tuple[int, int, int, int]]]:
        """(first byte, bytes, rank, row of its index) of the extents of every file, by place."""
        found: dict[str, list[tuple[int, int, int, int]]] = {}
        for (path, offset), (rank, row, nbytes) in self._rows.items():
            found.setdefault(path, []).append((offset, nbytes, rank, row))
        for rows in found.values():
            rows.sort()
        return found


def plan_fill(extents: Extents, targets: Sequence[Target], numbers: Sequence[int]) -> ReadPlan:
    """The reads that fill ``targets[n]`` for each of ``numbers``; each stored byte is read at most once.

    `LayoutError` for an element that has no stored one or several, `Damaged` for an index that is wrong or not there.
    """
    wanted = [extents.wanted(number, targets[number]) for number in numbers]
    return plan_reads(wanted, widen=extents.widen, max_read_bytes=MAX_READ_BYTES)
