"""Comparing checkpoints: by digest, by value, by structure, and the numbers that are shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ckptengine.cli import main
from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import ITEMSIZE
from ckptengine.operations import diff as diff_module
from ckptengine.operations.convert import convert
from ckptengine.operations.diff import diff
from ckptengine.operations.digests import blocks
from ckptengine.operations.element_values import as_numbers
from tests.operations_convert.test_convert import checkpoint, digest
from tests.universal.checkpoints import FolderSource, content, stored, whole


def one(
    folder: Path, array: np.ndarray, dtype: str = "float32", boxes: list[Box] | None = None, **more: Any
) -> FolderSource:
    folder.mkdir(exist_ok=True)
    tensor = stored(folder, "w", dtype, array, boxes or [Box.whole(array.shape)])
    return FolderSource(folder, [replace(tensor, **more)])


def test_equal_by_digest_reads_nothing(tmp_path: Path) -> None:
    source, arrays = checkpoint(tmp_path / "a")
    convert(source, tmp_path / "b", to="zarr")
    from ckptengine.operations.opening import open_any

    other = open_any(tmp_path / "b")
    source.files.read_into = None  # type: ignore[method-assign,assignment]
    found = diff(source, other)
    assert found.same
    assert (found.by_digest, found.by_value, found.tensors) == (len(arrays), 0, len(arrays))


def test_equal_by_value_across_layouts(tmp_path: Path) -> None:
    array = content("bfloat16", (12, 6))
    a = one(tmp_path / "a", array, "bfloat16")
    b = one(tmp_path / "b", array, "bfloat16", [Box((0, 0), (12, 2)), Box((0, 2), (12, 4))])
    found = diff(a, b)
    assert found.same
    assert (found.by_digest, found.by_value) == (0, 1)


@pytest.mark.parametrize("chunk_bytes", [4, 64, 1 << 20])
def test_the_largest_difference_and_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(diff_module, "CHUNK_BYTES", chunk_bytes)
    array = np.arange(60, dtype="f4").reshape(5, 12)
    changed = array.copy()
    changed[1, 3] += 0.5
    changed[4, 7] -= 2.0
    changed[4, 8] += 1.0
    (found,) = diff(one(tmp_path / "a", array.view("u4")), one(tmp_path / "b", changed.view("u4"))).differing
    assert (found.kind, found.elements, found.largest, found.at) == ("values", 3, 2.0, (4, 7))
    assert (float(found.a), float(found.b)) == (55.0, 53.0)


def test_nan_equals_itself_and_hides_nothing(tmp_path: Path) -> None:
    array = np.array([np.nan, 1.0, 2.0], "f4")
    assert diff(one(tmp_path / "a", array.view("u4")), one(tmp_path / "b", array.view("u4"))).same
    other = np.array([np.nan, np.nan, 2.5], "f4")
    (found,) = diff(one(tmp_path / "c", array.view("u4")), one(tmp_path / "d", other.view("u4"))).differing
    assert (found.elements, found.largest, found.at) == (2, 0.5, (2,))
    only = np.array([np.nan, np.inf, 2.0], "f4")
    (found,) = diff(one(tmp_path / "e", array.view("u4")), one(tmp_path / "f", only.view("u4"))).differing
    assert (found.elements, found.largest, found.at) == (1, None, (1,))


def test_structure(tmp_path: Path) -> None:
    value = np.arange(6, dtype="u4")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a = FolderSource(
        tmp_path / "a",
        [
            whole(tmp_path / "a", n, t, value.reshape(s))
            for n, t, s in (("x", "int32", 6), ("y", "int32", 6), ("z", "int32", 6))
        ],
        {"lr": 0.1, "list": [1, 2], "nan": float("nan"), "same": (1, 2), "t": True},
    )
    b = FolderSource(
        tmp_path / "b",
        [
            whole(tmp_path / "b", n, t, value.reshape(s))
            for n, t, s in (("y", "float32", (6,)), ("z", "int32", (2, 3)), ("v", "int32", (6,)))
        ],
        {"lr": 0.2, "list": [1, 3], "nan": float("nan"), "same": [1, 2], "more": 1, "t": 1},
    )
    found = diff(a, b)
    assert (found.only_a, found.only_b) == (("x",), ("v",))
    assert [(d.name, d.kind) for d in found.differing] == [("y", "dtype"), ("z", "shape")]
    assert [(v.path, v.a, v.b) for v in found.values] == [
        ("lr", "0.1", "0.2"),
        ("list.1", "2", "3"),
        ("t", "True", "1"),
        ("more", None, "1"),
    ]
    assert not diff(a, b, values=False).values


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_numbers_of_every_type(dtype: str) -> None:
    item = ITEMSIZE[dtype]
    octets = np.random.default_rng(5).integers(0, 256, 4096 * item, dtype=np.uint8)
    if item == 1:
        octets = np.arange(256, dtype=np.uint8)
    if dtype == "bool":
        octets &= 1
    units = octets.view(np.dtype("V16") if item == 16 else f"u{item}")
    got = as_numbers(units, dtype)
    if dtype in ("float4_e2m1fn_x2", "complex32"):
        assert got.shape == units.shape
        return
    native = np.dtype(getattr(ml_dtypes, dtype, dtype))
    with np.errstate(all="ignore"):
        wanted = octets.view(native)
        wanted = np.abs(wanted).astype("f8") if native.kind == "c" else wanted.astype("f8")
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (4, 0, 2), (1, 9, 1)])
@pytest.mark.parametrize("limit", [1, 2, 5, 100])
def test_blocks_cover_in_order(shape: tuple[int, ...], limit: int) -> None:
    seen = np.zeros(shape, int)
    for box in blocks(shape, limit):
        assert 0 < box.size <= limit
        seen[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))] += 1
    assert (seen == 1).all()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, arrays = checkpoint(tmp_path / "in")
    convert(source, tmp_path / "a", to="zarr")
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert main(["convert", a, b, "--to", "zarr", "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert (
        main(
            ["convert", a, b, "--to", "zarr", "--verify", "--memory", "64MiB", "--option", "chunk_bytes=1KiB", "--json"]
        )
        == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert (document["state"], document["verified"], document["compared"]) == ("committed", len(arrays), len(arrays))
    assert main(["diff", a, b]) == 0
    assert "same: 6 of 6" in capsys.readouterr().out
    source._tensors["model.layers.0.weight"] = one(tmp_path / "x", np.zeros((50, 8), "u4")).tensor("w")
    source._tensors["model.layers.0.weight"] = replace(
        whole(tmp_path / "in", "model.layers.0.weight", "float32", np.zeros((50, 8), "u4")),
        digest=digest(np.zeros((50, 8), "u4")),
    )
    convert(source, c, to="zarr")
    assert main(["diff", a, c, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["same"]
    assert [d["name"] for d in found["differing"]] == ["model.layers.0.weight"]
    assert main(["convert", a, b, "--to", "zarr"]) == 2
    assert main(["diff", a, str(tmp_path / "nowhere")]) == 2
    assert main(["convert", a, str(tmp_path / "d"), "--to", "zarr", "--option", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(":")[0] for line in captured.err.splitlines()] == [
        "ckptengine convert",
        "ckptengine diff",
        "ckptengine convert",
    ]
