"""Filling from our own format: each stored byte at most once, only what is needed, and never unverified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptengine as ce
from ckptengine import native
from ckptengine.errors import DigestMismatch, RestoreIncomplete
from ckptengine.layout.box import Box
from ckptengine.layout.piece import Piece, whole
from ckptengine.operations.filling import fill as filling
from ckptengine.operations.filling import native as fill_native
from ckptengine.operations.filling.fill import Fill
from ckptengine.operations.opening import open_any
from ckptengine.state.target import Target

from .simulated import restore_all, save_all


def counting(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).view(shape)


def box_target(name: str, box: Box) -> Target:
    return Target(name, torch.full(box.shape, -1, dtype=torch.int32), (Piece.packed(box),))


def part(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(a, b) for a, b in zip(box.offsets, box.ends, strict=True))]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("fill")
    ce.save({"big": counting(2048, 4096), "wide": counting(8, 1 << 19), "small": counting(3)}, found, 1)
    return found


@pytest.mark.parametrize(
    ("name", "box", "most"),
    [
        ("big", Box((0, 0), (2048, 4096)), 1.001),
        ("big", Box((333, 0), (1000, 4096)), 1.02),  # one run of 16 MiB inside an extent
        ("wide", Box((0, 5), (3, 5 << 16)), 1.04),  # runs of 1.25 MiB
        ("big", Box((7, 0), (4, 4096)), 1.5),  # 64 KiB: at most two granules too many
        ("big", Box((100, 17), (64, 33)), 20.0),  # one page of each row: what lies between is read along
        ("small", Box((1,), (1,)), 4.0),
    ],
)
def test_boxes_and_what_reading_them_costs(root: Path, name: str, box: Box, most: float) -> None:
    shapes = {"big": (2048, 4096), "wide": (8, 1 << 19), "small": (3,)}
    target = box_target(name, box)
    filled = Fill(open_any(root), [target]).run()
    assert torch.equal(target.tensor, part(counting(*shapes[name]), box))
    assert filled.wanted_bytes == 4 * box.size
    assert filled.wanted_bytes <= filled.read_bytes + 4096 * 16
    if most < 10:
        assert filled.read_bytes <= max(most * filled.wanted_bytes, 16384)


def test_amplification_floors(tmp_path: Path) -> None:
    """Column slices whose runs are 4 MiB and 64 KiB long, anywhere among the granules."""
    ce.save({"long": counting(4, 3 << 20), "short": counting(64, 3 << 14)}, tmp_path, 1)
    for name, shape, run, most in (("long", (4, 3 << 20), 1 << 20, 1.02), ("short", (64, 3 << 14), 1 << 14, 1.25)):
        for first in (0, 1001, shape[1] - run):
            target = box_target(name, Box((0, first), (shape[0], run)))
            filled = Fill(open_any(tmp_path), [target]).run()
            assert torch.equal(target.tensor, part(counting(*shape), target.pieces[0].box))
            assert filled.read_bytes <= most * filled.wanted_bytes


def test_all_targets_together_read_each_byte_once(root: Path) -> None:
    boxes = [Box((16 * i, 0), (16, 4096)) for i in range(0, 128, 3)] + [
        Box((0, 0), (2048, 2048)),
        Box((0, 2048), (2048, 2048)),
    ]
    targets = [box_target("big", box) for box in boxes]
    filled = Fill(open_any(root), targets).run()
    for target, box in zip(targets, boxes, strict=True):
        assert torch.equal(target.tensor, part(counting(2048, 4096), box))
    assert filled.read_bytes <= 2048 * 4096 * 4


def test_memory_of_every_kind(root: Path) -> None:
    """Transposed, with steps, and with elements between the pieces that must stay as they are."""
    transposed = torch.full((4096, 2048), -1, dtype=torch.int32).t()
    stepped = torch.full((2048, 8192), -1, dtype=torch.int32)[:, ::2]
    padded = torch.full((5,), -1, dtype=torch.int32)
    gaps = torch.full((10,), -1, dtype=torch.int32)[::2]
    targets = [
        Target("big", transposed, whole((2048, 4096))),
        Target("big", stepped, whole((2048, 4096))),
        Target("small", padded, (Piece(Box((0,), (3,)), 1, (1,)),)),
        Target("small", gaps, (Piece(Box((0,), (2,)), 1, (2,)),)),
    ]
    Fill(open_any(root), targets).run()
    assert torch.equal(transposed, counting(2048, 4096))
    assert torch.equal(stepped, counting(2048, 4096))
    assert padded.tolist() == [-1, 0, 1, 2, -1]
    assert gaps.tolist() == [-1, 0, -1, 1, -1]


def test_staging_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "STAGE_BYTES", 1 << 20)
    monkeypatch.setattr(filling, "_in_place", lambda tensor: False)
    seen: list[int] = []
    landing = filling._landing
    monkeypatch.setattr(filling, "_landing", lambda target: seen.append(target.tensor.nbytes) or landing(target))
    live = torch.full((2048, 4096), -1, dtype=torch.int32)
    Fill(open_any(root), [Target("big", live, whole((2048, 4096)))]).run()
    assert torch.equal(live, counting(2048, 4096))
    assert sum(seen) == live.nbytes
    assert max(seen) <= 1 << 20


def _remote(source: Any) -> Any:
    source.files.local_path = lambda path: None
    return source


def _through_the_cache(source: Any) -> Any:
    return source


@pytest.mark.parametrize("way", [_remote, _through_the_cache])
def test_every_way_of_reading_gives_the_same(
    root: Path, way: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill_native, "_is_cached", lambda *_: way is _through_the_cache)
    boxes = [Box((333, 0), (1000, 4096)), Box((100, 17), (64, 33))]
    targets = [box_target("big", box) for box in boxes] + [box_target("small", Box((0,), (3,)))]
    Fill(way(open_any(root)), targets, shared=way is _through_the_cache).run()
    for target in targets[:2]:
        assert torch.equal(target.tensor, part(counting(2048, 4096), target.pieces[0].box))
    assert targets[2].tensor.tolist() == [0, 1, 2]


@pytest.mark.parametrize("way", [lambda source: source, _remote], ids=["local", "remote"])
@pytest.mark.parametrize("partial", [False, True])
def test_a_flipped_bit_is_named(tmp_path: Path, partial: bool, way: Callable[[Any], Any]) -> None:
    ce.save({"w": counting(300, 4096), "v": counting(300, 4096)}, tmp_path, 1)
    source: Any = open_any(tmp_path)
    at = source.tensor("w").fragments[0].offset + 4 * (150 * 4096 + 77)
    file = next(tmp_path.glob("step-*/rank-*"))
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)
    box = Box((149, 0), (3, 4096)) if partial else Box((0, 0), (300, 4096))
    with pytest.raises(DigestMismatch, match=rf"{file.name}: bytes \d+\.\.\d+ of tensor 'w'"):
        Fill(way(open_any(tmp_path)), [box_target("w", box), box_target("v", box)]).run()
    Fill(way(open_any(tmp_path)), [box_target("w", Box((0, 0), (100, 4096))), box_target("v", box)]).run()


def test_damage_found_while_filling_leaves_no_doubt(tmp_path: Path) -> None:
    save_all([{"w": counting(64, 64)}], tmp_path)
    file = next(tmp_path.glob("step-*/rank-*"))
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    with pytest.raises(RestoreIncomplete, match="digest"):
        restore_all([{"w": torch.zeros(64, 64, dtype=torch.int32)}], tmp_path)


def test_many_small_tensors_are_few_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"t{i}": torch.full((i % 37 + 1,), i, dtype=torch.int32) for i in range(3000)}
    ce.save(state, tmp_path, 1)
    live = {name: torch.full_like(tensor, -1) for name, tensor in state.items()}
    calls: list[int] = []
    read = native.read_ranges
    monkeypatch.setattr(
        native, "read_ranges", lambda files, ranges, **kw: calls.append(len(ranges)) or read(files, ranges, **kw)
    )
    ce.load(live, tmp_path)
    assert all(torch.equal(live[name], tensor) for name, tensor in state.items())
    assert len(calls) == 1
    assert calls[0] == 3000


def test_a_slice_of_a_large_tensor_reads_only_its_bytes(root: Path) -> None:
    with ce.open(root) as checkpoint:
        files: Any = checkpoint.source.files
        checkpoint.read("small")  # the index is read once
        seen: list[int] = []
        into, read = files.read_into, files.read
        files.read_into = lambda path, offset, view: seen.append(len(view)) or into(path, offset, view)
        files.read = lambda path, offset, nbytes: seen.append(nbytes) or read(path, offset, nbytes)
        found = checkpoint.read("big", (slice(333, 397), slice(None)))
        assert torch.equal(found, counting(2048, 4096)[333:397])
        table = 8 * 2048 * 4096 * 4 // 16384
        assert sum(seen) <= found.nbytes + 2 * 16384 + table


def test_parts_of_a_sharded_checkpoint_without_ranks(tmp_path: Path) -> None:
    """One slice, one sub-tree, some names: from what four ranks saved, in a single process."""
    full = counting(64, 512)
    states = [
        {
            "model": {
                "w": ce.Sharded(full[16 * r : 16 * r + 16].clone(), (64, 512), offset=(16 * r, 0)),
                "b": counting(5),
            }
        }
        for r in range(4)
    ]
    save_all(states, tmp_path)
    with ce.open(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("model.w"), full)
        opened: list[str] = []
        files: Any = checkpoint.source.files
        read_into = files.read_into
        files.read_into = lambda path, offset, view: opened.append(path) or read_into(path, offset, view)
        assert torch.equal(checkpoint.read("model.w", (slice(20, 24), slice(3, 9))), full[20:24, 3:9])
        assert {path.split("/")[1][:10] for path in opened} == {"rank-00001"}
        assert torch.equal(checkpoint.state_dict("model")["w"], full)
    live = {"model": {"w": torch.zeros(64, 512, dtype=torch.int32), "b": torch.full((5,), -1, dtype=torch.int32)}}
    restore_all([live], tmp_path, names=["model.w"])
    assert torch.equal(live["model"]["w"], full)
    assert live["model"]["b"].tolist() == [-1] * 5
