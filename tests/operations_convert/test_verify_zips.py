"""verify of files of torch.save: every record has a CRC-32, which loading does not look at."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from ckptengine.cli import main
from ckptengine.errors import CheckpointError, Damaged, DigestMismatch
from ckptengine.layout.box import Box
from ckptengine.operations.opening import open_any
from ckptengine.operations.read import BoxReader
from ckptengine.operations.verify import verify

STATE = {"w": torch.arange(40.0), "b": torch.arange(3), "lr": 0.125, "names": ["a", "b"]}


def content(path: Path) -> tuple[dict[str, bytes], object]:
    source = open_any(path)
    read = {}
    for name in source.names():
        tensor = source.tensor(name)
        out = np.zeros(tensor.shape, {"float32": "f4", "int64": "i8"}[tensor.dtype])
        BoxReader(source, tensor).read(Box.whole(tensor.shape), out)
        read[name] = out.tobytes()
    return read, source.values()


def flipped(path: Path, into: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    into.write_bytes(data)


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "good.pt")
    good, wrong = content(tmp_path / "good.pt"), tmp_path / "wrong.pt"
    found = 0
    size = (tmp_path / "good.pt").stat().st_size
    for at in range(size):
        flipped(tmp_path / "good.pt", wrong, at, 1 << at % 8)
        try:
            if verify(open_any(wrong)).problems:
                raise Damaged("told")
        except CheckpointError:
            found += 1
            continue
        assert content(wrong) == good, f"byte {at}"
    assert found > 40 * 4 + 3 * 8


@pytest.fixture
def kinds(tmp_path: Path) -> dict[str, Path]:
    """Where tensors lie in zips: a file, items inside of a file, and both in one folder."""
    torch.save(STATE, tmp_path / "one.pt")
    save(dict(STATE), checkpoint_id=tmp_path / "dcp", no_dist=True)
    folder = tmp_path / "joined"
    save({"model": {"w": STATE["w"]}}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.arange(40.0))])
    optimizer.param_groups[0]["params"][0].grad = torch.arange(40.0)
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    return {"file": tmp_path / "one.pt", "items": tmp_path / "dcp", "folder": folder}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["file", "items", "folder"])
def test_damage_is_told_and_the_rest_is_proven(
    kinds: dict[str, Path], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = kinds[kind]
    assert verify(open_any(path)) == ([], 0)
    assert main(["verify", str(path)]) == 0
    assert "records no digests" not in capsys.readouterr().out
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix in (".distcp", ".bin")]
    marks = [torch.arange(40.0).numpy().tobytes()] * len(files)
    if kind == "folder":
        marks = [mark if file.suffix == ".distcp" else b"exp_avg" for mark, file in zip(marks, files, strict=True)]
    for file, mark in zip(files, marks, strict=True):
        kept = file.with_suffix(".kept")
        shutil.copy(file, kept)
        flipped(kept, file, kept.read_bytes().index(mark) + len(mark) // 2, 1)
        assert main(["verify", str(path)]) != 0
        said = capsys.readouterr()
        assert f"{file.name}" in said.out + said.err
        assert "CRC-32" in said.out + said.err
        shutil.move(kept, file)
    assert verify(open_any(path)) == ([], 0)


def test_where_torch_left_the_checksums_out_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "one.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert verify(open_any(tmp_path / "one.pt")) == ([], 2)
    assert main(["verify", str(tmp_path / "one.pt")]) == 0
    assert "it records no digests: all that can be told" in capsys.readouterr().out


def test_a_damaged_pickle_is_not_read(tmp_path: Path) -> None:
    """Values come with the opening: what is wrong in them is found there."""
    torch.save(STATE, tmp_path / "one.pt")
    value: Any = np.float64(0.125).byteswap().tobytes()  # as pickle writes it
    flipped(tmp_path / "one.pt", tmp_path / "two.pt", (tmp_path / "one.pt").read_bytes().index(value) + 1, 4)
    assert torch.load(tmp_path / "two.pt", weights_only=True)["lr"] != 0.125, "torch does not notice"
    with pytest.raises(DigestMismatch, match=r"data\.pkl.*two\.pt"):
        open_any(tmp_path / "two.pt")


@pytest.mark.filterwarnings("ignore")
def test_values_that_are_not_there_are_told(tmp_path: Path) -> None:
    save({"note": {"lr": 0.5}}, checkpoint_id=tmp_path, no_dist=True)
    assert verify(open_any(tmp_path)).problems == []
    (tmp_path / "__0_0.distcp").unlink()
    (problem,) = verify(open_any(tmp_path)).problems
    assert "__0_0.distcp" in str(problem)
