"""Safetensors: the real library's files, sharded and not, and every kind of bad header."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptengine.errors import CheckpointError, Damaged, NotFound, Truncated, UnreadableFormat
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.detect import open_source

from .reading import read_bytes
from .trees import counting, holds, raw

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    made = {str(dtype): counting(3, 5, dtype=dtype) for dtype in DTYPES}
    return made | {"scalar": torch.tensor(7.5), "empty": torch.zeros(0, 4), "a.b.weight": counting(7, 2)}


def under_model(made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model.{name}": tensor for name, tensor in made.items()}


def craft(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_one_file_of_every_dtype(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        source = open_source(path)
        assert source.format == "safetensors"
        holds(source, under_model(tensors()))


def shard(folder: Path, count: int = 3) -> dict[str, torch.Tensor]:
    made = {f"layer.{i}": counting(4, 3, start=100 * i) for i in range(7)}
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = {name: names[i % count] for i, name in enumerate(made)}
    for file in names:
        save_file({name: made[name] for name in made if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text('{"hidden_size": 3}')
    return made


def test_shards_with_an_index(tmp_path: Path) -> None:
    made = shard(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        source = open_source(path)
        holds(source, under_model(made))
        assert source.values() == {"config": {"hidden_size": 3}}


def test_shards_without_an_index_must_be_complete(tmp_path: Path) -> None:
    made = shard(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    holds(open_source(tmp_path), under_model(made))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(Damaged, match="lacks shard number 2"):
        open_source(tmp_path)
    (tmp_path / "model-00003-of-00003.safetensors").rename(tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(Damaged, match="lacks shard number 3"):
        open_source(tmp_path)
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(Damaged, match="lacks shard number 1"):
        open_source(tmp_path)


def test_an_index_that_does_not_fit(tmp_path: Path) -> None:
    shard(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for change, error, text in [
        ({"x": "model-00001-of-00003.safetensors"}, Damaged, "does not hold it"),
        ({"x": "absent.safetensors"}, NotFound, r"absent\.safetensors.*fetch"),
        ({"x": "../../etc/passwd"}, CheckpointError, "passwd"),
        ({"x": 5}, Damaged, "weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": good["weight_map"] | change}))
        with pytest.raises(error, match=text):
            open_source(tmp_path)
    for bad in ("[]", "{", '{"weight_map": []}'):
        index.write_text(bad)
        with pytest.raises(Damaged, match=r"index\.json"):
            open_source(tmp_path)


def test_several_files_need_a_name(tmp_path: Path) -> None:
    save_file({"a": counting(2)}, tmp_path / "one.safetensors")
    save_file({"b": counting(2)}, tmp_path / "two.safetensors")
    with pytest.raises(UnreadableFormat, match="by name"):
        open_source(tmp_path)
    holds(open_source(tmp_path / "two.safetensors"), {"model.b": counting(2)})


def sharded_by_dcp(folder: Path, ranks: int = 3) -> dict[str, torch.Tensor]:
    """As torch's writer of sharded Hugging Face checkpoints lays it out."""
    made = {"w": counting(7, 4), "v": counting(5)}
    for rank in range(ranks):
        parts, info = {}, {}
        for name, tensor in made.items():
            step = -(-len(tensor) // ranks)
            part = tensor[rank * step : (rank + 1) * step]
            parts[name] = part.contiguous()
            info[name] = {"saved_offsets": [min(rank * step, len(tensor)), *([0] * (tensor.ndim - 1))]}
        metadata = {"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"}
        save_file(parts, folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", metadata=metadata)
    return made


def test_dcp_shards_are_put_together(tmp_path: Path) -> None:
    made = sharded_by_dcp(tmp_path)
    holds(open_source(tmp_path), under_model(made))
    (tmp_path / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(Damaged, match="lacks shard number 2"):
        open_source(tmp_path)


BAD: list[tuple[object, bytes, int | None, type[CheckpointError]]] = [
    ({"a": entry(0, 4)}, b"123", None, Truncated),
    ({"a": entry(0, 4)}, b"12345", None, Damaged),
    ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", None, Damaged),
    ({"a": entry(0, 4), "b": entry(5, 6)}, b"123456", None, Damaged),
    ({"a": entry(0, 4, [5])}, b"1234", None, Damaged),
    ({"a": entry(0, 4, [1 << 62, 1 << 62])}, b"1234", None, Damaged),
    ({"a": entry(0, 4, [-4])}, b"1234", None, UnreadableFormat),
    ({"a": entry(0, 4, [True, 4])}, b"1234", None, UnreadableFormat),
    ({"a": entry(0, 4, dtype="Q4")}, b"1234", None, UnreadableFormat),
    ({"a": {"dtype": "U8"}}, b"", None, UnreadableFormat),
    ({"a": 5}, b"", None, UnreadableFormat),
    (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"",
     None, UnreadableFormat),
    ([], b"", None, UnreadableFormat),
    (b"{", b"", None, UnreadableFormat),
    (b"\xff", b"", None, UnreadableFormat),
    (b"[" * 100_000, b"", None, UnreadableFormat),
    ({"__metadata__": {"a": 1}}, b"", None, UnreadableFormat),
    ({}, b"", 1 << 62, UnreadableFormat),
    ({}, b"", 1000, Truncated),
]  # fmt: skip


@pytest.mark.parametrize(("header", "data", "length", "error"), BAD)
def test_bad_headers(
    tmp_path: Path, header: object, data: bytes, length: int | None, error: type[CheckpointError]
) -> None:
    craft(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(error, match=r"bad\.safetensors"):
        open_source(tmp_path / "bad.safetensors")


def test_a_short_file(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"1234")
    with pytest.raises(Truncated, match="4 bytes"):
        open_source(tmp_path)


def test_four_bit_pairs(tmp_path: Path) -> None:
    craft(tmp_path / "x.safetensors", {"w": {"dtype": "F4", "shape": [2, 6], "data_offsets": [0, 6]}}, b"abcdef")
    source = open_source(tmp_path)
    tensor = source.tensor("model.w")
    assert (tensor.dtype, tensor.shape) == ("float4_e2m1fn_x2", (2, 3))
    assert read_bytes(source.files, tensor) == b"abcdef"


def test_no_such_tensor(tmp_path: Path) -> None:
    save_file({"a": counting(2)}, tmp_path / "x.safetensors")
    with pytest.raises(NotFound, match="'b'"):
        open_source(tmp_path).tensor("b")


def test_many_tensors_open_fast(tmp_path: Path) -> None:
    count = 100_000
    header = {f"layers.{i}.weight": entry(4 * i, 4 * i + 4, [1], "F32") for i in range(count)}
    craft(tmp_path / "x.safetensors", header, raw(counting(count)))
    start_s = time.process_time()
    source = open_source(tmp_path)
    assert len(source.names()) == count
    assert time.process_time() - start_s < 5  # about 0.5 s; processor time, since the machine is shared
    tensor = source.tensor("model.layers.77777.weight")
    assert isinstance(tensor, LogicalTensor)
    assert read_bytes(source.files, tensor) == raw(torch.tensor([77777.0]))
