"""Write a checkpoint of torch.distributed.checkpoint, which ``torch.distributed.checkpoint.load`` loads.

Each file holds items one after another, each a small file of torch.save with one box of one tensor; ``.metadata`` says
what lies where and is written last.  Optimizers get torch's own keys (``<key>.state.<parameter>.<state>`` and
``<key>.param_groups``).  Tied names share one item.

With ``--layout`` every tensor is cut on its first dimension for as many ranks as the layout has, as FSDP does; without,
files are cut by size.  DCP loads either onto any layout.

Options: ``file_bytes`` (default 1 GiB: the most data in one file without a layout).
"""

from __future__ import annotations

import functools
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from ckptengine.errors import UnusableRequest
from ckptengine.layout.box import Box, row_major_strides
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.dcp.metadata import METADATA
from ckptengine.sources.emit import Call, Global, Instance, Pairs, Tensor, dumps, size, storage_of
from ckptengine.sources.nesting import place_in
from ckptengine.sources.optimizers import FLAT_STATE, Optimizer, optimizers_in, split_names
from ckptengine.sources.smalltensors import as_stored, is_plain_tensor
from ckptengine.sources.stream import in_file_order, stream_boxes, stream_memory_bytes
from ckptengine.sources.typed import plain_values
from ckptengine.sources.writer import Document, Job, Sink, Target, Unit
from ckptengine.sources.zipwriter import ALIGNMENT, ZipForm, ZipWriter

FILE_BYTES = 1 << 30
VERSION = "1.0.0"
_METADATA = "torch.distributed.checkpoint.metadata"

Part = tuple[str, Box]
Path = tuple[object, ...]


class DcpWriter:
    """The writer of ``--to dcp``.

    ``nested`` says that values are flattened, as torch does; else those at the top are one item each, their tensors
    (see `ckptengine.sources.smalltensors`) tensors again.
    """

    format = "dcp"
    options = ("file_bytes",)
    ranked = True

    def __init__(self, *, nested: bool = True) -> None:
        self._nested = nested

    def units(self, job: Job) -> Sequence[Unit]:
        """One unit per file."""
        self._check_keys(job)
        return [_unit(job, path, parts) for path, parts in _files(job).items()]

    def write(self, job: Job, unit: Unit, target: Target) -> Document:
        """The items of one file; says where each lies."""
        parts = _files(job)[unit.key]
        with target.create(unit.key) as sink:
            writer = _ItemWriter(job, parts, sink)
            stream_boxes(job, parts, writer.write, writer.begin)
            writer.finish()
        return {"items": writer.items}

    def finish(self, job: Job, results: Mapping[str, Document], target: Target) -> None:
        """The values, and the metadata last."""
        keys, paths = _keys(job)
        places: dict[str, list[tuple[tuple[int, ...], tuple[int, ...], str, int, int]]] = {}
        for path, result in results.items():
            for name, offsets, shape, offset, nbytes in result["items"]:
                places.setdefault(name, []).append((tuple(offsets), tuple(shape), path, offset, nbytes))
        records: list[tuple[object, object]] = []
        storage: list[tuple[object, object]] = []
        for name, key in keys.items():
            chunks = sorted(places[job.aliases.get(name, name)])
            records.append((key, _tensor_record(job.tensor(name), chunks)))
            storage += [
                (_index(key, offsets, number), _place(path, offset, nbytes))
                for number, (offsets, _, path, offset, nbytes) in enumerate(chunks)
            ]
        path = f"__{len(results)}_0.distcp"
        for key, nesting, place in _write_values(path, target, self._leaves(job, paths)):
            records.append((key, Instance(Global(_METADATA, "BytesStorageMetadata"), {})))
            storage.append((_index(key), place))
            paths[key] = nesting
        state = {
            "state_dict_metadata": Pairs(records),
            "planner_data": dict(paths),
            "storage_data": Pairs(storage),
            "storage_meta": None,
            "version": VERSION,
        }
        with target.create(METADATA) as sink:
            sink.write(dumps(Instance(Global(_METADATA, "Metadata"), state), METADATA))

    def _leaves(self, job: Job, paths: Mapping[str, Path]) -> list[tuple[Path, object]]:
        """The values that are items, flattened around the ``paths`` of tensors or each key at the top whole."""
        values = plain_values(job)
        if self._nested:
            held = {path[:size] for path in paths.values() for size in range(1, len(path) + 1)}
            return list(_leaves(values, (), held))
        return [((key,), value) for key, value in values.items()] if isinstance(values, dict) else []

    def _check_keys(self, job: Job) -> None:
        """Refuse what torch refuses to save: of two things under one key only one would be left."""
        keys, paths = _keys(job)
        counts = Counter(keys.values()) + Counter(_key(path) for path, _ in self._leaves(job, paths))
        twice = [key for key, count in counts.items() if count > 1]
        if twice:
            raise UnusableRequest(
                f"{twice[0]!r} would be the key of two tensors or values, and dcp has one place for them; convert to "
                "native or zarr, or rename the tensor with rules"
            )


