"""Files of torch.save read by range: values, tensors, both formats, damage."""

from __future__ import annotations

import argparse
import collections
import enum
import io
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckptengine.errors import CheckpointError, Damaged, Truncated, UnreadableFormat, UnsupportedValue
from ckptengine.sources.emit import Tensor, dumps, size, storage_of
from ckptengine.sources.files import LocalFiles
from ckptengine.sources.plain import plain, walk_tensors
from ckptengine.sources.stored import StoredTensor
from ckptengine.sources.torchzip import TorchZip, load_torch
from ckptengine.sources.zipwriter import ZipForm, ZipWriter, zip_bytes

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


class Colour(enum.Enum):
    RED = 1


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def counting(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    float8 = dtype.itemsize == 1 and dtype.is_floating_point
    return (numbers % 251).to(torch.uint8).view(dtype) if float8 else numbers.to(dtype)


def state() -> dict[str, Any]:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "model": collections.OrderedDict((str(dtype), counting((3, 5), dtype)) for dtype in DTYPES),
        "transposed": base.t(),
        "slice": base[1:3, 2:5],
        "tied": base,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7.5),
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "nested": [1, None, True, 2.5, "text", b"bytes", {"x": (torch.arange(3), 4)}, {5}, 1 << 80],
        "args": argparse.Namespace(lr=0.1, name="n", dtype=torch.bfloat16),
        "numpy": np.arange(6, dtype=">i4").reshape(2, 3),
        "number": np.float32(0.1),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "enum": Colour.RED,
        "default": collections.defaultdict(int, a=1),
    }


