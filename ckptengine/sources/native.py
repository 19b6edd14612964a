"""Our own format as a source: a committed step of a root, or a step directory named by itself."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from ckptengine.errors import CheckpointError, Damaged, NotFound, StorageFailed, Truncated, UnreadableFormat
from ckptengine.layout import layout_json
from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.sharding import Layout
from ckptengine.layout.tensor import Fragment, LogicalTensor
from ckptengine.plan.write import stored_overlapping, stored_pieces, writer_to_json
from ckptengine.sources.port import Files, Format, Opening
from ckptengine.state.readable import readable
from ckptengine.store import manifest as manifests
from ckptengine.store import names
from ckptengine.store.history import CommitRef, History
from ckptengine.store.reader import Reader
from ckptengine.store.root import Root

log = logging.getLogger("ckptengine")


FOREIGN = "foreign"
"""Tag around values in a manifest that are not the encoding of a live state."""


KEPT_PLACES = 4096
"""Kinds of tensors (sharding, writer and shape) whose places are remembered ..."""

KEPT_PIECES = 64
"""... where they have at most this many pieces."""


class StoredFragments(Sequence[Fragment]):
    """The fragments of one stored tensor, found when asked for: a reader of one slice opens few indexes."""

    def __init__(self, source: NativeSource, ordinal: int) -> None:
        self._source, self._ordinal = source, ordinal

    def overlapping(self, box: Box) -> Iterator[Fragment]:
        """The fragments that share an element with ``box``."""
        record = self._source.manifest.tensors[self._ordinal]
        layout = self._source.layout(record.layout)
        for rank, ordinal, piece in stored_overlapping(layout, record.writer, record.shape, box):
            yield self._fragment(rank, ordinal, piece.box)

    def _fragment(self, rank: int, ordinal: int, box: Box) -> Fragment:
        reader = self._source.reader
        row = reader.extent(rank, self._ordinal, ordinal)
        record = reader.tail(rank).index[row]
        tensor = self._source.manifest.tensors[self._ordinal]
        if int(record["nbytes"]) != box.size * itemsize(tensor.dtype):
            raise UnreadableFormat(f"{reader.path(rank)}: piece {box} of {tensor.name!r} has {record['nbytes']} bytes")
        return Fragment(box, reader.path(rank), int(record["offset"]))

    @functools.cached_property
    def _all(self) -> tuple[Fragment, ...]:
        places = self._source.places(self._source.manifest.tensors[self._ordinal])
        return tuple(self._fragment(rank, ordinal, box) for rank, ordinal, box in places)

    @overload
    def __getitem__(self, index: int) -> Fragment: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Fragment]: ...
    def __getitem__(self, index: int | slice) -> Fragment | Sequence[Fragment]:
        return self._all[index]

    def __len__(self) -> int:
        return len(self._all)


class NativeSource:
    """See `Source` and `Verifying`."""

    format = "native"

    def __init__(self, files: Files, manifest: manifests.Manifest, prefix: str) -> None:
        self.files = files
        self.manifest = manifest
        self._prefix = prefix
        self.reader = Reader(manifest, files, prefix)
        self._ordinals = {tensor.name: i for i, tensor in enumerate(manifest.tensors)}
        self._layouts: dict[int, Layout] = {}
        self._places: dict[tuple[object, ...], Sequence[tuple[int, int, Box]]] = {}

    @property
    def of_root(self) -> bool:
        """Whether it was opened beneath a root, not as a step directory by itself."""
        return self._prefix != ""

    @property
    def step(self) -> int | None:
        return self.manifest.step

    @property
    def metrics(self) -> Mapping[str, float]:
        return self.manifest.metrics

    def names(self) -> Sequence[str]:
        return [*self._ordinals, *self.manifest.aliases]

    def aliases(self) -> Mapping[str, str]:
        return self.manifest.aliases

    def layout(self, number: int) -> Layout:
        """A sharding of the manifest, decoded once."""
        if number not in self._layouts:
            layout = layout_json.from_json(self.manifest.layouts[number])
            if any(rank >= self.manifest.world for rank in layout.holders()):
                raise UnreadableFormat(
                    f"step {self.manifest.step}: a sharding names ranks beyond {self.manifest.world}"
                )
            self._layouts[number] = layout
        return self._layouts[number]

    def places(self, record: manifests.TensorRecord) -> Sequence[tuple[int, int, Box]]:
        """(rank, ordinal among the rank's pieces, box) of every stored piece; tensors of a model are mostly alike."""
        key = (record.layout, record.writer, record.shape)
        found = self._places.get(key)
        if found is None:
            layout = self.layout(record.layout)
            found = [
                (rank, ordinal, piece.box)
                for rank in layout.holders()
                for ordinal, piece in enumerate(stored_pieces(layout, record.writer, record.shape, rank))
                if piece.box.size
            ]
            if len(found) <= KEPT_PIECES and len(self._places) < KEPT_PLACES:
                self._places[key] = found
        return found

    def tensor(self, name: str) -> LogicalTensor:
        ordinal = self._ordinals.get(self.manifest.aliases.get(name, name))
        if ordinal is None:
            raise NotFound(f"no tensor {name!r} in step {self.manifest.step}; `ckptengine show --tensors` lists them")
        record = self.manifest.tensors[ordinal]
        sharding, writer = self.manifest.layouts[record.layout], writer_to_json(record.writer)
        meta: dict[str, object] = {"sharding": sharding, "writer": writer}
        return LogicalTensor(name, record.dtype, record.shape, StoredFragments(self, ordinal), record.digest, meta)

    def encoded_values(self) -> Any:
        """The typed encoding of the live state's values, None where they were converted from another format."""
        return None if self._foreign_values() is not None else self.manifest.values

    def _foreign_values(self) -> dict[str, Any] | None:
        values = self.manifest.values
        return values if isinstance(values, dict) and values.get("$") == FOREIGN else None

    def rank_values(self, rank: int) -> Any:
        """The typed encoding of the values that belong to one rank alone."""
        return self.reader.values(rank)

    def values(self) -> object:
        foreign = self._foreign_values()
        return readable(self.manifest.values if foreign is None else foreign["v"], self._array)

    def _array(self, name: str, dtype: str, shape: tuple[int, ...]) -> object:
        """A large numpy array of the state, which is stored like a tensor."""
        data = bytearray(self.tensor(name).nbytes)
        done = 0
        for fragment in self.tensor(name).fragments:
            count = fragment.box.size * itemsize(self.tensor(name).dtype)
            self.reader.read_verified(fragment.file, fragment.offset, memoryview(data)[done : done + count])
            done += count
        return np.frombuffer(data, np.dtype(dtype)).reshape(shape)

    def read_verified(self, path: str, offset: int, view: memoryview) -> None:
        self.reader.read_verified(path, offset, view)


def open_commit(root: Root, ref: CommitRef, files: Files) -> NativeSource:
    """The checkpoint of one manifest; ``files`` are those beneath the root."""
    return NativeSource(files, root.manifest(ref), f"{names.step_dir(ref.step)}/")


def _probe(opening: Opening) -> bool:
    entries = opening.files.entries()
    return f"{names.ATTEMPTS}/" in entries or any(
        names.MANIFEST_PATTERN.match(entry) or names.STEP_PATTERN.match(entry.rstrip("/")) for entry in entries
    )


def _open(opening: Opening) -> NativeSource:
    files = opening.files
    commits = sorted(_manifests(files))
    if commits:  # a step directory named by itself
        return _read(files, commits[-1], "", named=False)
    line = History(files).line()
    if opening.step is not None and opening.step not in line:
        have = ", ".join(map(str, list(line)[-10:])) or "none"
        raise NotFound(f"{files.root}: no committed step {opening.step}; committed steps: {have}")
    if not line:
        raise NotFound(f"{files.root}: no committed checkpoint beneath it")
    if opening.step is not None:
        return _read(files, line[opening.step], f"{names.step_dir(opening.step)}/")
    return _newest_good(files, list(reversed(line.values())))


def _newest_good(files: Files, refs: Sequence[CommitRef]) -> NativeSource:
    """The newest commit whose manifest holds and whose rank files are there in their sizes."""
    first: CheckpointError | None = None
    for ref in refs:
        try:
            source = _read(files, ref, f"{names.step_dir(ref.step)}/")
            if files.local_path("") is not None:  # elsewhere each look is a request
                source.reader.check_sizes()
            return source
        except (Damaged, NotFound, UnreadableFormat, StorageFailed) as error:
            log.warning("step %d is passed over: %s", ref.step, error)
            first = first or error
    assert first is not None
    raise first


def _read(files: Files, ref: CommitRef, prefix: str, *, named: bool = True) -> NativeSource:
    path = prefix + names.manifest(ref.attempt, ref.save)
    size = files.size(path)
    if size > manifests.MANIFEST_LIMIT_BYTES:
        raise Truncated(f"{files.root}/{path} has {size} bytes, more than a manifest can have")
    manifest = manifests.decode(files.read(path, 0, size), f"{files.root}/{path}")
    found = CommitRef(manifest.step if named else ref.step, manifest.attempt, manifest.save)
    if found != ref:
        raise UnreadableFormat(f"{files.root}/{path}: is the manifest of {found}; the file or folder was renamed")
    return NativeSource(files, manifest, prefix)


def _manifests(files: Files) -> Iterator[CommitRef]:
    for entry in files.entries():
        match = names.MANIFEST_PATTERN.match(entry)
        if match:
            yield CommitRef(0, int(match[1]), int(match[2]))


FORMAT = Format("native", _probe, _open, picks_step=True)
