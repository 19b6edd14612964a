"""torch.save files whose storages are runs of tensors, cast and padded as they are streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.errors import UnusableRequest
from ckptengine.layout.box import Box, row_major_strides
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.flat import flat_boxes
from ckptengine.sources.emit import Tensor, dumps, storage_of
from ckptengine.sources.smalltensors import as_stored
from ckptengine.sources.stream import cut_rows, stream_boxes, stream_memory_bytes
from ckptengine.sources.writer import Job, Target
from ckptengine.sources.zipwriter import ALIGNMENT, ZipWriter, zip_bytes

ZEROS = bytes(1 << 20)
CAST_FACTOR = 3
"""Memory for casting a chunk, beside the two that are streamed through, in chunks of the wider type."""


@dataclass(frozen=True, slots=True)
class Run:
    """Elements ``start <= i < stop`` of the flattened tensor ``name``; of zeros where the name is empty."""

    name: str
    start: int
    stop: int


@dataclass(slots=True)
class Record:
    """One storage: ``data``, or runs of tensors one after another as ``dtype``; then zeros up to ``size`` elements."""

    dtype: str
    size: int
    runs: list[Run]
    data: bytes = b""

    @property
    def nbytes(self) -> int:
        return self.size * itemsize(self.dtype)


@dataclass(slots=True)
class TorchFile:
    """A torch.save file under construction: its storages, to which tensors of its value refer."""

    records: list[Record] = field(default_factory=list)

    def flat(self, dtype: str, size: int, runs: Sequence[Run], shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor over a storage of its own; 1-D unless a shape is given."""
        key = str(len(self.records))
        self.records.append(Record(dtype, size, list(runs)))
        storage = storage_of(key, dtype, size * itemsize(dtype), itemsize(dtype))
        dims = (size,) if shape is None else shape
        return Tensor(storage, dtype, dims, row_major_strides(dims))

    def whole(self, job: Job, name: str, dtype: str | None = None) -> Tensor:
        """A whole tensor of the source."""
        header = job.tensor(name)
        return self.flat(dtype or header.dtype, header.size, [Run(name, 0, header.size)], header.shape)

    def with_small_tensors(self, value: object) -> Any:
        """A value whose dicts of `as_plain` are tensors over storages of their own."""
        made, storages = as_stored(value, len(self.records))
        self.records += [Record("uint8", len(data), [], data) for data in storages]
        return made

    def nbytes(self, value: object) -> int:
        """The size of the file."""
        small = small_records(value)
        names = [*small, *(f"data/{number}" for number in range(len(self.records)))]
        return zip_bytes(names, [*map(len, small.values()), *(record.nbytes for record in self.records)])

    def write(self, job: Job, target: Target, path: str, value: object) -> None:
        """Write the file whose value is ``value``."""
        with target.create(path) as sink:
            zipped = ZipWriter(sink)
            for name, data in small_records(value).items():
                zipped.add(name, data)
            for number, record in enumerate(self.records):
                zipped.begin(f"data/{number}")
                _write_record(job, record, zipped)
            zipped.finish()


def memory_bytes(job: Job) -> int:
    """What writing one file needs at most."""
    return stream_memory_bytes(job) + CAST_FACTOR * job.chunk_bytes


def read_bytes(job: Job, records: Sequence[Record]) -> int:
    """What is read of the source for these records."""
    return sum(
        (run.stop - run.start) * itemsize(job.tensor(run.name).dtype)
        for record in records
        for run in record.runs
        if run.name
    )


def small_records(value: object) -> dict[str, bytes]:
    """The records of a torch.save file but its storages."""
    return {
        "data.pkl": dumps(value),
        ".format_version": b"1",
        ".storage_alignment": str(ALIGNMENT).encode(),
        "byteorder": b"little",
        "version": b"3\n",
    }


def _write_record(job: Job, record: Record, zipped: ZipWriter) -> None:
    zipped.write(memoryview(record.data))
    written = len(record.data) // itemsize(record.dtype)
    pending: list[Run] = []
    for run in record.runs:
        if not run.name:
            _write_runs(job, pending, record.dtype, zipped)
            pending = []
            _write_zeros((run.stop - run.start) * itemsize(record.dtype), zipped)
        elif run.stop > run.start:
            pending.append(run)
        written += run.stop - run.start
    _write_runs(job, pending, record.dtype, zipped)
    _write_zeros((record.size - written) * itemsize(record.dtype), zipped)


def _write_runs(job: Job, runs: Sequence[Run], dtype: str, zipped: ZipWriter) -> None:
    if all(job.tensor(run.name).dtype == dtype for run in runs):
        if runs:
            stream_boxes(job, _boxes(job, runs), zipped.write, lambda number: None)
        return
    for name, box in _boxes(job, runs):
        _write_cast(job, name, box, dtype, zipped)


def _write_zeros(nbytes: int, zipped: ZipWriter) -> None:
    while nbytes > 0:
        zipped.write(memoryview(ZEROS)[: min(nbytes, len(ZEROS))])
        nbytes -= min(nbytes, len(ZEROS))


def _boxes(job: Job, runs: Sequence[Run]) -> Iterator[tuple[str, Box]]:
    for run in runs:
        for box in flat_boxes(job.tensor(run.name).shape, run.start, run.stop):
            yield run.name, box


def _write_cast(job: Job, name: str, box: Box, dtype: str, zipped: ZipWriter) -> None:
    have = job.tensor(name).dtype
    for part in cut_rows(box, itemsize(have), job.chunk_bytes // 2):
        raw = bytearray(part.size * itemsize(have))
        job.read(name, part, memoryview(raw))
        zipped.write(memoryview(cast(raw, have, dtype)).cast("B"))


def cast(data: bytes | bytearray, have: str, want: str) -> bytes | bytearray:
    """Row-major bytes of one float type as another, rounded to nearest even as torch rounds."""
    if have == want:
        return data
    wide = _wide(data, have)
    if want == "float32":
        return bytes(wide.tobytes())
    if want == "float16":
        with np.errstate(over="ignore"):
            return bytes(wide.astype("<f2").tobytes())
    if want == "bfloat16":
        bits = wide.view("<u4")
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        quiet = (bits >> 16) | np.uint32(0x0040)
        return bytes(np.where(np.isnan(wide), quiet, rounded).astype("<u2").tobytes())
    raise UnusableRequest(f"{have} cannot be written as {want}")


def _wide(data: bytes | bytearray, have: str) -> NDArray[Any]:
    if have == "bfloat16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    if have == "float16":
        return np.frombuffer(data, "<f2").astype("<f4")
    if have == "float32":
        return np.frombuffer(data, "<f4")
    raise UnusableRequest(f"{have} cannot be cast")
