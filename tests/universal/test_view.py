"""The zarr view: names, data types, chunk grids, laziness, and every kind of selection against numpy."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.core.buffer import default_buffer_prototype

from ckptengine.errors import LayoutError, UnusableRequest
from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import ITEMSIZE
from ckptengine.layout.tensor import Fragment, LogicalTensor
from ckptengine.operations.read import BoxReader
from ckptengine.universal import grid
from ckptengine.universal.datatypes import REGISTERED_TYPES, ZARR_TYPES
from ckptengine.universal.names import NameTree, path_of
from ckptengine.universal.view import CheckpointStore, open_view
from tests.universal.checkpoints import FolderSource, content, stored, whole

SHAPE = (12, 10)
CUTS = {
    "whole": [Box.whole(SHAPE)],
    "even rows": [Box((i, 0), (4, 10)) for i in (0, 4, 8)],
    "uneven rows": [Box((0, 0), (5, 10)), Box((5, 0), (5, 10)), Box((10, 0), (2, 10))],
    "columns": [Box((0, 0), (12, 5)), Box((0, 5), (12, 5))],
    "grid": [Box((i, j), (6, 5)) for i in (0, 6) for j in (0, 5)],
    "flat runs": [Box((0, 0), (3, 10)), Box((3, 0), (1, 7)), Box((3, 7), (1, 3)), Box((4, 0), (8, 10))],
}


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_every_dtype_reads_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    truth = content(dtype, (5, 6))
    source = FolderSource(tmp_path, [whole(tmp_path, "model.w", dtype, truth)])
    for registered in (True, False):
        array = open_view(source, BoxReader, registered=registered)["model/w"]
        read = array[:]
        assert read.tobytes() == truth.tobytes()
        kind = str(read.dtype)
        assert (kind == dtype) == (dtype in ZARR_TYPES or (registered and dtype in REGISTERED_TYPES))
        assert array.attrs["ckptengine"] == {"name": "model.w", "dtype": dtype}


@pytest.mark.parametrize("cut", sorted(CUTS))
@pytest.mark.parametrize("target_bytes", [1 << 20, 64])
def test_every_cut_reads_through_chunks_and_past_them(
    tmp_path: Path, cut: str, target_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = content("float32", SHAPE)
    tensor = stored(tmp_path, "w", "float32", truth, CUTS[cut])
    monkeypatch.setattr("ckptengine.universal.view.view_grid", lambda t: grid.view_grid(t, target_bytes))
    source = FolderSource(tmp_path, [tensor])
    direct = open_view(source, BoxReader)["w"]
    chunked = zarr.open_array(CheckpointStore(source, BoxReader), path="w", mode="r")  # zarr's own pipeline
    for array in (direct, chunked):
        np.testing.assert_array_equal(array[:].view("u4"), truth)
        np.testing.assert_array_equal(array[3:11, 2:9].view("u4"), truth[3:11, 2:9])
        np.testing.assert_array_equal(array[4].view("u4"), truth[4])
        np.testing.assert_array_equal(array[:, -1].view("u4"), truth[:, -1])
        np.testing.assert_array_equal(np.asarray(array[2, 3]).view("u4"), truth[2, 3])
        np.testing.assert_array_equal(array[::5, 1::3].view("u4"), truth[::5, 1::3])
        np.testing.assert_array_equal(array.oindex[[1, 7, 3], :].view("u4"), truth[[1, 7, 3], :])
        np.testing.assert_array_equal(array.vindex[[1, 7], [2, 9]].view("u4"), truth[[1, 7], [2, 9]])
        np.testing.assert_array_equal(array[...].view("u4"), truth)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=2, max_size=2), st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_any_rectangle_of_any_grid(
    tmp_path_factory: pytest.TempPathFactory, ends: list[tuple[int, int]], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("view")
    truth = content("int16", (12, 12))
    source = FolderSource(folder, [stored(folder, "w", "int16", truth, [Box((0, 0), (7, 12)), Box((7, 0), (5, 12))])])
    (a, b), (c, d) = (tuple(sorted(pair)) for pair in ends)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckptengine.universal.view.view_grid", lambda t: grid.view_grid(t, limit))
        array = open_view(source, BoxReader)["w"]
        np.testing.assert_array_equal(array[a:b, c:d].view("u2"), truth[a:b, c:d])


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    step = whole(tmp_path, "optim.step", "float32", np.array(0x40E00000, "u4"))
    empty = LogicalTensor("model.empty", "float32", (0, 3), [])
    group = open_view(FolderSource(tmp_path, [step, empty]), BoxReader)
    assert group["optim/step"][()] == 7.0
    assert group["optim"]["step"].shape == ()
    assert group["model/empty"][:].shape == (0, 3)


def test_a_slice_reads_only_what_it_needs(tmp_path: Path) -> None:
    truth = content("float32", (1024, 2048))
    source = FolderSource(tmp_path, [whole(tmp_path, "w", "float32", truth)])
    reads: list[int] = []
    original = source.files.read_into

    def counted(path: str, offset: int, view: memoryview) -> None:
        reads.append(view.nbytes)
        original(path, offset, view)

    source.files.read_into = counted  # type: ignore[method-assign]
    array = open_view(source, BoxReader)["w"]
    np.testing.assert_array_equal(array[10:13].view("u4"), truth[10:13])
    assert sum(reads) == 3 * 2048 * 4
    reads.clear()
    np.testing.assert_array_equal(array[:, 5:9].view("u4"), truth[:, 5:9])
    assert sum(reads) == 1024 * 4 * 4


def test_a_group_of_100000_lists_without_building_a_tensor(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(8))
    names = [f"model.layers.{i}.weight" for i in range(100_000)]

    class Lazy(FolderSource):
        def names(self) -> list[str]:
            return names

        def tensor(self, name: str) -> LogicalTensor:
            self.built.append(name)
            return LogicalTensor(name, "float32", (2,), [Fragment(Box.whole((2,)), "f", 0)])

    source = Lazy(tmp_path, [])
    start = time.perf_counter()
    group = open_view(source, BoxReader)
    assert sum(1 for _ in group["model/layers"].keys()) == 100_000  # noqa: SIM118
    assert group["model/layers"].nmembers() == 100_000
    assert "77777" in group["model/layers"]
    assert "x" not in group["model/layers"]
    elapsed_s = time.perf_counter() - start
    assert source.built == []
    assert elapsed_s < 5
    assert group["model/layers/77777/weight"].shape == (2,)
    assert source.built == ["model.layers.77777.weight"]


def test_members_tree_and_listing(tmp_path: Path) -> None:
    value = np.arange(4, dtype="u4")
    names = ["model.a.w", "model.a.b", "model.c", "optim.model.a.w.exp_avg"]
    source = FolderSource(tmp_path, [whole(tmp_path, name, "int32", value) for name in names])
    group = open_view(source, BoxReader)
    assert sorted(group.keys()) == ["model", "optim"]
    assert sorted(group["model"].array_keys()) == ["c"]
    assert sorted(group["model"].group_keys()) == ["a"]
    arrays = {path for path, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
    assert arrays == {"model/a/w", "model/a/b", "model/c", "optim/model/a/w/exp_avg"}
    store = group.store

    async def listed() -> set[str]:
        return {key async for key in store.list()}

    keys = asyncio.run(listed())
    assert "zarr.json" in keys
    assert "model/a/w/c/0" in keys
    for key in keys:
        assert asyncio.run(store.exists(key))
        assert len(asyncio.run(store.get(key, default_buffer_prototype())).to_bytes()) == asyncio.run(
            store.getsize(key)
        )
    for key in ("x", "model/x/zarr.json", "model/c/c/1", "model/c/c/0/0", "model/c/c/-1", "model/c/c/x", "c/0"):
        assert not asyncio.run(store.exists(key))
        assert asyncio.run(store.get(key, default_buffer_prototype())) is None


def test_the_view_cannot_be_written(tmp_path: Path) -> None:
    source = FolderSource(tmp_path, [whole(tmp_path, "w", "int32", np.arange(4, dtype="u4"))])
    group = open_view(source, BoxReader)
    with pytest.raises((ValueError, UnusableRequest), match="read-only"):
        group["w"][:] = 1
    with pytest.raises((ValueError, UnusableRequest), match="read-only"):
        group.create_array("x", shape=(1,), dtype="i4")


def test_a_gap_between_fragments_is_an_error_not_zeros(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(40))
    torn = LogicalTensor("w", "int32", (10,), [Fragment(Box((0,), (9,)), "f", 0)])
    with pytest.raises(LayoutError, match="'w'"):
        open_view(FolderSource(tmp_path, [torn]), BoxReader)["w"][:]


NAMES = st.lists(
    st.lists(st.text(alphabet="ab.c\\/%é=_-0 ", max_size=5), min_size=1, max_size=4).map(".".join),
    max_size=30,
    unique=True,
)


@given(NAMES)
@settings(max_examples=300, deadline=None)
def test_any_set_of_names_makes_a_tree(names: list[str]) -> None:
    assert len({path_of(name) for name in names}) == len(names)
    tree = NameTree(names)
    assert sorted(tree.arrays.values()) == sorted(names)
    assert not tree.groups & tree.arrays.keys()
    seen: list[str] = []

    def walk(group: str) -> None:
        children = list(tree.children(group))
        assert len(set(children)) == len(children)
        for child in children:
            path = f"{group}/{child}" if group else child
            assert child not in ("", ".", "..", "zarr.json")
            assert not child.startswith("__")
            if path in tree.arrays:
                seen.append(path)
            else:
                walk(path)

    walk("")
    assert sorted(seen) == sorted(tree.arrays)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("model.w-1_b", "model/w-1_b"),
        (r"layers\.3\.w.step", "layers%5C%2E3%5C%2Ew/step"),
        (r"a\\.b", "a%5C%5C/b"),
        (r"a\\\.b", "a%5C%5C%5C%2Eb"),
        ("a\\", "a%5C"),
        ("a.\\", "a/%5C"),
        ("a..b.", "a/==/b/=="),
        ("\u00e9/ .\ud800", "%C3%A9%2F%20/%ED%A0%80"),
        ("__a.b", "%5F_a/b"),
    ],
)
def test_paths_of_names(name: str, path: str) -> None:
    """As in hierarchies that exist: cut at dots that no backslash escapes, the rest safe for files and addresses."""
    assert path_of(name) == path


def test_very_long_names_stay_apart() -> None:
    first, second = "x" * 400 + ".é" * 3, "x" * 401 + ".é" * 3
    assert path_of(first) != path_of(second)
    assert all(len(part) <= 255 for part in path_of(first).split("/"))