class _ItemWriter:
    """Appends one zip per part to a sink, as the parts' bytes come."""

    def __init__(self, job: Job, parts: Sequence[Part], sink: Sink) -> None:
        self._job = job
        self._parts = parts
        self._sink = sink
        self._form: ZipForm | None = None
        self._crc32 = 0
        self._start = 0
        self.items: list[list[Any]] = []

    def begin(self, number: int) -> None:
        """End the item before and begin that of part ``number``."""
        self.finish()
        name, box = self._parts[number]
        self._start = self._sink.position
        self._form = _form(self._job.tensor(name).dtype, box.shape)
        self._crc32 = 0
        self._sink.write(self._form.head)
        self.items.append([name, list(box.offsets), list(box.shape), self._start, self._form.nbytes])

    def write(self, data: memoryview) -> None:
        """Append to the item that was begun."""
        self._crc32 = zlib.crc32(data, self._crc32)
        self._sink.write(data)

    def finish(self) -> None:
        """End the last item."""
        if self._form is not None:
            self._sink.write(self._form.tail(self._crc32))
            self._form = None


@functools.lru_cache(maxsize=4096)
def _form(dtype: str, shape: tuple[int, ...]) -> ZipForm:
    """The item of any box of this type and shape."""
    nbytes = math.prod(shape) * itemsize(dtype)
    storage = storage_of("0", dtype, nbytes, itemsize(dtype))
    pickle = dumps(Tensor(storage, dtype, shape, row_major_strides(shape)))
    return ZipForm(_wrapped(pickle), "data/0", nbytes)


def _wrapped(pickle: bytes) -> dict[str, bytes]:
    """The records of a torch.save file but its data."""
    return {
        "data.pkl": pickle,
        ".format_version": b"1",
        ".storage_alignment": str(ALIGNMENT).encode(),
        "byteorder": b"little",
        "version": b"3\n",
    }


def _unit(job: Job, path: str, parts: Sequence[Part]) -> Unit:
    read_bytes = sum(box.size * itemsize(job.tensor(name).dtype) for name, box in parts)
    write_bytes = sum(_form(job.tensor(name).dtype, box.shape).nbytes for name, box in parts)
    names = tuple(dict.fromkeys(name for name, _ in parts))
    return Unit(path, names, read_bytes, write_bytes, stream_memory_bytes(job), (path,))


def _files(job: Job) -> dict[str, list[Part]]:
    """The boxes in each file; every tensor once, without its aliases."""
    layout = job.layout
    world = layout.dp * layout.tp * layout.pp * layout.cp
    names = in_file_order(job, (name for name in job.names if name not in job.aliases))
    groups = _by_rank(job, names, world) if world > 1 else _by_size(job, names)
    return {f"__{number}_0.distcp": parts for number, parts in enumerate(groups) if parts or not number}


def _by_rank(job: Job, names: Sequence[str], world: int) -> list[list[Part]]:
    """The first dimension in ``world`` parts of ceil(n / world) rows; scalars in turn."""
    ranks: list[list[Part]] = [[] for _ in range(world)]
    scalars = 0
    for name in names:
        shape = job.tensor(name).shape
        if not shape or 0 in shape:
            ranks[scalars % world].append((name, Box.whole(shape)))
            scalars += 1
            continue
        step = math.ceil(shape[0] / world)
        for rank, start in enumerate(range(0, shape[0], step)):
            rows = min(step, shape[0] - start)
            ranks[rank].append((name, Box((start, *(0 for _ in shape[1:])), (rows, *shape[1:]))))
    return ranks


def _by_size(job: Job, names: Sequence[str]) -> list[list[Part]]:
    most = job.options.get("file_bytes", FILE_BYTES)
    if type(most) is not int or most <= 0:
        raise UnusableRequest(f"option file_bytes must be a positive number of bytes, not {most!r}")
    groups: list[list[Part]] = [[]]
    room = most
    for name in names:
        tensor = job.tensor(name)
        for box in _slabs(tensor, most):
            nbytes = box.size * itemsize(tensor.dtype)
            if nbytes > room and groups[-1]:
                groups.append([])
                room = most
            groups[-1].append((name, box))
            room -= nbytes
    return groups


