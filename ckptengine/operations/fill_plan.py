"""What a restore reads of our own format: wanted pieces against stored extents, widened to whole granules.

Pure bookkeeping, no tensor byte is read here (indexes are).  The cover of every wanted piece is proven on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptengine.errors import NotFound
from ckptengine.layout.digest import GRANULE_BYTES
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.piece import Piece
from ckptengine.layout.tensor import Fragment
from ckptengine.plan.read import ReadPlan, Wanted, plan_reads
from ckptengine.plan.write import stored_overlapping
from ckptengine.sources.native import NativeSource
from ckptengine.state.fill import Target
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

    def wanted(self, number: int, target: Target) -> Wanted:
        """One target as the planner takes it, with the fragments that overlap its pieces."""
        source = self._source
        ordinal = self._ordinals.get(source.aliases().get(target.name, target.name))
        if ordinal is None:
            raise NotFound(f"no tensor {target.name!r} in step {source.manifest.step}")
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


def plan_fill(extents: Extents, targets: Sequence[Target]) -> ReadPlan:
    """The reads that fill ``targets``, numbered in order; each stored byte is read at most once.

    `LayoutError` for an element that has no stored one or several, `Damaged` for an index that is wrong or not there.
    """
    wanted = [extents.wanted(number, target) for number, target in enumerate(targets)]
    return plan_reads(wanted, widen=extents.widen, max_read_bytes=MAX_READ_BYTES)
