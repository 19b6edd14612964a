"""Files of torch.save that claim what cannot be: without end, out of proportion, records that are not their own."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from ckptengine.cli import main
from ckptengine.errors import Damaged, LayoutError, NotFound, UnreadableFormat
from ckptengine.operations.convert import convert
from ckptengine.sources.detect import open_source
from ckptengine.sources.files import LocalFiles
from ckptengine.sources.torchzip import load_torch

from .trees import counting, holds


def saved(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/data.pkl", pickled)
        made.writestr("x/data/0", bytes(16))
    return path


def tensor_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """A pickle of {"w": a float32 tensor over a storage of four elements}."""

    def number(value: int) -> bytes:
        return b"I%d\n" % value

    storage = b"(V" + b"storage\nctorch\nFloatStorage\nV0\nVcpu\n" + number(4) + b"tQ"
    numbers = [b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides)]
    return b"}Vw\nctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(0) + b"".join(numbers) + b"I00\n}tRs."


@pytest.mark.parametrize("command", ["show", "verify", "diff", "convert"])
def test_a_tensor_expanded_beyond_all_proportion_is_refused(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "x.pt")
    torch.save({"a": torch.arange(4.0).expand(1 << 40, 4), "b": torch.ones(3)}, path)
    rest = {"diff": [path], "convert": [str(tmp_path / "out"), "--to", "torch"]}.get(command, [])
    assert main([command, path, *rest]) == (1 if command == "verify" else 2)
    told = "".join(capsys.readouterr())
    assert "'model.a'" in told
    assert "float32 [1099511627776, 4] repeats 16 stored bytes to 17592186044416; save what it was expanded" in told
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]


def test_expanded_tensors_of_a_usual_size_are_converted(tmp_path: Path) -> None:
    state = {"mask": torch.tensor([True, False]).expand(64, 1, 2), "bias": torch.zeros(1).expand(1 << 20)}
    torch.save(state, tmp_path / "x.pt")
    plan = convert(tmp_path / "x.pt", tmp_path / "out", to="safetensors", verify=True)
    assert plan.verified == 2
    holds(open_source(tmp_path / "out"), {f"model.{name}": tensor.contiguous() for name, tensor in state.items()})


def test_containers_that_hold_each_other_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptengine.sources.plain.MAX_VISITS_AGAIN", 1000)
    value: list[object] = []
    for _ in range(40):
        value = [value, value]
    with pytest.raises(UnreadableFormat, match="the same containers more than 1000 times"):
        open_source(saved(tmp_path / "x.pt", pickle.dumps(value, 2)))


def test_shapes_that_no_array_can_have(tmp_path: Path) -> None:
    many = open_source(saved(tmp_path / "many.pt", tensor_of((1,) * 65, (1,) * 65)))
    with pytest.raises(LayoutError, match=r"'model\.w' has 65 dimensions; 64 are the most"):
        many.tensor("model.w")
    empty = saved(tmp_path / "empty.pt", tensor_of((1 << 63, 1 << 63, 0), (0, 0, 1)))
    with pytest.raises(LayoutError, match="more than 2"):
        convert(empty, tmp_path / "out", to="native")


def test_whole_numbers_longer_than_python_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(saved(tmp_path / "x.pt", pickle.dumps({"n": 1 << 20_000}, 2)))
    assert main(["show", path]) == 0
    assert main(["show", path, "--json"]) == 0
    assert '"0x1000' in capsys.readouterr().out


def test_records_are_where_the_directory_says(tmp_path: Path) -> None:
    """A record's place comes from two headers, of which one may point to what belongs to another record."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6), "b": torch.arange(6)}, buffer)
    data = buffer.getvalue()
    entries = {info.filename.partition("/")[2]: info for info in zipfile.ZipFile(buffer).infolist()}
    central = {name: data.rindex(entry.filename.encode()) - 46 for name, entry in entries.items()}

    def refused(said: str, *changes: tuple[int, str, int]) -> None:
        changed = bytearray(data)
        for at, kind, value in changes:
            struct.pack_into(kind, changed, at, value)
        (tmp_path / "x.pt").write_bytes(bytes(changed))
        with pytest.raises((Damaged, UnreadableFormat), match=said):
            for tensor in load_torch(LocalFiles(str(tmp_path)), "x.pt").values():  # type: ignore[attr-defined]
                tensor.fragment()

    other = entries["data/0"].header_offset
    refused("'data/1'.* has no local header of its own", (central["data/1"] + 42, "<I", other))
    local = entries["data/1"].header_offset
    refused("'data/1'.* has no local header of its own", (local + 30, "<B", 0))
    size = len(data) - 300
    refused("'data.pkl'.* reaches into", *((central["data.pkl"] + at, "<I", size) for at in (20, 24)))
    refused("compressed or encrypted", (central["data/1"] + 8, "<H", 1))


def test_one_shard_of_several_is_not_the_whole(tmp_path: Path) -> None:
    torch.save({"a": counting(3)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(NotFound, match=r"00001-of-00002\.bin, but no .*index\.json and no other part"):
        open_source(tmp_path)
    holds(open_source(tmp_path / "pytorch_model-00001-of-00002.bin"), {"model.a": counting(3)})
    (tmp_path / "pytorch_model-00001-of-00002.bin").rename(tmp_path / "pytorch_model-00001-of-00001.bin")
    holds(open_source(tmp_path), {"model.a": counting(3)})
