"""Write the weights as Megatron's legacy ranks: one folder per tensor-, pipeline- and expert-parallel rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptengine.layout.box import row_major_strides
from ckptengine.layout.dtypes import itemsize
from ckptengine.sources.emit import Global, Instance, Tensor, storage_of
from ckptengine.sources.megatron.legacy_layout import LegacyLayout, Piece, Rank
from ckptengine.sources.stream import stream_boxes, stream_memory_bytes
from ckptengine.sources.torchrecords import small_records
from ckptengine.sources.typed import plain_values
from ckptengine.sources.writer import Document, Job, Target, Unit
from ckptengine.sources.zipwriter import ZipWriter, zip_bytes

_ZEROS = bytes(1 << 16)


class LegacyWriter:
    """Writes what `LegacyLayout` says that each rank holds."""

    def __init__(self, job: Job) -> None:
        self._job = job
        plain = plain_values(job)
        self._values: dict[str, Any] = dict(plain) if isinstance(plain, dict) else {}
        self._layout = LegacyLayout(job, self._values)

    def units(self) -> Sequence[Unit]:
        """One per rank."""
        units = []
        for rank in self._layout.ranks():
            path = self._path(rank)
            chunks = self._chunks(rank)
            pieces = [piece for chunk in chunks for piece in chunk]
            small = small_records(self._value(chunks))
            names = [*small, *(f"data/{number}" for number in range(len(pieces)))]
            sizes = [self._nbytes(piece) for piece in pieces]
            size = zip_bytes(names, [*map(len, small.values()), *sizes])
            tensors = tuple(dict.fromkeys(piece.tensor for piece in pieces))
            read = sum(size - piece.padding * self._row_bytes(piece) for size, piece in zip(sizes, pieces, strict=True))
            units.append(Unit(path, tensors, read, size, stream_memory_bytes(self._job), (path,)))
        return units

    def write(self, unit: Unit, target: Target) -> Document:
        """One rank's file."""
        rank = next(rank for rank in self._layout.ranks() if self._path(rank) == unit.key)
        chunks = self._chunks(rank)
        with target.create(unit.key) as sink:
            zipped = ZipWriter(sink)
            for record, data in small_records(self._value(chunks)).items():
                zipped.add(record, data)
            for number, piece in enumerate(piece for chunk in chunks for piece in chunk):
                zipped.begin(f"data/{number}")
                stream_boxes(self._job, [(piece.tensor, box) for box in piece.boxes], zipped.write, lambda _: None)
                for zeros in _zeros(piece.padding * self._row_bytes(piece)):
                    zipped.write(zeros)
            zipped.finish()
        return {}

    def _path(self, rank: Rank) -> str:
        return f"iter_{self._job.step or 0:07d}/{self._layout.folder(rank)}/model_optim_rng.pt"

    def _chunks(self, rank: Rank) -> list[list[Piece]]:
        return [self._layout.pieces(rank, chunk) for chunk in range(self._layout.chunks)]

    def _nbytes(self, piece: Piece) -> int:
        return sum(box.size for box in piece.boxes) * self._width(piece) + piece.padding * self._row_bytes(piece)

    def _row_bytes(self, piece: Piece) -> int:
        size = 1
        for extent in piece.shape[1:]:
            size *= extent
        return size * self._width(piece)

    def _width(self, piece: Piece) -> int:
        return itemsize(self._job.tensor(piece.tensor).dtype)

    def _value(self, chunks: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        models: dict[str, dict[str, Tensor]] = {}
        number = 0
        for chunk, pieces in enumerate(chunks):
            model = models[f"model{chunk}" if len(chunks) > 1 else "model"] = {}
            for piece in pieces:
                dtype = self._job.tensor(piece.tensor).dtype
                storage = storage_of(str(number), dtype, self._nbytes(piece), itemsize(dtype))
                model[piece.local] = Tensor(storage, dtype, piece.shape, row_major_strides(piece.shape))
                number += 1
        return {
            "args": Instance(Global("argparse", "Namespace"), self._arguments()),
            "checkpoint_version": 3.0,
            "iteration": self._job.step or 0,
            **models,
        }

    def _arguments(self) -> Mapping[str, Any]:
        known = self._values.get("args")
        layout = self._layout
        arguments = dict(known) if isinstance(known, dict) else {"num_layers": layout.layers}
        return {
            **arguments,
            "tensor_model_parallel_size": layout.tp,
            "pipeline_model_parallel_size": layout.pp,
            "virtual_pipeline_model_parallel_size": layout.chunks if layout.chunks > 1 else None,
            "expert_model_parallel_size": layout.ep,
            "expert_tensor_parallel_size": layout.etp,
        }


def _zeros(nbytes: int) -> Iterator[memoryview]:
    for start in range(0, nbytes, len(_ZEROS)):
        yield memoryview(_ZEROS)[: min(len(_ZEROS), nbytes - start)]
