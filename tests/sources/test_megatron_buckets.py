"""Buckets of Megatron's distributed optimizer, which name no parameter, and other legacy states that do not."""

from __future__ import annotations

import hashlib
import shutil
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptengine.errors import UnreadableFormat
from ckptengine.layout.box import Box
from ckptengine.operations.convert import convert
from ckptengine.sources.dcp.metadata import Chunk, TensorRecord
from ckptengine.sources.detect import open_source
from ckptengine.sources.megatron.buckets import find_slots
from ckptengine.sources.megatron.masters import rounds_to
from ckptengine.sources.megatron.unpadded import Viewed, aligned, without_padding

from .reading import compare, read_bytes, truth_of_json
from .test_megatron import agrees

ARCHIVE = Path(__file__).parent / "data" / "megatron_buckets.tar.xz"
DIST = ["dist_buckets_pp2_dp2_vpp2", "tiny_moe_buckets"]
LEGACY = ["tiny_legacy_buckets", "tiny_legacy_moe", "tiny_legacy_etp1", "tiny_legacy_frozen"]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron_buckets")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("case", DIST)
def test_dp_reshardable_is_read_by_name(written: Path, case: str) -> None:
    source = open_source(written / case / "checkpoint")
    agrees(source, written / case / "truth.json")
    assert {name.rpartition(".")[2] for name in source.names() if name.startswith("optim.")} == {
        "master", "exp_avg", "exp_avg_sq", "step",
    }  # fmt: skip


@pytest.mark.parametrize("case", LEGACY)
def test_legacy_states_get_their_names(written: Path, case: str) -> None:
    source = open_source(written / case / "checkpoint", rules="megatron-gpt")
    agrees(source, written / case / "truth.json")


def test_dp_reshardable_is_converted_whole(written: Path, tmp_path: Path) -> None:
    """Buckets of four ranks and two virtual stages -> the form that any parallelism loads."""
    convert(written / DIST[0] / "checkpoint", tmp_path / "out", to="megatron", options={"master": "param"})
    compare(open_source(tmp_path / "out"), truth_of_json(written / DIST[0] / "truth.json"), exact=False)


def test_buckets_that_do_not_fit_the_weights_are_refused(written: Path, tmp_path: Path) -> None:
    """One changed number among the fp32 copies: what they are the copies of is no longer certain."""
    folder = Path(shutil.copytree(written / DIST[0] / "checkpoint", tmp_path / "damaged"))
    source = open_source(folder)
    fragment = source.tensor("optim.decoder.layers.mlp.linear_fc2.weight.master").fragments[0]
    victim = folder / fragment.file
    data = bytearray(victim.read_bytes())
    (number,) = struct.unpack_from("<f", data, fragment.offset)
    struct.pack_into("<f", data, fragment.offset, number + 1)
    victim.write_bytes(data)
    with pytest.raises(UnreadableFormat, match="fully-reshardable"):
        open_source(folder)
    weights = open_source(folder, rules="megatron-weights")
    assert weights.names()
    assert all(name.startswith("model.") for name in weights.names())
    truth = truth_of_json(written / DIST[0] / "truth.json")
    compare(weights, {name: held for name, held in truth.items() if name.startswith("model.")})


def test_fused_experts_with_the_preset(written: Path) -> None:
    """[hidden, experts x width] of two tensor- and two expert-parallel ranks, against the experts one by one."""
    source = open_source(written / "tiny_legacy_grouped" / "checkpoint", rules="megatron-gpt")
    truth = truth_of_json(written / "tiny_legacy_grouped" / "truth.json")
    for fused, single in (("weight1", "linear_fc1.weight"), ("weight2", "linear_fc2.weight")):
        for head, tail in (("model.", ""), ("optim.", ".exp_avg"), ("optim.", ".exp_avg_sq")):
            layer = f"{head}decoder.layers.0.mlp.experts."
            tensor = source.tensor(f"{layer}{fused}{tail}")
            array = np.frombuffer(read_bytes(source.files, tensor), tensor.dtype).reshape(tensor.shape)
            assert len(array) == 4
            for expert, matrix in enumerate(array):
                _, shape, digest = truth[f"{layer}local_experts.{expert}.{single}{tail}"]
                assert list(matrix.T.shape) == shape
                assert hashlib.sha256(matrix.T.tobytes()).hexdigest() == digest


