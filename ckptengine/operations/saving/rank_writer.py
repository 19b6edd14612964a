"""Writing one rank file: place extents, let the engine fill the body, seal it with its tail."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptengine import native
from ckptengine.errors import StorageFailed
from ckptengine.layout.digest import standard_each
from ckptengine.snapshot.port import CaptureEngine, Extents, WriteJob
from ckptengine.store import rankfile
from ckptengine.store.files import FileOps, close_after_failure, discard, guarded, write_all


@dataclass(frozen=True, slots=True)
class Sealed:
    """A rank file that is durable: what the manifest records of it, and its part of each tensor's raw CRC."""

    nbytes: int
    tail_crc: int
    contributions: Mapping[int, int]


class RankWriter:
    """One rank file from creation to durability.  ``keys``: (tensor, piece) ordinals of the extents, uint32[n, 2]."""

    def __init__(
        self, ops: FileOps, path: Path, identity: rankfile.FileIdentity, mode: int, keys: npt.NDArray[np.uint32]
    ) -> None:
        self._ops, self._path, self._identity = ops, path, identity
        self._keys = keys
        self._offsets: list[int] = []
        self._sizes: Sequence[int] = []
        self._end = rankfile.HEADER_BYTES
        self._job: WriteJob | None = None
        self._fd: int | None = guarded("create", path, lambda: ops.create(path, mode))

    def start(self, engine: CaptureEngine, extents: Extents) -> WriteJob:
        """Place ``extents`` and start capturing them."""
        self._sizes = extents.sizes
        placed = extents.addresses if engine.direct else [0] * len(extents)
        self._offsets, self._end = rankfile.place(self._sizes, placed)
        fd = self._fd
        assert fd is not None
        if self._end > rankfile.HEADER_BYTES:
            guarded("allocate", self._path, lambda: self._ops.preallocate(fd, self._end))
        write_all(self._ops, fd, rankfile.encode_header(self._identity), 0, self._path)
        self._job = engine.start(fd, self._path, extents.at(self._offsets), rankfile.HEADER_BYTES, self._end)
        return self._job

    def seal(self, values: object) -> Sealed:
        """Wait for the body, append the tail, and make the file durable.  Raises the engine's or `StorageFailed`."""
        assert self._job is not None and self._fd is not None
        fd = self._fd
        self._job.wait_written()
        digests = self._job.digests()
        index, granules = self._index(digests.granules, digests.extents)
        table, tail = rankfile.encode_tail(self._end, index, granules, values)
        write_all(self._ops, fd, table + tail, self._end, self._path)
        guarded("flush", self._path, lambda: self._ops.fsync(fd))
        self._fd = None
        guarded("close", self._path, lambda: self._ops.close(fd))
        guarded("flush directory", self._path.parent, lambda: self._ops.fsync_dir(self._path.parent))
        nbytes = self._end + len(table) + len(tail)
        self._require_in_place(nbytes)
        return Sealed(nbytes, native.crc64(tail), self._contributions(digests.contributions))

    def _require_in_place(self, nbytes: int) -> None:
        """What was written is what its name leads to: the manifest will go by names."""
        found = guarded("find", self._path, lambda: os.stat(self._path).st_size)
        if found != nbytes:
            raise StorageFailed(
                f"{self._path} has {found} bytes, not the {nbytes} that were written: the root was moved or replaced "
                "during the save; save again"
            )

    def trace(self) -> list[dict[str, Any]]:
        """What the engine's threads did, as Chrome trace events; empty before `start`."""
        return self._job.trace() if self._job is not None else []

    def _contributions(self, raws: npt.NDArray[np.uint64]) -> dict[int, int]:
        """Tensor ordinal -> what this rank adds to its raw CRC."""
        found: dict[int, int] = {}
        for tensor, raw in zip(self._keys[:, 0].tolist(), raws.tolist(), strict=True):
            found[tensor] = found.get(tensor, 0) ^ raw
        return found

    def _index(
        self, granules: npt.NDArray[np.uint64], raws: npt.NDArray[np.uint64]
    ) -> tuple[rankfile.Index, npt.NDArray[np.uint64]]:
        """Index records and granules in (tensor, piece) order; both come in file order."""
        index = np.zeros(len(self._keys), rankfile.INDEX_DTYPE)
        if not len(index):
            return index, granules
        index["tensor"], index["piece"] = self._keys.T
        index["offset"], index["nbytes"] = self._offsets, self._sizes
        index["crc"] = standard_each(raws, index["nbytes"].astype(np.int64))
        order = np.lexsort((index["piece"], index["tensor"]))
        counts = rankfile.granule_counts(index["nbytes"])
        starts = (np.cumsum(counts) - counts)[order]  # where each extent's granules begin, in the new order
        counts = counts[order]
        begins = np.cumsum(counts) - counts
        return index[order], granules[np.repeat(starts - begins, counts) + np.arange(len(granules))]

    def abort(self, *, keep: bool = False) -> None:
        """Stop and leave nothing behind; never raises (the error that led here is the one to report).

        ``keep``: a manifest that names this file may exist, so the file stays; retention removes it if there is none.
        """
        if self._job is not None:
            self._job.cancel()
        if self._fd is not None:
            fd, self._fd = self._fd, None
            close_after_failure(self._ops, fd)
        if not keep:
            discard(self._ops, self._path)
            with contextlib.suppress(OSError):  # another save of the step has a file in it
                self._ops.rmdir(self._path.parent)
