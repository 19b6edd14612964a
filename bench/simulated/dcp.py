"""torch DCP at scale: its global plan and its pickled metadata, made by torch's own planner functions."""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


def measure(ranks: int, names: Sequence[str], shape: tuple[int, int], target_ranks: int) -> dict[str, Any]:
    """Bytes of metadata and seconds of planning; the same cut and the same target as ckptengine's simulation."""
    rows = -(-shape[0] // ranks)
    size = torch.Size(shape)
    plans = [SavePlan(_items(names, size, rank * rows, min(shape[0], (rank + 1) * rows))) for rank in range(ranks)]
    start = time.perf_counter()
    _, metadata = create_default_global_save_plan(plans)
    plan_save_s = time.perf_counter() - start
    storage = {}
    offset = rows * shape[1] * 4
    for rank, plan in enumerate(plans):
        for number, item in enumerate(plan.items):
            storage[item.index] = _StorageInfo(f"__{rank}_0.distcp", number * offset, offset)
    metadata.storage_data = storage
    del plans
    start = time.perf_counter()
    encoded = pickle.dumps(metadata)
    plan_save_s += time.perf_counter() - start
    del metadata, storage
    start = time.perf_counter()
    loaded: Metadata = pickle.loads(encoded)
    items = _read_items(loaded, names, shape, target_ranks)
    plan_restore_s = time.perf_counter() - start
    return {
        "metadata_bytes": len(encoded),
        "central_bytes": len(encoded),
        "read_by_one_rank_bytes": len(encoded),
        "plan_save_s": plan_save_s,
        "plan_restore_s": plan_restore_s,
        "fragments_of_one_rank": items,
    }


def _items(names: Sequence[str], size: torch.Size, begin: int, end: int) -> list[WriteItem]:
    chunk = ChunkStorageMetadata(torch.Size([begin, 0]), torch.Size([end - begin, size[1]]))
    properties = TensorProperties(torch.float32)
    return [
        WriteItem(
            index=MetadataIndex(name, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=size),
        )
        for name in names
    ]


def _read_items(metadata: Metadata, names: Sequence[str], shape: tuple[int, int], target_ranks: int) -> int:
    rows = -(-shape[0] // target_ranks)
    begin = (target_ranks // 2) * rows
    end = min(shape[0], begin + rows)
    local = [ChunkStorageMetadata(torch.Size([begin, 0]), torch.Size([end - begin, shape[1]]))]
    count = 0
    for name in names:
        stored = metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        count += len(create_read_items_for_chunk_list(name, stored, local))
    return count