@settings(max_examples=80, deadline=None)
@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=14), limit=st.integers(1, 900), dp=st.integers(1, 3))
def test_starts_without_padding_are_among_the_candidates(sizes: list[int], limit: int, dp: int) -> None:
    """Lays parameters out as Megatron does: a bucket is closed once it holds ``limit`` elements."""
    views, starts = [], []
    bucket = end = removed = 0
    multiple = 128 * dp if dp == 3 else 128
    for number, size in enumerate(sizes):
        start = -(-end // 64) * 64
        views.append(Viewed(start, size))
        starts.append(start - removed)
        end = start + size
        if end - bucket >= limit and number + 1 < len(sizes):
            padded = -(-end // multiple) * multiple
            removed += padded - end
            bucket = end = padded
    found = list(without_padding(views, end - removed))
    assert starts in found


def test_one_bucket_is_only_aligned() -> None:
    assert aligned([8, 64, 70, 1]) == [0, 64, 128, 256]
    assert not list(without_padding([Viewed(0, 8), Viewed(4, 8)], 12))


def test_rounding() -> None:
    numbers = struct.pack("<4f", 1.0, -2.5, 1 + 2**-9, 3e-40)
    assert rounds_to(numbers, numbers, "float32")
    assert rounds_to(numbers, struct.pack("<4H", 0x3F80, 0xC020, 0x3F80, 0x0003), "bfloat16")
    assert not rounds_to(numbers, struct.pack("<4H", 0x3F80, 0xC020, 0x3F81, 0x0003), "bfloat16")
    assert rounds_to(numbers[:8], struct.pack("<2e", 1.0, -2.5), "float16")
    assert not rounds_to(numbers[:8], b"\0\0", "float8_e4m3fn")


def record(dtype: str, *chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> TensorRecord:
    ends = [[o + n for o, n in zip(offsets, extents, strict=True)] for offsets, extents in chunks]
    shape = tuple(max(column) for column in zip(*ends, strict=True))
    return TensorRecord(dtype, shape, tuple(Chunk(offsets, extents, None) for offsets, extents in chunks))


def test_slots_of_tensor_parallel_ranks() -> None:
    """Two ranks of one layer: the cut weight's halves, the whole norm on both; nothing but sizes to go by."""
    prefix = "optimizer.distributed.dp_group_idx_{}.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.param"
    records: dict[str, Any] = {
        "decoder.layers.linear_proj.weight": record("bfloat16", ((0, 0, 0), (1, 4, 5)), ((0, 0, 5), (1, 4, 5))),
        "decoder.final_layernorm.weight": record("bfloat16", ((0,), (4,))),
    }
    for rank in (0, 1):
        records[prefix.format(rank)] = record("float32", ((0,), (4,)), ((4,), (60,)), ((64,), (20,)))
    slots = find_slots(records, {}, lambda slot: True, {})
    placed = [(slot.start, slot.parameter.key.split(".")[1], slot.parameter.boxes[0]) for slot in slots]
    assert placed == [
        (0, "final_layernorm", Box((0,), (4,))),
        (64, "layers", Box((0, 0, 0), (1, 4, 5))),
        (0, "final_layernorm", Box((0,), (4,))),
        (64, "layers", Box((0, 0, 5), (1, 4, 5))),
    ]
    assert [slot.parameter.is_copy for slot in slots] == [False, False, True, False]
    with pytest.raises(UnreadableFormat, match="megatron-weights"):
        find_slots(records, {}, lambda slot: False, {})
    records[prefix.format(1)] = record("float32", ((0,), (4,)), ((4,), (60,)), ((64,), (21,)))
    with pytest.raises(UnreadableFormat, match="any order"):
        find_slots(records, {}, lambda slot: True, {})
