"""A checkpoint of torch.distributed.checkpoint as a source."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptengine.errors import CheckpointError, Damaged, NotFound, UnreadableFormat
from ckptengine.layout.box import Box
from ckptengine.layout.tensor import Fragment, LogicalTensor
from ckptengine.sources.dcp.metadata import Chunk, DcpMetadata, Item, TensorRecord, metadata_files, read_metadata
from ckptengine.sources.plain import DROPPED, plain
from ckptengine.sources.port import Files, Format, Opening, Source
from ckptengine.sources.safetensors.header import Header, read_header
from ckptengine.sources.smalltensors import as_plain
from ckptengine.sources.stored import StoredTensor
from ckptengine.sources.torchzip import TorchZip
from ckptengine.sources.unpickle import Placeholder

GROUPS = ".param_groups."
STATE = ".state."
MAX_FORMS = 1024
MAX_HEAD_BYTES = 1 << 14
END_BYTES = 22
"""The record that ends a zip: it counts what is in it and says where its directory lies."""


@dataclass(frozen=True, slots=True)
class _Form:
    """What the items of all boxes of one type and shape have in common: everything before their data, and the end."""

    head: bytes
    end: bytes
    strides: tuple[int, ...] | None


class DcpItems:
    """The tensors that items hold: files of torch.save, or entries of safetensors data, inside of larger files."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._headers: dict[tuple[str, int], Header] = {}
        self._forms: dict[tuple[str, tuple[int, ...], int], _Form] = {}

    def fragment(self, key: str, record: TensorRecord, chunk: Chunk) -> Fragment:
        """The bytes of one chunk; `Damaged` when the item does not hold what the metadata says."""
        item = chunk.item
        box = Box(chunk.offsets, chunk.shape)
        if item is None:
            return Fragment(box, "", 0)
        kind = (record.dtype, chunk.shape, item.nbytes)
        form = self._forms.get(kind)
        if form is not None and self._has_form(item, form):
            return Fragment(box, item.path, item.offset + len(form.head), form.strides)
        if self._is_zip(item):
            stored = TorchZip(self._files, item.path, item.offset, item.nbytes).load()
            if isinstance(stored, Placeholder):
                raise UnreadableFormat(
                    f"{self._shown(item)}: a chunk of {key!r} is a {stored.class_name}, whose elements are not simply "
                    "bytes of the file; save it dense, and a lazy view by resolve_conj() or resolve_neg()"
                )
            if not isinstance(stored, StoredTensor):
                raise Damaged(f"{self._shown(item)} holds no tensor, but should hold a chunk of {key!r}")
            self._check(key, record, chunk, item, stored.dtype, stored.shape)
            found = stored.fragment(chunk.offsets)
            if form is None and len(self._forms) < MAX_FORMS and found.offset - item.offset <= MAX_HEAD_BYTES:
                head = self._files.read(item.path, item.offset, found.offset - item.offset)
                self._forms[kind] = _Form(head, self._end(item), found.strides)
            return found
        if (item.path, item.offset) not in self._headers:
            self._headers[item.path, item.offset] = read_header(self._files, item.path, item.offset)
        entry = self._headers[item.path, item.offset].entries.get(key)
        if entry is None:
            raise Damaged(f"{self._shown(item)} holds no {key!r}, but should")
        self._check(key, record, chunk, item, entry.dtype, entry.shape)
        return Fragment(box, item.path, entry.offset)

    def _has_form(self, item: Item, form: _Form) -> bool:
        """Whether an item is laid out like another one, which was read in full: of 10,000 tensors most are alike."""
        return self._files.read(item.path, item.offset, len(form.head)) == form.head and self._end(item) == form.end

    def _end(self, item: Item) -> bytes:
        return self._files.read(item.path, item.offset + item.nbytes - END_BYTES, END_BYTES)

    def value(self, item: Item) -> object:
        """The plain value of an object's item, with the small tensors that it holds (see `as_plain`).

        `UnreadableFormat` for an object that holds a large one: it would be lost.
        """

        def held(tensor: StoredTensor) -> object:
            made = as_plain(tensor, self._files)
            if made is DROPPED:
                raise UnreadableFormat(
                    f"{self._shown(item)} is an object of torch.save with a tensor of {tensor.dtype} "
                    f"{list(tensor.shape)} in it, too large for a value; give torch.distributed.checkpoint.save its "
                    "state_dict, whose tensors have keys of their own"
                )
            return made

        return plain(self.load(item), held)

    def load(self, item: Item) -> object:
        """The object of an item, its tensors as `StoredTensor`."""
        return TorchZip(self._files, item.path, item.offset, item.nbytes).load()

    def zips(self, metadata: DcpMetadata) -> Iterator[tuple[str, int, int]]:
        """See `ckptengine.sources.port.HoldsZips`."""
        chunks = (chunk.item for record in metadata.tensors.values() for chunk in record.chunks)
        for item in (*chunks, *metadata.objects.values()):
            with contextlib.suppress(NotFound):  # told of the tensors that lie there
                if item is not None and self._is_zip(item):
                    yield item.path, item.offset, item.nbytes

    def _is_zip(self, item: Item) -> bool:
        head = self._files.read(item.path, item.offset, min(9, item.nbytes))
        return head[:4] == b"PK\x03\x04" and head[8:9] != b"{"

    def _shown(self, item: Item) -> str:
        return f"{self._files.root.rstrip('/')}/{item.path} at byte {item.offset}"

    def _check(
        self, key: str, record: TensorRecord, chunk: Chunk, item: Item, dtype: str, shape: tuple[int, ...]
    ) -> None:
        if (dtype, shape) != (record.dtype, chunk.shape):
            raise Damaged(
                f"{self._shown(item)} holds {dtype} {list(shape)}, but the metadata says that {key!r} at "
                f"{list(chunk.offsets)} is {record.dtype} {list(chunk.shape)}; a file was replaced by another"
            )