@pytest.fixture(params=["zip", "legacy"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    value = state()
    if request.param == "legacy":  # uint16 and friends came after the format
        value["model"] = {name: t for name, t in value["model"].items() if "uint16" not in name}
    torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=request.param == "zip")
    return tmp_path, value


def test_every_tensor_is_found_in_place(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, value = saved
    files = LocalFiles(str(folder))
    stored = dict(walk_tensors(load_torch(files, "x.pt")))
    expected = {}
    for path in stored:
        item: Any = value
        for key in path:
            item = item[key]
        expected[path] = item
    assert len(stored) == len(value["model"]) + 8
    for path, tensor in stored.items():
        assert tensor.shape == tuple(expected[path].shape), path
        assert f"torch.{tensor.dtype}" == str(expected[path].dtype), path
        assert tensor.read(files) == raw(expected[path]), path
        fragment = tensor.fragment()
        assert fragment.is_contiguous == tensor.is_contiguous


def test_tied_tensors_share_their_storage(saved: tuple[Path, dict[str, Any]]) -> None:
    loaded: Any = load_torch(LocalFiles(str(saved[0])), "x.pt")
    assert loaded["tied"].storage is loaded["transposed"].storage
    assert loaded["tied"].identity != loaded["transposed"].identity


def test_values_become_plain(saved: tuple[Path, dict[str, Any]]) -> None:
    values: Any = plain(load_torch(LocalFiles(str(saved[0])), "x.pt"))
    assert "model" not in values
    assert values["nested"] == [1, None, True, 2.5, "text", b"bytes", {"x": (None, 4)}, {5}, 1 << 80]
    assert values["args"] == {"lr": 0.1, "name": "n", "dtype": "torch.bfloat16"}
    assert values["numpy"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert values["number"] == float(np.float32(0.1))
    assert values["size"] == (1, 2)
    assert values["device"] == "cpu"
    assert values["enum"]["args"] == [1]
    assert values["enum"]["__class__"].endswith("Colour")
    assert values["default"] == {"a": 1}


def test_a_zip_inside_of_a_larger_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    tensor = torch.arange(1000)
    torch.save(tensor, buffer)
    (tmp_path / "many").write_bytes(b"x" * 777 + buffer.getvalue() + b"y" * 500)
    files = LocalFiles(str(tmp_path))
    stored = TorchZip(files, "many", 777, len(buffer.getvalue())).load()
    assert isinstance(stored, StoredTensor)
    assert stored.read(files) == raw(tensor)


@pytest.mark.parametrize("new", [True, False])
def test_every_truncation_is_an_error(tmp_path: Path, new: bool) -> None:
    torch.save({"a": torch.arange(40), "b": [1, 2]}, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    data = (tmp_path / "x.pt").read_bytes()
    for length in range(0, len(data) - 1, 7):
        (tmp_path / "cut.pt").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            load_torch(LocalFiles(str(tmp_path)), "cut.pt")


@pytest.mark.parametrize("new", [True, False])
def test_no_flipped_byte_raises_anything_else(tmp_path: Path, new: bool) -> None:
    torch.save({"a": torch.arange(4), "b": [1, 2, "x"]}, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    data = bytearray((tmp_path / "x.pt").read_bytes())
    files = LocalFiles(str(tmp_path))
    for position in range(0, len(data), 3):
        for mask in (0x01, 0x80, 0xFF):
            data[position] ^= mask
            (tmp_path / "bad.pt").write_bytes(data)
            data[position] ^= mask
            try:
                for _, tensor in walk_tensors(load_torch(files, "bad.pt")):
                    tensor.read(files)
            except CheckpointError:
                pass
            files.close()


def test_compressed_big_endian_and_foreign_zips_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4)}, tmp_path / "x.pt")
    files = LocalFiles(str(tmp_path))
    with zipfile.ZipFile(tmp_path / "x.pt") as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in records.items():
            new.writestr(name, data)
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as new:
        for name, data in records.items():
            new.writestr(name, b"big" if name.endswith("byteorder") else data)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as new:
        new.writestr("readme", "x")
    for name, text in {"deflated": "compressed", "big": "big-endian", "other": "no data.pkl"}.items():
        with pytest.raises(UnreadableFormat, match=text):
            load_torch(files, f"{name}.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UnreadableFormat, match=r"not a file of torch\.save"):
        load_torch(files, "text.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UnreadableFormat, match=r"not one of torch\.save"):
        load_torch(files, "pickle.pt")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as made:
        made.writestr("x/data.pkl", pickle.dumps(1))
        made.writestr("x/constants.pkl", pickle.dumps(1))
    with pytest.raises(UnreadableFormat, match="TorchScript"):
        load_torch(LocalFiles(str(tmp_path)), "x.pt")


def test_a_tensor_beyond_its_storage_is_damage(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(tmp_path / "short.pt", "w") as new:
        for name, data in records.items():
            new.writestr(name, data[:-1] if name.endswith("data/0") else data)
    with pytest.raises((Damaged, Truncated), match="storage '0'"):
        load_torch(LocalFiles(str(tmp_path)), "short.pt")


class SparseSink:
    """A file of which only what is written takes room."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb")  # noqa: SIM115  closed by the test
        self.position = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        os.pwrite(self.file.fileno(), data, self.position)
        self.position += len(data)


def test_files_beyond_four_gigabytes(tmp_path: Path) -> None:
    count = (5 << 30) // 4
    sink = SparseSink(tmp_path / "x.pt")
    zipped = ZipWriter(sink)
    tensors = [Tensor(storage_of(str(i), "float32", 4 * n, 4), "float32", (n,), (1,)) for i, n in enumerate([count, 3])]
    zipped.add("data.pkl", dumps(dict(zip("ab", tensors, strict=True))))
    zipped.begin("data/0")
    sink.position += 4 * count  # a hole
    last = torch.arange(3.0)
    zipped.add("data/1", raw(last))
    zipped.add("version", b"3\n")
    zipped.finish()
    sink.file.close()
    names = ["data.pkl", "data/0", "data/1", "version"]
    sizes = [len(dumps(dict(zip("ab", tensors, strict=True)))), 4 * count, 12, 2]
    assert zip_bytes(names, sizes) == sink.position == (tmp_path / "x.pt").stat().st_size
    with zipfile.ZipFile(tmp_path / "x.pt") as standard:
        assert [info.file_size for info in standard.infolist()] == sizes
    files = LocalFiles(str(tmp_path))
    stored: Any = load_torch(files, "x.pt")
    assert stored["a"].shape == (count,)
    assert stored["b"].read(files) == raw(last)
    loaded = torch.load(tmp_path / "x.pt", mmap=True, weights_only=True)
    assert torch.equal(loaded["b"], last)
    assert loaded["a"].shape == (count,)
    assert loaded["a"].untyped_storage().nbytes() == 4 * count


@pytest.mark.parametrize("nbytes", [0, 12, 33_639_248, (1 << 32) - 1, 5 << 30])
def test_a_form_is_what_the_writer_makes(tmp_path: Path, nbytes: int) -> None:
    small = {"data.pkl": b"pickle", "version": b"3\n"}
    sink = SparseSink(tmp_path / "x")
    zipped = ZipWriter(sink)
    for name, data in small.items():
        zipped.add(name, data)
    zipped.begin("data/0")
    zipped.write(memoryview(b"begin"[:nbytes]))
    held = min(5, nbytes)
    sink.position += nbytes - held  # a hole
    zipped.finish()
    sink.file.close()
    form = ZipForm(small, "data/0", nbytes)
    made = form.head + b"begin"[:nbytes]
    tail = form.tail(zlib.crc32(b"begin"[:nbytes]))
    assert form.nbytes == sink.position == len(form.head) + nbytes + len(tail)
    with open(tmp_path / "x", "rb") as file:
        assert file.read(len(made)) == made
        file.seek(len(form.head) + nbytes)
        assert file.read() == tail


def test_errors_name_the_place() -> None:
    with pytest.raises(UnsupportedValue, match=r"^x\.a\[2\]\.1: a object has no form"):
        dumps({"b": (1,), "a": [0, [], {(2,): 3, 1: object()}]}, "x")


def test_equal_sizes_are_written_once() -> None:
    one, two = dumps([size((3, 4))]), dumps([size((3, 4))] * 9)
    assert len(two) < len(one) + 9 * 3
    assert pickle.loads(two) == [torch.Size((3, 4))] * 9


def test_zip64_of_another_writer(tmp_path: Path) -> None:
    """The standard library writes zip64 in its own way."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as made:
        made.writestr("x/data.pkl", pickle.dumps({"a": 1}, 2))
        with made.open("x/data/0", "w", force_zip64=True) as record:
            record.write(b"12345678")
    zipped = TorchZip(LocalFiles(str(tmp_path)), "x.pt")
    assert zipped.record("data/0") == b"12345678"
