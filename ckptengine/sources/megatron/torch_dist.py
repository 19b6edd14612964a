"""Megatron-core's distributed checkpoints (``torch_dist``)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptengine.errors import CheckpointError, Damaged, NotFound, UnreadableFormat
from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import Fragment, LogicalTensor
from ckptengine.sources.dcp.metadata import METADATA, Item, TensorRecord, read_metadata
from ckptengine.sources.dcp.source import DcpItems
from ckptengine.sources.files import InlineFiles
from ckptengine.sources.megatron.distributed import DistributedStates, is_shared
from ckptengine.sources.megatron.flattened import elements, is_flattened, turned, unflatten
from ckptengine.sources.megatron.masters import SAMPLE, rounds_to
from ckptengine.sources.megatron.naming import canonical_names, wrapper_prefix
from ckptengine.sources.megatron.steps import common_step, without_step
from ckptengine.sources.plain import DROPPED, plain
from ckptengine.sources.port import Files, Opening
from ckptengine.sources.rules.parse import load_rules
from ckptengine.sources.smalltensors import as_plain
from ckptengine.sources.stored import StoredTensor
from ckptengine.sources.torchzip import load_torch

MANIFEST = "metadata.json"
COMMON = "common.pt"
COMMON_OBJECT = "common_state"
INTEGRITY = "integrity.json"
EXPERTS = ".experts."
MAX_MANIFEST_BYTES = 1 << 20
_BACKENDS = ("torch_dist",)


class TorchDistSource:
    """Tensors under Megatron's global keys, their layers stacked where Megatron stacks them.

    Values are those of ``common.pt``; objects of single ranks (random states, extra states) lie under ``objects`` by
    their keys.
    """

    format = "megatron"

    def __init__(self, opening: Opening) -> None:
        base = opening.files
        check_manifest(base)
        self._inline = InlineFiles(base)
        self.files: Files = self._inline
        self.metrics: Mapping[str, float] = {}
        self._metadata = read_metadata(base)
        self._records = self._metadata.tensors
        self._objects = dict(self._metadata.objects)
        self._items = DcpItems(base)
        self._keys = canonical_names(self._metadata.tensors)
        self._common = self._read_common()
        iteration = self._common.get("iteration")
        self.step = iteration if type(iteration) is int else opening.step
        self._step = common_step(self._common.get("optimizer"), self._inline)
        self._turned: dict[str, bool] = {}
        self._buckets: DistributedStates | None = None
        if not _leaves_out(opening):
            arguments = self._common.get("args")
            self._buckets = DistributedStates(self._inline, self._items, self._records, self._objects, arguments)
            if self._buckets.values:
                self._common = {**self._common, "optimizer": self._buckets.values}
            self._step = self._step or common_step(self._buckets.values, self._inline)
        self._objects = {key: item for key, item in self._objects.items() if not is_shared(key)}
        self._steps = self._step_names() if self._step is not None else {}

    def names(self) -> Sequence[str]:
        return [*self._keys, *self._bucketed(), *self._steps]

    def tensor(self, name: str) -> LogicalTensor:
        if name in self._steps and self._step is not None:
            dtype, path = self._step
            return LogicalTensor(name, dtype, (), [Fragment(Box((), ()), path, 0)])
        if self._buckets is not None and name in self._buckets.names:
            return self._buckets.tensor(name)
        key = self._keys.get(name)
        if key is None:
            raise NotFound(f"{self.files.root} has no tensor {name!r}")
        record = self._records[key]
        shape = self._shape(name, record)
        try:
            pieces = [self._items.fragment(key, record, chunk) for chunk in record.chunks if 0 not in chunk.shape]
        except NotFound as error:
            raise NotFound(f"{error}; it holds a part of {name!r}: fetch the missing file") from error
        if shape != record.shape:
            way = self._is_turned(name[len("optim.") :].rpartition(".")[0])
            pieces = [part for p in pieces for part in unflatten(name, record.dtype, shape, record.shape, p, way)]
        return LogicalTensor(name, record.dtype, shape, pieces, meta={"key": key})

    def aliases(self) -> Mapping[str, str]:
        """None: a tied output layer is stored under the embedding's key only."""
        return {}

    def zips(self) -> Iterable[tuple[str, int, int]]:
        """See `ckptengine.sources.port.HoldsZips`."""
        return self._items.zips(self._metadata)

    def checksums(self) -> Mapping[str, str]:
        """Those of ``integrity.json``, which Megatron-core writes from 0.19 on when it is asked to."""
        if not self.files.exists(INTEGRITY):
            return {}
        where = f"{self.files.root}/{INTEGRITY}"
        try:
            found = json.loads(self.files.read(INTEGRITY, 0, self.files.size(INTEGRITY)))
        except (ValueError, RecursionError):
            raise Damaged(f"{where} is damaged: it is not JSON") from None
        files = found.get("files") if isinstance(found, dict) else None
        if not isinstance(files, dict) or found.get("algorithm", "sha256") != "sha256":
            raise UnreadableFormat(f"{where} has no SHA-256 checksums of files")
        return {str(path): str(digest) for path, digest in files.items()}

    def values(self) -> object:
        common = {**self._common, "optimizer": without_step(self._common.get("optimizer"))}
        made = plain({key: value for key, value in common.items() if value is not None}, self._as_plain)
        values = made if isinstance(made, dict) else {}
        objects = {}
        prefix = wrapper_prefix(self._records)
        for key, item in self._objects.items():
            value = self._value(key, item)
            if value is not DROPPED and value is not None:
                objects[key.removeprefix(prefix)] = value
        return {**values, "objects": objects} if objects else values

    def _read_common(self) -> Mapping[Any, Any]:
        """What all ranks share: a file of its own, or (from Megatron-core 0.20 on) one of the objects."""
        files = self._inline
        key = next((key for key in self._objects if key.partition("/")[0] == COMMON_OBJECT), None)
        item = self._objects.pop(key) if key is not None else None
        if files.exists(COMMON):
            common, where = load_torch(files, COMMON), COMMON
        elif item is not None:
            common, where = self._items.load(item), f"{item.path} at byte {item.offset}"
            common = common[0] if isinstance(common, list) and len(common) == 1 else common  # one per chunk
        else:
            raise NotFound(f"{files.root} has neither {COMMON} nor an object {COMMON_OBJECT!r}: files are missing")
        if not isinstance(common, dict):
            raise UnreadableFormat(f"{files.root}/{where} does not hold a dictionary")
        return common

    def _value(self, key: str, item: Item | None) -> object:
        if item is None:
            raise Damaged(f"{self.files.root}: no file is recorded for the object {key!r}")
        try:
            return plain(self._items.load(item), self._as_plain)
        except CheckpointError as error:
            raise type(error)(f"object {key!r}: {error}") from error

    def _as_plain(self, tensor: StoredTensor) -> object:
        return as_plain(tensor, self._inline)

    def _shape(self, name: str, record: TensorRecord) -> tuple[int, ...]:
        """The shape that a tensor has, which for flattened optimizer states is that of the weight."""
        if not name.startswith("optim."):
            return record.shape
        parameter = name[len("optim.") :].rpartition(".")[0]
        weight = self._keys.get(f"model.{parameter}")
        if weight is None or self._records[weight].shape == record.shape:
            return record.shape
        shape = self._records[weight].shape
        is_experts = EXPERTS in parameter and is_flattened(record.shape, turned(shape))
        return shape if is_flattened(record.shape, shape) or is_experts else record.shape

    def _is_turned(self, parameter: str) -> bool:
        """Whether the states of experts lie in memory the other way round than their weights.

        The grid that they are cut by may tell, else the fp32 copies, which rounded are the weights.
        """
        weight, master = self._keys[f"model.{parameter}"], self._keys.get(f"optim.{parameter}.master")
        if EXPERTS not in parameter or len(self._records[weight].shape) < 2:
            return False
        if parameter not in self._turned:
            states = [key for name, key in self._keys.items() if name.startswith(f"optim.{parameter}.")]
            shape, stored = self._records[weight].shape, self._records[master or states[0]].shape
            ways = [way for way in (False, True) if is_flattened(stored, turned(shape) if way else shape)]
            if len(ways) > 1 and master is not None:
                ways = [way for way in ways if self._has_copies(weight, master, way)]
            if len(ways) != 1:
                raise UnreadableFormat(
                    f"{self.files.root}: the optimizer's states of {parameter} are flattened, and it is not certain in "
                    "what order; leave the optimizer out with rules='megatron-weights'"
                )
            self._turned[parameter] = ways[0]
        return self._turned[parameter]

    def _has_copies(self, weight: str, master: str, is_turned: bool) -> bool:
        """Whether some elements of flattened fp32 copies, put back into their shape, round to those of the weight."""
        record, copies = self._records[weight], self._records[master]
        width = itemsize(record.dtype)
        chunk = next(chunk for chunk in copies.chunks if 0 not in chunk.shape)
        piece = self._items.fragment(master, copies, chunk)
        for part in unflatten(master, copies.dtype, record.shape, copies.shape, piece, is_turned):
            for place, offset in elements(part, SAMPLE, 4):
                one = Box(place, (1,) * len(place))
                there = next(c for c in record.chunks if Box(c.offsets, c.shape).intersect(one) is not None)
                held = self._items.fragment(weight, record, there).part(one, width)
                data = self.files.read(part.file, offset, 4)
                if not rounds_to(data, self.files.read(held.file, held.offset, width), record.dtype):
                    return False
        return True

    def _bucketed(self) -> Sequence[str]:
        return list(self._buckets.names) if self._buckets is not None else []

    def _step_names(self) -> dict[str, None]:
        names = [*self._keys, *self._bucketed()]
        parameters = dict.fromkeys(name[6:].rpartition(".")[0] for name in names if name.startswith("optim."))
        return {f"optim.{parameter}.step": None for parameter in parameters}


