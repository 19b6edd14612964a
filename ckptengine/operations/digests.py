"""Digests of tensors, computed from what passes by while it is converted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ckptengine import native
from ckptengine.errors import DigestMismatch
from ckptengine.layout.box import Box
from ckptengine.layout.digest import format_digest, raw_to_standard
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.writer import Document, Job, Wanted


class Seen:
    """What one unit read of each tensor: the xor of positioned CRCs, and how many elements."""

    def __init__(self, job: Job, progress: Callable[[int], None]) -> None:
        self._job = job
        self._progress = progress
        self._lock = threading.Lock()
        self._found: dict[str, tuple[int, int]] = {}

    def read(self, name: str, box: Box, out: Any) -> None:
        """`Job.read`, digesting what was read."""
        self._job.read(name, box, out)
        self._add(name, box, out if not isinstance(out, np.ndarray) else np.ascontiguousarray(out))
        self._progress(box.size * itemsize(self._job.tensor(name).dtype))

    def read_many(self, wanted: Sequence[Wanted]) -> None:
        """`Job.read_many`, digesting what was read."""
        self._job.read_many(wanted)
        for name, box, view in wanted:
            self._add(name, box, view)
        self._progress(sum(view.nbytes for _, _, view in wanted))

    def _add(self, name: str, box: Box, contiguous: Any) -> None:
        tensor = self._job.tensor(name)
        if box.shape == tensor.shape:
            raw = native.raw_crc64(contiguous) if box.size else 0
        else:
            raw = native.raw_positioned(contiguous, box, tensor.shape, itemsize(tensor.dtype)) if box.size else 0
        with self._lock:
            before, count = self._found.get(name, (0, 0))
            self._found[name] = (before ^ raw, count + box.size)

    def to_json(self) -> Document:
        return {name: [f"{raw:016x}", count] for name, (raw, count) in self._found.items()}


def combine(job: Job, seen: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The digests of all tensors of which some unit read each element once, or all units together did.

    A tensor that a format stores twice (weights and master copies) is read twice; where neither holds for one that has
    a digest in the source, it is read once more, so that no damaged byte passes.
    """
    totals: dict[str, tuple[int, int]] = {}
    whole: dict[str, int] = {}
    for unit in seen:
        for name, (text, count) in unit.items():
            raw = int(text, 16)
            before, so_far = totals.get(name, (0, 0))
            totals[name] = (before ^ raw, so_far + int(count))
            if count == job.tensor(name).size:
                whole.setdefault(name, raw)
    found: dict[str, str] = {}
    for name in job.names:
        tensor = job.tensor(name)
        raw, count = totals.get(name, (0, 0))
        if name in whole or count == tensor.size:
            found[name] = format_digest(raw_to_standard(whole.get(name, raw), tensor.nbytes))
        elif count and tensor.digest is not None:
            found[name] = digest_of(tensor, job.read, job.chunk_bytes)
    return found


def compare(job: Job, digests: Mapping[str, str], source: str) -> int:
    """Number of tensors whose digest is the one that the source records; `DigestMismatch` naming those that differ."""
    recorded = {name: digest for name in digests if (digest := job.tensor(name).digest) is not None}
    wrong = [name for name, digest in recorded.items() if digest != digests[name]]
    if wrong:
        raise DigestMismatch(
            f"{source}: {len(wrong)} tensors do not match the digests recorded for them ({', '.join(wrong[:5])}); "
            "nothing was converted, take another copy or an older step"
        )
    return len(recorded)


def digest_of(tensor: LogicalTensor, read: Callable[[str, Box, Any], None], chunk_bytes: int) -> str:
    """The digest of a whole tensor, read in chunks."""
    item_bytes = itemsize(tensor.dtype)
    raw = 0
    for box in blocks(tensor.shape, max(1, chunk_bytes // item_bytes)):
        buffer = np.empty(box.size * item_bytes, np.uint8)
        read(tensor.name, box, buffer.data)
        raw ^= native.raw_positioned(buffer, box, tensor.shape, item_bytes)
    return format_digest(raw_to_standard(raw, tensor.nbytes))


def blocks(shape: tuple[int, ...], limit: int) -> Iterable[Box]:
    """Boxes of at most ``limit`` elements that cover a tensor in row-major order."""
    if 0 in shape:
        return
    inner = 1
    cut = len(shape)
    while cut and inner * shape[cut - 1] <= limit:
        cut -= 1
        inner *= shape[cut]
    if cut == 0:
        yield Box.whole(shape)
        return
    rows = max(1, limit // inner)
    for outer in np.ndindex(*shape[: cut - 1]):
        for start in range(0, shape[cut - 1], rows):
            extent = min(rows, shape[cut - 1] - start)
            yield Box((*outer, start, *([0] * (len(shape) - cut))), (*([1] * len(outer)), extent, *shape[cut:]))