class DcpSource:
    """Tensors under the user's own keys, ``<key>.state.<parameter>.<state>`` of optimizers without their ``state``."""

    format = "dcp"

    def __init__(self, files: Files, metadata: DcpMetadata, step: int | None = None) -> None:
        self.files = files
        self.step = step
        self.metrics: Mapping[str, float] = {}
        self._metadata = metadata
        self._items = DcpItems(files)
        self._keys = canonical_names(metadata.tensors, metadata.objects)

    def names(self) -> Sequence[str]:
        """Canonical names, in the metadata's order."""
        return list(self._keys)

    def tensor(self, name: str) -> LogicalTensor:
        """The tensor under a canonical name.  Reads the few bytes around each chunk that say where its data begins."""
        key = self._keys.get(name)
        if key is None:
            raise NotFound(f"{self.files.root} has no tensor {name!r}")
        record = self._metadata.tensors[key]
        solid = [chunk for chunk in record.chunks if 0 not in chunk.shape]
        try:
            fragments = [self._items.fragment(key, record, chunk) for chunk in solid]
        except NotFound as error:
            raise NotFound(f"{error}; it holds a part of {name!r}: fetch the missing file") from error
        return LogicalTensor(name, record.dtype, record.shape, fragments, meta={"key": key})

    def path(self, name: str) -> tuple[object, ...] | None:
        """See `ckptengine.sources.port.KnowsPaths`: as torch flattened it."""
        return self._metadata.paths.get(self._keys.get(name, ""))

    def zips(self) -> Iterable[tuple[str, int, int]]:
        """See `ckptengine.sources.port.HoldsZips`."""
        return self._items.zips(self._metadata)

    def aliases(self) -> Mapping[str, str]:
        """None: the format does not record what is tied."""
        return {}

    def values(self) -> object:
        """Every object, nested as it was saved; None in the place of a tensor in a list, as elsewhere."""
        root: dict[object, object] = {}
        for key, item in self._metadata.objects.items():
            if item is None:
                raise Damaged(f"{self.files.root}: no file is recorded for the value {key!r}")
            try:
                value = self._items.value(item)
            except CheckpointError as error:
                raise type(error)(f"value {key!r}: {error}") from error
            put(root, self._metadata.paths.get(key) or (key,), value)
        for key in self._metadata.tensors:
            _reserve(root, self._metadata.paths.get(key, ()))
        return with_lists(root)


def canonical_names(tensors: Iterable[str], objects: Iterable[str]) -> dict[str, str]:
    """Canonical name -> key.  An optimizer is a prefix with both ``.param_groups.`` and ``.state.`` beneath it."""
    tensors = list(tensors)
    optimizers = {key.partition(GROUPS)[0] for keys in (objects, tensors) for key in keys if GROUPS in key}
    names: dict[str, str] = {}
    moved: list[tuple[str, str]] = []
    for key in tensors:
        at = key.find(STATE)
        while at >= 0 and key[:at] not in optimizers:
            at = key.find(STATE, at + 1)
        if at < 0:
            names[key] = key
        else:
            moved.append((key[:at] + "." + key[at + len(STATE) :], key))
    taken = {name for name, _ in moved} & names.keys()
    order = {key: name for name, key in names.items()} | {key: key if name in taken else name for name, key in moved}
    return {order[key]: key for key in tensors}


def put(root: dict[object, object], path: tuple[object, ...], value: object) -> None:
    """Set a leaf of nested dicts; list positions become integer keys until `with_lists`."""
    inner = root
    for part in path[:-1]:
        inner = inner.setdefault(_Index(part) if type(part) is int else part, {})  # type: ignore[assignment]
        if not isinstance(inner, dict):
            raise Damaged(f"the path {path!r} of a value leads through another value")
    inner[_Index(path[-1]) if type(path[-1]) is int else path[-1]] = value


def _reserve(root: dict[object, object], path: tuple[object, ...]) -> None:
    """None at the last list position on a tensor's path, so that a list of which only tensors are left is a list."""
    last = max((at for at, part in enumerate(path) if type(part) is int), default=-1)
    inner = root
    for at, part in enumerate(path[: last + 1]):
        key = _Index(part) if type(part) is int else part
        if at == last:
            inner.setdefault(key, None)
            return
        if inner.get(key) is None:
            inner[key] = {}
        found = inner[key]
        if not isinstance(found, dict):
            return
        inner = found


def with_lists(value: object) -> object:
    """The same values with each dict that has list positions for keys as a list."""
    if not isinstance(value, dict):
        return value
    if value and all(type(key) is _Index for key in value):
        size = max(key.position for key in value) + 1
        if size <= 1 << 24:
            items: list[object] = [None] * size
            for key, item in value.items():
                items[key.position] = with_lists(item)
            return items
    return {key.position if type(key) is _Index else key: with_lists(item) for key, item in value.items()}


class _Index:
    """A position in a list, as a key."""

    __slots__ = ("position",)

    def __init__(self, position: int) -> None:
        self.position = position

    def __eq__(self, other: object) -> bool:
        return type(other) is _Index and other.position == self.position

    def __hash__(self) -> int:
        return hash(("_Index", self.position))


def _probe(opening: Opening) -> bool:
    if opening.entry is not None:
        return opening.entry.endswith(".metadata")
    return bool(metadata_files(opening.files))


def _open(opening: Opening) -> Source:
    return DcpSource(opening.files, read_metadata(opening.files, opening.entry), opening.step)


FORMAT = Format("dcp", _probe, _open)
