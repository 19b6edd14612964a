"""The ``.metadata`` of torch.distributed.checkpoint as plain records, read without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptengine.errors import Damaged, NotFound, UnreadableFormat
from ckptengine.sources.port import Files
from ckptengine.sources.stored import Dtype
from ckptengine.sources.unpickle import MAX_PICKLE_BYTES, Placeholder, loads

METADATA = ".metadata"
_PER_RANK = re.compile(r"__\d+\.metadata")
_INT = {int}
_MODULE = "torch.distributed.checkpoint.metadata."


@dataclass(frozen=True, slots=True)
class Item:
    """Where one written item lies: ``nbytes`` bytes at ``offset`` of a file."""

    path: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and its item; an empty box may have none."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    item: Item | None


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor as the metadata describes it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(slots=True)
class DcpMetadata:
    """Everything a checkpoint holds, under its own keys.

    ``paths`` gives the nesting of flattened keys (a tuple of dict keys and list positions), where torch recorded it.
    """

    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    objects: dict[str, Item | None] = field(default_factory=dict)
    paths: dict[str, tuple[object, ...]] = field(default_factory=dict)


def metadata_files(files: Files, entry: str | None = None) -> list[str]:
    """The metadata files of a checkpoint: ``.metadata``, or one per rank where it was saved without collectives."""
    if entry is not None:
        return [entry]
    names = files.entries()
    return [METADATA] if METADATA in names else [name for name in names if _PER_RANK.fullmatch(name)]


def read_metadata(files: Files, entry: str | None = None) -> DcpMetadata:
    """The metadata of the checkpoint beneath ``files``.

    Raises `NotFound` when there is none, `UnreadableFormat` or `Damaged` naming the file when it is not readable.
    """
    paths = metadata_files(files, entry)
    if not paths:
        raise NotFound(f"{files.root} has no {METADATA}: the checkpoint was not finished, or files are missing")
    merged = DcpMetadata()
    for path in paths:
        shown = f"{files.root.rstrip('/')}/{path}"
        if files.size(path) > MAX_PICKLE_BYTES:
            raise UnreadableFormat(f"{shown} has {files.size(path)} bytes, too many to be a checkpoint's metadata")
        _Reader(shown, merged).add(loads(files.read(path, 0, files.size(path)), what=shown))
    return merged


class _Reader:
    """Adds one metadata object to the merged ones."""

    def __init__(self, shown: str, into: DcpMetadata) -> None:
        self._shown = shown
        self._into = into

    def add(self, root: object) -> None:
        if not isinstance(root, Placeholder) or not isinstance(root.get("state_dict_metadata"), dict):
            raise UnreadableFormat(f"{self._shown} is a pickle, but not the metadata of torch.distributed.checkpoint")
        places = self._places(root.get("storage_data"))
        for key, entry in root.get("state_dict_metadata").items():
            if not isinstance(key, str) or not isinstance(entry, Placeholder):
                raise Damaged(f"{self._shown}: the entry of {key!r} is not what torch writes")
            if entry.class_name == _MODULE + "BytesStorageMetadata":
                self._into.objects[key] = places.get((key, ())) or self._into.objects.get(key)
            elif entry.class_name == _MODULE + "TensorStorageMetadata":
                self._tensor(key, entry, places)
            else:
                raise UnreadableFormat(f"{self._shown}: {key!r} is stored as {entry.class_name}, which is not known")
        nesting = root.get("planner_data")
        if isinstance(nesting, dict):
            self._into.paths.update((key, path) for key, path in nesting.items() if isinstance(path, tuple))

    def _places(self, data: object) -> Mapping[tuple[str, tuple[int, ...]], Item]:
        """Items by key and offsets of the box (no offsets for objects)."""
        if not isinstance(data, dict):
            raise UnreadableFormat(f"{self._shown} has no record of where its items lie; it has another storage layer")
        places: dict[tuple[str, tuple[int, ...]], Item] = {}
        for index, info in data.items():
            about, place = _attributes(index), _attributes(info)
            key: Any = about.get("fqn")
            corner: Any = about.get("offset")
            path: Any = place.get("relative_path")
            offset: Any = place.get("offset")
            nbytes: Any = place.get("length")
            corner = () if corner is None else corner
            proper = isinstance(key, str) and isinstance(path, str) and isinstance(corner, tuple) and _whole(corner)
            if not proper or not _whole((offset, nbytes)):
                raise UnreadableFormat(f"{self._shown}: the place of {key!r} is not recorded as torch's files do")
            steps = place.get("transform_descriptors")
            if steps:
                raise UnreadableFormat(
                    f"{self._shown}: {key!r} is stored by way of {steps}; save it without extensions"
                )
            places[key, corner] = Item(path, offset, nbytes)
        return places

    def _tensor(self, key: str, entry: Placeholder, places: Mapping[tuple[str, tuple[int, ...]], Item]) -> None:
        about = _attributes(entry)
        dtype = _dtype(about.get("properties"))
        shape: Any = about.get("size")
        boxes: Any = about.get("chunks")
        if dtype is None or not isinstance(shape, tuple) or not _whole(shape) or not isinstance(boxes, list):
            raise UnreadableFormat(f"{self._shown}: {key!r} has no proper shape or an element type that is not known")
        chunks = {(chunk.offsets, chunk.shape): chunk for chunk in self._known_chunks(key, dtype, shape)}
        for box in boxes:
            place = _attributes(box)
            corner: Any = place.get("offsets")
            extent: Any = place.get("sizes")
            proper = isinstance(corner, tuple) and isinstance(extent, tuple) and _whole(corner) and _whole(extent)
            if not proper or not len(corner) == len(extent) == len(shape):
                raise Damaged(f"{self._shown}: {key!r} has a chunk without proper offsets and sizes")
            item = places.get((key, corner)) or (places.get((key, ())) if len(boxes) == 1 else None)
            if item is None and 0 not in extent:
                raise Damaged(f"{self._shown}: no file is recorded for the chunk of {key!r} at {corner}")
            chunks[corner, extent] = Chunk(corner, extent, item)
        self._into.tensors[key] = TensorRecord(dtype, shape, tuple(chunks.values()))

    def _known_chunks(self, key: str, dtype: str, shape: tuple[int, ...]) -> Iterable[Chunk]:
        """Chunks of the same tensor that another rank's metadata brought."""
        known = self._into.tensors.get(key)
        if known is None:
            return ()
        if (known.dtype, known.shape) != (dtype, shape):
            raise Damaged(f"{self._shown}: {key!r} is {dtype} {shape} here and {known.dtype} {known.shape} elsewhere")
        return known.chunks


def _attributes(record: object) -> Mapping[str, Any]:
    """The attributes of a record, of which a checkpoint has very many: its ``__dict__``, or its slots."""
    state = record.state if isinstance(record, Placeholder) else None
    if type(state) is dict:
        return state
    parts = state if isinstance(state, tuple) else ()
    return {name: value for part in reversed(parts) if isinstance(part, dict) for name, value in part.items()}


def _whole(numbers: tuple[Any, ...]) -> bool:
    return _INT.issuperset(map(type, numbers)) and min(numbers, default=0) >= 0


def _dtype(properties: object) -> str | None:
    """The element type: the first of the properties' state, which older torch pickles as attributes."""
    if not isinstance(properties, Placeholder):
        return None
    state = properties.state
    found = state[0] if isinstance(state, tuple) and state and isinstance(state[0], Dtype) else properties.get("dtype")
    return str(found) if isinstance(found, Dtype) else None
