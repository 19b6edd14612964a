"""ckptengine at scale: manifest, indexes and one rank's restore plan, made by the engine's own pure parts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ckptengine.layout import layout_json
from ckptengine.layout.cover import prove_cover
from ckptengine.layout.mesh import Mesh
from ckptengine.layout.placement import Shard
from ckptengine.layout.sharding import Sharding
from ckptengine.layout.tensor import Fragment
from ckptengine.plan.read import Wanted, plan_reads
from ckptengine.plan.write import Planned, Writer, assign_writers, stored_overlapping
from ckptengine.store import manifest as manifests
from ckptengine.store import rankfile

ITEM_BYTES = 4
HEADER_BYTES = rankfile.HEADER_BYTES


def sharded_over(ranks: int) -> Sharding:
    """The first dimension over all ranks."""
    return Sharding(Mesh((ranks,), ("dp",)), (Shard(0),))


def measure(ranks: int, names: Sequence[str], shape: tuple[int, int], target_ranks: int) -> dict[str, Any]:
    """Bytes of metadata and seconds of planning; the target world restores with the same cut over its own ranks."""
    layout = sharded_over(ranks)
    start = time.perf_counter()
    writers = assign_writers([Planned(name, "float32", shape, layout) for name in names], world=ranks)
    prove_cover(names[0], shape, [piece.box for rank in range(ranks) for piece in layout.pieces(rank, shape)])
    plan_save_s = time.perf_counter() - start

    rows_per_rank = -(-shape[0] // ranks)
    extent_bytes = rows_per_rank * shape[1] * ITEM_BYTES
    tail = _tail(len(names), extent_bytes)
    start = time.perf_counter()
    encoded = _manifest(ranks, names, shape, layout, writers, len(tail)).encode()
    encode_s = time.perf_counter() - start

    start = time.perf_counter()
    decoded = manifests.decode(encoded, "manifest")
    decode_s = time.perf_counter() - start
    start = time.perf_counter()
    needed, fragments = _restore_plan(decoded, shape, target_ranks, extent_bytes)
    plan_restore_s = time.perf_counter() - start
    return {
        "metadata_bytes": len(encoded) + ranks * len(tail),
        "central_bytes": len(encoded),
        "read_by_one_rank_bytes": len(encoded) + len(needed) * len(tail),
        "plan_save_s": plan_save_s + encode_s,
        "plan_restore_s": decode_s + plan_restore_s,
        "fragments_of_one_rank": fragments,
    }


def _tail(tensors: int, extent_bytes: int) -> bytes:
    """Index, values and footer of one rank file with one extent per tensor."""
    index = np.zeros(tensors, rankfile.INDEX_DTYPE)
    index["tensor"] = np.arange(tensors)
    index["offset"] = HEADER_BYTES + np.arange(tensors, dtype=np.uint64) * np.uint64(extent_bytes)
    index["nbytes"] = extent_bytes
    granules = int(rankfile.granule_counts(index["nbytes"]).sum())
    _, tail = rankfile.encode_tail(HEADER_BYTES + tensors * extent_bytes, index, np.zeros(granules, np.uint64), {})
    return tail


def _manifest(
    ranks: int, names: Sequence[str], shape: tuple[int, int], layout: Sharding, writers: Sequence[Writer], tail: int
) -> manifests.Manifest:
    rng = np.random.default_rng(0)
    digests = [int(crc) for crc in rng.integers(0, 1 << 63, len(names))]
    records = [
        manifests.TensorRecord(name, "float32", shape, 0, writer, crc)
        for name, writer, crc in zip(names, writers, digests, strict=True)
    ]
    files = [manifests.FileRecord((1 << 30) + tail, int(crc)) for crc in rng.integers(0, 1 << 63, ranks)]
    return manifests.Manifest(
        run="r" * 32,
        attempt=1,
        save=1,
        step=1000,
        world=ranks,
        created="2026-01-01T00:00:00Z",
        writer="bench",
        layouts=[layout_json.to_json(layout)],
        tensors=records,
        values={},
        files=files,
    )


def _restore_plan(
    manifest: manifests.Manifest, shape: tuple[int, int], target_ranks: int, extent_bytes: int
) -> tuple[set[int], int]:
    """Plan what the middle rank of the target world reads; the source ranks it needs, and how many fragments."""
    target = sharded_over(target_ranks)
    stored = layout_json.from_json(manifest.layouts[0])
    rank = target_ranks // 2
    needed: set[int] = set()
    wanted = []
    count = 0
    for number, record in enumerate(manifest.tensors):
        pieces = target.pieces(rank, shape)
        fragments = []
        for piece in pieces:
            for source, _, held in stored_overlapping(stored, record.writer, shape, piece.box):
                needed.add(source)
                offset = HEADER_BYTES + number * extent_bytes
                fragments.append(Fragment(held.box, manifest.file_name(source), offset))
        count += len(fragments)
        wanted.append(Wanted(number, record.name, shape, ITEM_BYTES, pieces, fragments))
    plan = plan_reads(wanted)
    local = sum(piece.size for want in wanted for piece in want.pieces)
    if plan.wanted_bytes != local * ITEM_BYTES:
        raise AssertionError("the plan does not fill what was wanted")
    return needed, count
