"""Written hierarchies, read by stock zarr-python, tensorstore and xarray, and by our own source."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import xarray
import zarr

from ckptengine.errors import Damaged, DigestMismatch, NotFound, UnreadableFormat, UnusableRequest
from ckptengine.layout.box import Box
from ckptengine.layout.crc64 import raw_crc64
from ckptengine.layout.digest import format_digest, raw_to_standard
from ckptengine.layout.dtypes import ITEMSIZE
from ckptengine.operations.convert import convert
from ckptengine.operations.read import read_box, read_tensor
from ckptengine.sources.detect import open_source
from ckptengine.universal import detect
from ckptengine.universal.chunks import crc32c
from ckptengine.universal.datatypes import REGISTERED_TYPES
from tests.universal.checkpoints import FolderSource, content, whole

SHAPES = {"model.a": (40, 30), "model.a.b": (7,), "model.odd": (13, 5, 3), "optim.a.step": (), "model.none": (0, 4)}
VALUES = {"sched": {"last": 3, "lrs": [0.1, float("inf")], "t": (1, b"x", None)}, "note": "é"}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"shards": False},
    {"chunk_bytes": 200},
    {"chunk_bytes": 200, "shard_bytes": 1000},
    {"chunk_bytes": 200, "shards": False},
    {"compression": "zstd"},
    {"compression": "zstd:9", "chunk_bytes": 300},
    {"compression": "gzip:1", "chunk_bytes": 300, "shard_bytes": 700},
    {"compression": "gzip", "chunk_bytes": 500, "shards": False},
]


def made(folder: Path, dtype: str = "float32") -> tuple[FolderSource, dict[str, np.ndarray]]:
    folder.mkdir(exist_ok=True)
    arrays = {name: content(dtype, shape) for name, shape in SHAPES.items()}
    tensors = [whole(folder, name, dtype, array) for name, array in arrays.items()]
    return FolderSource(folder, tensors, VALUES, {}), arrays


def reopened(path: Path) -> Any:
    return open_source(path, formats=[detect.FORMAT])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_stock_readers_and_our_source(tmp_path: Path, options: dict[str, Any]) -> None:
    source, arrays = made(tmp_path / "in")
    target = tmp_path / "out.zarr"
    plan = convert(source, target, to="zarr", options=options)
    assert plan.state == "committed"
    files = [path for path in target.rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert len(files) == plan.files
    if "compression" not in options:
        assert sum(path.stat().st_size for path in files) == plan.write_bytes
    group = zarr.open_consolidated(str(target), mode="r")
    paths = {
        node.attrs["ckptengine"]["name"]: path for path, node in group.members(None) if isinstance(node, zarr.Array)
    }
    assert paths.keys() == arrays.keys()
    plain = zarr.open_group(str(target), mode="r", use_consolidated=False)
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(group[paths[name]][...]).view("u4"), array)
        np.testing.assert_array_equal(np.asarray(plain[paths[name]][...]).view("u4"), array)
        spec = {"driver": "zarr3", "kvstore": f"file://{target}/{paths[name]}"}
        np.testing.assert_array_equal(tensorstore.open(spec).result().read().result().view("u4"), array)
        digest = format_digest(raw_to_standard(raw_crc64(array), array.nbytes))
        assert group[paths[name]].attrs["ckptengine"]["digest"] == digest
    dataset = xarray.open_zarr(str(target), group="model", chunks=None)
    np.testing.assert_array_equal(dataset["odd"].values.view("u4"), arrays["model.odd"])
    again = reopened(target)
    assert sorted(again.names()) == sorted(arrays)
    assert again.values() == VALUES
    assert again.step == 7
    assert again.metrics == {"loss": 0.5}
    assert again.provenance["source"] == source.files.root
    for name, array in arrays.items():
        np.testing.assert_array_equal(read_tensor(again, again.tensor(name)), array)
        assert again.tensor(name).digest == format_digest(raw_to_standard(raw_crc64(array), array.nbytes))


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
@pytest.mark.parametrize("registered", [False, True])
def test_every_dtype_comes_back(tmp_path: Path, dtype: str, registered: bool) -> None:
    source, arrays = made(tmp_path / "in", dtype)
    target = tmp_path / "out"
    convert(source, target, to="zarr", options={"registered": registered, "chunk_bytes": 300, "compression": "zstd"})
    again = reopened(target)
    for name, array in arrays.items():
        tensor = again.tensor(name)
        assert tensor.dtype == dtype
        assert read_tensor(again, tensor).tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", sorted(REGISTERED_TYPES - {"float8_e8m0fnu"}))
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_tensorstore_reads_registered_types(tmp_path: Path, dtype: str, compression: str | None) -> None:
    source, arrays = made(tmp_path / "in", dtype)
    options = {"registered": True, "compression": compression, "chunk_bytes": 256}
    convert(source, tmp_path / "out", to="zarr", options=options)
    store = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{tmp_path}/out/model/odd"}).result()
    data = store.read().result()
    assert data.dtype == getattr(ml_dtypes, dtype)
    assert data.tobytes() == arrays["model.odd"].tobytes()


def test_aliases_share_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    array = content("float32", (8, 4))
    tensor = whole(folder, "model.embed", "float32", array)

    class Tied(FolderSource):
        def names(self) -> list[str]:
            return ["model.embed", "model.head"]

        def tensor(self, name: str) -> Any:
            return tensor

    convert(Tied(folder, [tensor], aliases={"model.head": "model.embed"}), tmp_path / "out", to="zarr")
    again = reopened(tmp_path / "out")
    assert again.aliases() == {"model.head": "model.embed"}
    np.testing.assert_array_equal(read_tensor(again, again.tensor("model.head")), array)
    assert not (tmp_path / "out/model/head").exists()


def test_a_slice_of_shards_reads_only_its_chunks(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    array = content("float32", (400, 30))
    source = FolderSource(folder, [whole(folder, "w", "float32", array)])
    convert(source, tmp_path / "out", to="zarr", options={"chunk_bytes": 1200, "shard_bytes": 12000})
    again = reopened(tmp_path / "out")
    seen: list[str] = []
    original = again.files.read_into

    def counted(path: str, offset: int, view: memoryview) -> None:
        seen.append(path)
        original(path, offset, view)

    again.files.read_into = counted
    out = np.empty((5, 30), "u4")
    read_box(again, again.tensor("w"), Box((123, 0), (5, 30)), out)
    np.testing.assert_array_equal(out, array[123:128])
    assert seen == ["w/c.1.0"]


def test_hierarchies_of_others(tmp_path: Path) -> None:
    group = zarr.create_group(str(tmp_path / "z"))
    rows = np.arange(60, dtype="i8").reshape(12, 5)
    rows[4:8] = 0  # a chunk of fill values is not stored
    group.create_array("a/rows", data=rows, chunks=(4, 5), compressors=None)
    group.create_array("a/packed", data=rows, chunks=(4, 2))
    group.create_array("a/sharded", data=rows, chunks=(2, 5), shards=(6, 5), compressors=None)
    group.create_array("turned", data=rows, chunks=(5, 5), filters=[zarr.codecs.TransposeCodec(order=(1, 0))])
    source = reopened(tmp_path / "z")
    assert sorted(source.names()) == ["a.packed", "a.rows", "a.sharded", "turned"]
    for name in source.names():
        np.testing.assert_array_equal(read_tensor(source, source.tensor(name)).view("i8"), rows)
    assert source.values() == {}
    convert(source, tmp_path / "again", to="zarr", verify=False)
    np.testing.assert_array_equal(zarr.open_group(str(tmp_path / "again"), mode="r")["turned"][:], rows)


def damaged(tmp_path: Path, options: dict[str, Any]) -> tuple[Path, Path]:
    source, _ = made(tmp_path / "in")
    target = tmp_path / "out"
    convert(source, target, to="zarr", options=options)
    (file,) = (
        sorted((target / "model/odd").glob("c.*"))[:1]
        if options.get("shards") is False
        else (target / "model/odd/c.0.0.0",)
    )
    return target, file


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    target, file = damaged(tmp_path, {"chunk_bytes": 100})
    data = file.read_bytes()
    file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    source = reopened(target)
    with pytest.raises(Damaged, match="model/odd"):
        read_tensor(source, source.tensor("model.odd"))
    file.write_bytes(data[:10])
    with pytest.raises(Damaged, match="model/odd"):
        read_tensor(source, reopened(target).tensor("model.odd"))
    file.unlink()
    with pytest.raises(NotFound, match="model/odd"):
        read_tensor(reopened(target), reopened(target).tensor("model.odd"))


def test_damaged_compressed_chunks(tmp_path: Path) -> None:
    target, file = damaged(tmp_path, {"compression": "zstd"})
    file.write_bytes(b"nonsense" * 9)
    source = reopened(target)
    with pytest.raises(Damaged, match=r"model\.odd|model/odd"):
        read_tensor(source, source.tensor("model.odd"))


@pytest.mark.parametrize("shards", [True, False])
def test_missing_compressed_chunks_are_no_zeros(tmp_path: Path, shards: bool) -> None:
    target, file = damaged(tmp_path, {"compression": "zstd", "chunk_bytes": 100, "shards": shards})
    if shards:
        data = file.read_bytes()
        node = json.loads((target / "model/odd/zarr.json").read_text())
        inner = node["codecs"][0]["configuration"]["chunk_shape"]
        outer = node["chunk_grid"]["configuration"]["chunk_shape"]
        size = 16 * math.prod(o // i for o, i in zip(outer, inner, strict=True))
        index = b"\xff" * 16 + data[-size - 4 : -4][16:]  # the first entry says that its chunk is not there
        file.write_bytes(data[: -size - 4] + index + crc32c(index).to_bytes(4, "little"))
        with pytest.raises(Damaged, match=r"model/odd.* lacks chunk"):
            read_tensor(reopened(target), reopened(target).tensor("model.odd"))
    file.unlink()
    with pytest.raises(NotFound, match=r"model/odd.*missing"):
        read_tensor(reopened(target), reopened(target).tensor("model.odd"))


def test_chunks_of_another_tensor_are_found(tmp_path: Path) -> None:
    """Reading all of a tensor compares it with its digest, which no other check replaces."""
    target, file = damaged(tmp_path, {"shards": False})
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    source = reopened(target)
    with pytest.raises(DigestMismatch, match=r"model\.odd"):
        read_tensor(source, source.tensor("model.odd"))


@pytest.mark.parametrize(
    "change",
    [
        lambda root: root.clear(),
        lambda root: root.update(zarr_format=2),
        lambda root: root["attributes"]["ckptengine"].update(version=99),
        lambda root: root["attributes"]["ckptengine"].update(aliases={"x": "nowhere"}),
        lambda root: root["attributes"].update(ckptengine=[]),
        lambda root: root["consolidated_metadata"]["metadata"]["model/odd"].pop("shape"),
        lambda root: root["consolidated_metadata"]["metadata"]["model/odd"].update(shape=[-1]),
        lambda root: root["consolidated_metadata"]["metadata"]["model/odd"].update(data_type="float7"),
        lambda root: root["consolidated_metadata"]["metadata"]["model/odd"].update(codecs=7),
        lambda root: root["consolidated_metadata"]["metadata"]["model/odd"]["chunk_grid"].update(name="rectangular"),
        lambda root: root["consolidated_metadata"]["metadata"]["model/odd"].update(shape=[1 << 50] * 3),
    ],
)
def test_hostile_metadata_is_refused(tmp_path: Path, change: Any) -> None:
    source, _ = made(tmp_path / "in")
    convert(source, tmp_path / "out", to="zarr")
    path = tmp_path / "out/zarr.json"
    root = json.loads(path.read_text())
    if "attributes" in root:
        root["consolidated_metadata"]["metadata"]["model/odd"]["attributes"] = {}
    change(root)
    path.write_text(json.dumps(root))
    with pytest.raises(UnreadableFormat):
        read_tensor(reopened(tmp_path / "out"), reopened(tmp_path / "out").tensor("model.odd"))


@pytest.mark.parametrize(
    "options", [{"compression": "lzma"}, {"compression": "zstd:99"}, {"nonsense": 1}, {"chunk_bytes": 0}]
)
def test_options_that_mean_nothing_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    source, _ = made(tmp_path / "in")
    with pytest.raises(UnusableRequest):
        convert(source, tmp_path / "out", to="zarr", options=options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_padding_is_small_and_zero(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    array = content("float32", (127, 31))
    convert(
        FolderSource(folder, [whole(folder, "w", "float32", array)]),
        tmp_path / "out",
        to="zarr",
        options={"chunk_bytes": 4000},
    )
    data = b"".join(path.read_bytes() for path in sorted((tmp_path / "out/w").glob("c*")))
    assert len(data) - array.nbytes < 0.1 * array.nbytes
    assert math.prod(array.shape) * 4 == array.nbytes