def _slabs(tensor: LogicalTensor, most: int) -> Iterator[Box]:
    """The tensor cut on its first dimension of more than one element into parts of at most ``most`` bytes."""
    whole = Box.whole(tensor.shape)
    dim = next((d for d, n in enumerate(tensor.shape) if n > 1), None)
    if tensor.nbytes <= most or dim is None:
        yield whole
        return
    step = max(most * tensor.shape[dim] // tensor.nbytes, 1)
    for start in range(0, tensor.shape[dim], step):
        offsets, shape = list(whole.offsets), list(whole.shape)
        offsets[dim], shape[dim] = start, min(step, tensor.shape[dim] - start)
        yield Box(tuple(offsets), tuple(shape))


def _keys(job: Job) -> tuple[dict[str, str], dict[str, Path]]:
    """Each name's key in torch's terms, aliases included, and each key's path in the nested state."""
    values = plain_values(job)
    states = split_names(job.names, optimizers_in(values))
    keys: dict[str, str] = {}
    paths: dict[str, Path] = {}
    for name in job.names:
        state: tuple[Optimizer, str, str] | None = states.get(name)
        path = place_in(values, job.place(name))
        if state is not None:
            optimizer, parameter, kind = state
            state_path = (f"{FLAT_STATE}{parameter}.{kind}",) if optimizer.flat else ("state", parameter, kind)
            path = (*optimizer.path, *state_path)
        keys[name] = _key(path)
        paths[keys[name]] = path
    return keys, paths


def _key(path: Path) -> str:
    return ".".join(map(str, path))


def _write_values(file: str, target: Target, leaves: Sequence[tuple[Path, object]]) -> list[tuple[str, Path, Instance]]:
    """Write one item per value; their keys, paths and places."""
    made: list[tuple[str, Path, Instance]] = []
    if not leaves:
        return made
    with target.create(file) as sink:
        for path, value in leaves:
            start = sink.position
            key = _key(path)
            zipped = ZipWriter(sink)
            shown, data = as_stored(value)
            for record, small in _wrapped(dumps(shown, key)).items():
                zipped.add(record, small)
            for number, raw in enumerate(data):
                zipped.add(f"data/{number}", raw)
            zipped.finish()
            made.append((key, path, _place(file, start, sink.position - start)))
    return made


def _leaves(value: object, path: Path, held: Set[Path]) -> Iterator[tuple[Path, object]]:
    """Values as torch flattens them: dicts always, lists and tuples where a dict or a tensor is in them.

    ``held`` are the paths of tensors and of what they are in: None there is only what a tensor left.
    """
    if isinstance(value, dict) and (value or not path) and not is_plain_tensor(value):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)), held)
    elif isinstance(value, list | tuple) and (path in held or (isinstance(value, list) and _holds_dict(value))):
        for number, item in enumerate(value):
            if item is not None or (*path, number) not in held:
                yield from _leaves(item, (*path, number), held)
    elif path or value is not None:
        yield path or ("values",), value


def _holds_dict(value: list[Any]) -> bool:
    return any(isinstance(item, dict) or (isinstance(item, list) and _holds_dict(item)) for item in value)


def _tensor_record(tensor: LogicalTensor, chunks: Sequence[tuple[Any, ...]]) -> Instance:
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(Global(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    properties = (Global("torch", tensor.dtype), layout, False, contiguous, False)
    boxes = [
        Instance(Global(_METADATA, "ChunkStorageMetadata"), {"offsets": size(chunk[0]), "sizes": size(chunk[1])})
        for chunk in chunks
    ]
    state = {
        "properties": Instance(Global(_METADATA, "TensorProperties"), properties),
        "size": size(tensor.shape),
        "chunks": boxes,
    }
    return Instance(Global(_METADATA, "TensorStorageMetadata"), state)


def _index(key: str, offsets: tuple[int, ...] | None = None, number: int | None = None) -> Instance:
    offset = None if offsets is None else size(offsets)
    return Instance(Global(_METADATA, "MetadataIndex"), {"fqn": key, "index": number, "offset": offset})


def _place(path: str, offset: int, nbytes: int) -> Instance:
    state = {"relative_path": path, "offset": offset, "length": nbytes}
    return Instance(Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), state)


WRITER = DcpWriter
