"""States of the distributed optimizer that a ``torch_dist`` checkpoint keeps in buckets, by the parameters' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ckptengine.errors import Damaged, UnreadableFormat
from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import Fragment, LogicalTensor
from ckptengine.sources.dcp.metadata import Chunk, Item, TensorRecord
from ckptengine.sources.dcp.source import DcpItems
from ckptengine.sources.files import InlineFiles
from ckptengine.sources.megatron.buckets import MASTER, find_slots, is_bucket, state_fragments
from ckptengine.sources.megatron.chain import trains_experts
from ckptengine.sources.megatron.masters import SAMPLE, rounds_to
from ckptengine.sources.megatron.naming import wrapper_prefix
from ckptengine.sources.megatron.stages import Slot
from ckptengine.sources.plain import plain
from ckptengine.sources.stored import StoredTensor

_GATHERED = re.compile(r"((?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+)\.param_state(?:/.*)?")
_SHARED = re.compile(r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.([^./]+)(?:/.*)?")
_OF_BUCKETS = ("param_state", "param_state_sharding_type", "per_bucket_numel", "per_bucket_numel_unpadded")


class DistributedStates:
    """What the buckets of all model-parallel ranks hold; empty where there are none.

    Raises `UnreadableFormat` where it is not certain which parameter lies where.
    """

    def __init__(
        self,
        files: InlineFiles,
        items: DcpItems,
        records: Mapping[str, TensorRecord],
        objects: Mapping[str, Item | None],
        arguments: object,
    ) -> None:
        self._files = files
        self._items = items
        self._records = dict(records)
        self._pieces: dict[tuple[str, tuple[int, ...]], Fragment] = {}
        self._slots: dict[str, list[Slot]] = {}
        self.names: dict[str, tuple[str, str]] = {}
        """Canonical name -> the weight's key and the state."""
        for key, item in objects.items():
            if (match := _GATHERED.fullmatch(key)) is not None:
                self._add_gathered(match[1], key, item)
        self.values = self._values(objects)
        """What the optimizer keeps beside its tensors, as it lies among the common values in other forms."""
        if any(map(is_bucket, self._records)):
            self._find(records, plain(arguments))

    def tensor(self, name: str) -> LogicalTensor:
        """A state of a parameter; ``name`` is one of `names`."""
        key, state = self.names[name]
        slots = self._slots[key]
        stored = self._records[slots[0].bucket.keys[state]]
        found = state_fragments(stored.dtype, slots, state, self._piece, self._records)
        return LogicalTensor(name, stored.dtype, self._records[key].shape, list(found), meta={"key": key})

    def _find(self, weights: Mapping[str, TensorRecord], arguments: object) -> None:
        try:
            known = arguments if isinstance(arguments, dict) else {}
            slots = find_slots(self._records, known, self._agrees, trains_experts(self.values))
        except UnreadableFormat as error:
            raise UnreadableFormat(f"{self._files.root}: {error}") from None
        prefix = wrapper_prefix(weights)
        for slot in slots:
            if not slot.parameter.is_copy:
                self._slots.setdefault(slot.parameter.key, []).append(slot)
        for key, held in self._slots.items():
            for state in held[0].bucket.keys:
                self.names[f"optim.{key.removeprefix(prefix)}.{state}"] = (key, state)

    def _add_gathered(self, group: str, key: str, item: Item | None) -> None:
        """Buffers that lie in one object, as if each of their states were a tensor of its own."""
        loaded = self._load(key, item)
        loaded = loaded[0] if isinstance(loaded, list) and len(loaded) == 1 else loaded
        for number, by_dtype in loaded.items() if isinstance(loaded, dict) else ():
            for dtype, states in by_dtype.items() if isinstance(by_dtype, dict) else ():
                for state, held in states.items() if isinstance(states, dict) else ():
                    if not isinstance(held, StoredTensor) or len(held.shape) != 1:
                        continue
                    names = ", ".join(map(str, dtype)) if isinstance(dtype, tuple) else str(dtype)
                    shown = f"{group}.gbuf_idx_{number}.dtype_(torch.{names}).{state}"
                    chunk = Chunk((0,), held.shape, item)
                    self._records[shown] = TensorRecord(held.dtype, held.shape, (chunk,))
                    self._pieces[shown, (0,)] = held.fragment()

    def _values(self, objects: Mapping[str, Item | None]) -> dict[Any, Any]:
        """That of the first model-parallel rank; all have the same.  A chain of optimizers has it by number."""
        first: dict[tuple[int, str], tuple[int, str]] = {}
        for key in objects:
            match = _SHARED.fullmatch(key)
            if match is not None and match[3] not in _OF_BUCKETS:
                place = (int(match[1] or 0), match[3])
                first[place] = min(first.get(place, (int(match[2]), key)), (int(match[2]), key))
        chain: dict[Any, Any] = {}
        for (number, part), (_, key) in sorted(first.items()):
            value = self._load(key, objects[key])
            chain.setdefault(number, {})[part] = value[0] if isinstance(value, list) and len(value) == 1 else value
        return chain if len(chain) > 1 else chain.get(0, {})

    def _load(self, key: str, item: Item | None) -> Any:
        if item is None:
            raise Damaged(f"{self._files.root}: no file is recorded for the object {key!r}")
        return self._items.load(item)

    def _agrees(self, slot: Slot) -> bool:
        """Whether the first elements of a slot's fp32 copies round to those of the weight."""
        record = self._records[slot.parameter.key]
        masters = slot.bucket.keys.get(MASTER)
        if masters is None or self._records[masters].dtype != "float32":
            return False
        width = itemsize(record.dtype)
        for copy in state_fragments("float32", [slot], MASTER, self._piece, self._records):
            chunk = next(c for c in record.chunks if Box(c.offsets, c.shape).intersect(copy.box) is not None)
            weight = self._piece(slot.parameter.key, chunk)
            if slot.parameter.is_turned:  # one column, whose elements lie apart in the weight
                box = Box(copy.box.offsets, (*copy.box.shape[:-2], min(copy.box.shape[-2], SAMPLE // 8), 1))
                copy = copy.part(box, 4)
            count = min(copy.box.size, SAMPLE)
            step = weight.box.shape[-1] if slot.parameter.is_turned else 1
            part = weight.part(copy.box, width)
            span = self._files.read(part.file, part.offset, ((count - 1) * step + 1) * width)
            data = b"".join(span[at * width : (at + 1) * width] for at in range(0, len(span) // width, step))
            if not rounds_to(self._files.read(copy.file, copy.offset, count * 4), data, record.dtype):
                return False
        return True

    def _piece(self, key: str, chunk: Chunk) -> Fragment:
        if (key, chunk.offsets) not in self._pieces:
            self._pieces[key, chunk.offsets] = self._items.fragment(key, self._records[key], chunk)
        return self._pieces[key, chunk.offsets]


def is_shared(key: str) -> bool:
    """Whether an object is part of the distributed optimizer's, of one model-parallel rank."""
    return _SHARED.fullmatch(key) is not None
