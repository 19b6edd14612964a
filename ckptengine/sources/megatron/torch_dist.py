"""Megatron-core's distributed checkpoints (``torch_dist``)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ckptengine.errors import CheckpointError, Damaged, NotFound, UnreadableFormat
from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import Fragment, LogicalTensor
from ckptengine.sources.dcp.metadata import METADATA, Chunk, Item, TensorRecord, read_metadata
from ckptengine.sources.dcp.source import DcpItems
from ckptengine.sources.files import InlineFiles
from ckptengine.sources.megatron.buckets import MASTER, REMEDY, Slot, find_slots, is_bucket, state_fragments
from ckptengine.sources.megatron.flattened import is_flattened, unflatten
from ckptengine.sources.megatron.masters import SAMPLE, rounds_to
from ckptengine.sources.megatron.naming import canonical_names, wrapper_prefix
from ckptengine.sources.megatron.steps import common_step
from ckptengine.sources.plain import DROPPED, plain
from ckptengine.sources.port import Files, Opening
from ckptengine.sources.rules.parse import load_rules
from ckptengine.sources.torchzip import load_torch

MANIFEST = "metadata.json"
COMMON = "common.pt"
MAX_MANIFEST_BYTES = 1 << 20
_GROUPS = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.optimizer(?:/.*)?")
_GATHERED = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.param_state(?:/.*)?")
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
        metadata = read_metadata(base)
        self._records = metadata.tensors
        self._objects = metadata.objects
        self._items = DcpItems(base)
        self._keys = canonical_names(metadata.tensors)
        common = load_torch(base, COMMON) if base.exists(COMMON) else {}
        if not isinstance(common, dict):
            raise UnreadableFormat(f"{base.root}/{COMMON} does not hold a dictionary")
        self._common: Mapping[Any, Any] = common
        iteration = common.get("iteration")
        self.step = iteration if type(iteration) is int else opening.step
        self._step = common_step(common.get("optimizer"), self._inline)
        self._pieces: dict[tuple[str, tuple[int, ...]], Fragment] = {}
        self._slots: dict[str, list[Slot]] = {}
        self._bucketed: dict[str, tuple[str, str]] = {}
        if not _leaves_out(opening):
            self._read_buckets()
        self._steps = self._step_names() if self._step is not None else {}

    def names(self) -> Sequence[str]:
        return [*self._keys, *self._bucketed, *self._steps]

    def tensor(self, name: str) -> LogicalTensor:
        if name in self._steps and self._step is not None:
            dtype, path = self._step
            return LogicalTensor(name, dtype, (), [Fragment(Box((), ()), path, 0)])
        if name in self._bucketed:
            return self._from_buckets(name)
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
            pieces = [part for p in pieces for part in unflatten(name, record.dtype, shape, record.shape, p)]
        return LogicalTensor(name, record.dtype, shape, pieces, meta={"key": key})

    def aliases(self) -> Mapping[str, str]:
        """None: a tied output layer is stored under the embedding's key only."""
        return {}

    def values(self) -> object:
        made = plain(dict(self._common))
        values = made if isinstance(made, dict) else {}
        objects = {}
        prefix = wrapper_prefix(self._records)
        for key, item in self._objects.items():
            value = self._value(key, item)
            if value is not DROPPED and value is not None:
                objects[key.removeprefix(prefix)] = value
        return {**values, "objects": objects} if objects else values

    def _value(self, key: str, item: Item | None) -> object:
        if item is None:
            raise Damaged(f"{self.files.root}: no file is recorded for the object {key!r}")
        try:
            return self._items.value(item)
        except CheckpointError as error:
            raise type(error)(f"object {key!r}: {error}") from error

    def _shape(self, name: str, record: TensorRecord) -> tuple[int, ...]:
        """The shape that a tensor has, which for flattened optimizer states is that of the weight."""
        if not name.startswith("optim."):
            return record.shape
        parameter = name[len("optim.") :].rpartition(".")[0]
        weight = self._keys.get(f"model.{parameter}")
        if weight is None or self._records[weight].shape == record.shape:
            return record.shape
        shape = self._records[weight].shape
        return shape if is_flattened(record.shape, shape) else record.shape

    # the distributed optimizer's buckets

    def _read_buckets(self) -> None:
        if any(map(_GATHERED.fullmatch, self._objects)):
            raise UnreadableFormat(
                f"{self.files.root} keeps the distributed optimizer's states as one object per model-parallel rank "
                f"(dp_zero_gather_scatter), which is not read; {REMEDY}"
            )
        if not any(map(is_bucket, self._records)):
            return
        arguments = plain(self._common.get("args"))
        try:
            slots = find_slots(self._records, arguments if isinstance(arguments, dict) else {}, self._agrees)
        except UnreadableFormat as error:
            raise UnreadableFormat(f"{self.files.root}: {error}") from None
        prefix = wrapper_prefix(self._records)
        for slot in slots:
            self._slots.setdefault(slot.parameter.key, [])
            if not slot.parameter.is_copy:
                self._slots[slot.parameter.key].append(slot)
        for key, held in self._slots.items():
            for state in held[0].bucket.keys if held else ():
                self._bucketed[f"optim.{key.removeprefix(prefix)}.{state}"] = (key, state)
        groups = [self._value(key, item) for key, item in self._objects.items() if _GROUPS.fullmatch(key)]
        self._step = self._step or common_step(groups, self._inline)

    def _from_buckets(self, name: str) -> LogicalTensor:
        key, state = self._bucketed[name]
        slots = self._slots[key]
        stored = self._records[slots[0].bucket.keys[state]]
        found = state_fragments(stored.dtype, slots, state, self._piece, self._records)
        return LogicalTensor(name, stored.dtype, self._records[key].shape, list(found), meta={"key": key})

    def _agrees(self, slot: Slot) -> bool:
        """Whether the first elements of a slot's fp32 copies round to those of the weight."""
        record = self._records[slot.parameter.key]
        masters = slot.bucket.keys.get(MASTER)
        if masters is None or self._records[masters].dtype != "float32":
            return False
        for copy in state_fragments("float32", [slot], MASTER, self._piece, self._records):
            count = min(copy.box.size, SAMPLE)
            chunk = next(c for c in record.chunks if Box(c.offsets, c.shape).intersect(copy.box) is not None)
            weight = self._piece(slot.parameter.key, chunk).part(copy.box, itemsize(record.dtype))
            data = self.files.read(copy.file, copy.offset, count * 4)
            if not rounds_to(
                data, self.files.read(weight.file, weight.offset, count * itemsize(record.dtype)), record.dtype
            ):
                return False
        return True

    def _piece(self, key: str, chunk: Chunk) -> Fragment:
        if (key, chunk.offsets) not in self._pieces:
            self._pieces[key, chunk.offsets] = self._items.fragment(key, self._records[key], chunk)
        return self._pieces[key, chunk.offsets]

    def _step_names(self) -> dict[str, None]:
        names = [*self._keys, *self._bucketed]
        parameters = dict.fromkeys(name[6:].rpartition(".")[0] for name in names if name.startswith("optim."))
        return {f"optim.{parameter}.step": None for parameter in parameters}


def read_manifest(files: Files) -> dict[str, Any] | None:
    """``metadata.json`` where it is Megatron's, else None."""
    if not files.exists(MANIFEST) or files.size(MANIFEST) > MAX_MANIFEST_BYTES:
        return None
    try:
        manifest = json.loads(files.read(MANIFEST, 0, files.size(MANIFEST)))
    except (ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) and "sharded_backend" in manifest else None


def check_manifest(files: Files) -> None:
    """`UnreadableFormat` for another backend or version than those that are read here."""
    manifest = read_manifest(files) or {}
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