def is_torch_dist(files: Files) -> bool:
    """Whether a folder is one of Megatron's distributed checkpoints, be it complete or not."""
    if read_manifest(files) is not None:
        return True
    if not files.exists(METADATA):
        return False
    if not files.exists(MANIFEST):
        return files.exists(COMMON)  # nothing else puts that beside the metadata of DCP
    return files.size(MANIFEST) <= MAX_MANIFEST_BYTES and _parsed(files) is None


def read_manifest(files: Files) -> dict[str, Any] | None:
    """``metadata.json`` where it is Megatron's, else None."""
    if not files.exists(MANIFEST) or files.size(MANIFEST) > MAX_MANIFEST_BYTES:
        return None
    manifest = _parsed(files)
    return manifest if isinstance(manifest, dict) and "sharded_backend" in manifest else None


def _parsed(files: Files) -> object:
    """What ``metadata.json`` holds; None where that is not JSON."""
    try:
        return json.loads(files.read(MANIFEST, 0, files.size(MANIFEST)))
    except (ValueError, RecursionError):
        return None


def check_manifest(files: Files) -> None:
    """`UnreadableFormat` for another backend or version than those that are read here."""
    if not files.exists(MANIFEST):
        raise NotFound(f"{files.root} has {COMMON} and {METADATA}, but no {MANIFEST}: files are missing")
    manifest = read_manifest(files)
    if manifest is None:
        raise Damaged(f"{files.root}/{MANIFEST} is damaged: it is not the JSON that Megatron writes")
    backend, version = manifest.get("sharded_backend"), manifest.get("sharded_backend_version")
    if backend not in _BACKENDS:
        raise UnreadableFormat(
            f"{files.root} was written by Megatron's backend {backend!r}; this version reads {', '.join(_BACKENDS)}. "
            "Convert it with Megatron's own tools"
        )
    if version != 1:
        raise UnreadableFormat(f"{files.root} has version {version!r} of Megatron's {backend} format; 1 is read")
    if not files.exists(METADATA):
        raise NotFound(f"{files.root} has no {METADATA}: the checkpoint was not finished, or files are missing")


def _leaves_out(opening: Opening) -> bool:
    """Whether rules say that the distributed optimizer's buckets are not shown."""
    if opening.rules is None:
        return False
    claim = load_rules(opening.rules).view_rule("optimizer.distributed")
    return claim is not None and claim[0].view is not None and claim[0].view.drop
