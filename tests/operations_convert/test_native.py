"""Our own checkpoints to zarr and back: digests, live values, and no torch on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import ckptengine as ce
from ckptengine.operations.diff import diff
from ckptengine.operations.opening import open_any
from ckptengine.operations.read import read_tensor


def save(root: Path) -> dict[str, object]:
    tensors = {
        "half": torch.arange(4096 * 33, dtype=torch.int32).to(torch.bfloat16).reshape(4096, 33),
        "count": torch.tensor(7, dtype=torch.int64),
        "wide": torch.arange(60, dtype=torch.float64).reshape(3, 4, 5)[:, 1:, ::2],
    }
    state: dict[str, object] = {"t": tensors, "note": {"pair": (1, 2.5), "raw": b"\x00\xff", "none": None}}
    ce.save(state, root, 5)
    return state


def test_there_and_back(tmp_path: Path) -> None:
    save(tmp_path / "root")
    there = ce.convert(tmp_path / "root", tmp_path / "zarr", to="zarr", verify=True)
    assert there.compared == there.verified == 3
    back = ce.convert(tmp_path / "zarr", tmp_path / "back", to="native", verify=True)
    assert back.compared == back.verified == 3
    first, middle, last = (open_any(tmp_path / name) for name in ("root", "zarr", "back"))
    assert first.values() == middle.values() == last.values()
    assert diff(first, middle).by_digest == diff(first, last).by_digest == 3
    wide = read_tensor(middle, middle.tensor("t.wide")).view("f8")
    np.testing.assert_array_equal(wide, np.arange(60.0).reshape(3, 4, 5)[:, 1:, ::2])


def test_a_round_trip_restores_the_live_state(tmp_path: Path) -> None:
    state = save(tmp_path / "root")
    ce.convert(tmp_path / "root", tmp_path / "zarr", to="zarr")
    ce.convert(tmp_path / "zarr", tmp_path / "back", to="native")
    fresh = {
        "t": {name: torch.zeros_like(tensor) for name, tensor in state["t"].items()},  # type: ignore[attr-defined]
        "note": {"pair": (0, 0.0), "raw": b"", "none": 1},
    }
    assert ce.load(fresh, tmp_path / "back") == 5
    assert fresh["note"] == state["note"]
    for name, tensor in state["t"].items():  # type: ignore[attr-defined]
        assert torch.equal(fresh["t"][name], tensor)


def test_damage_is_found_on_the_way(tmp_path: Path) -> None:
    save(tmp_path / "root")
    (file,) = (tmp_path / "root").rglob("rank-*.bin")
    data = bytearray(file.read_bytes())
    at = data.find(torch.arange(60, 70, dtype=torch.int32).to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    assert at > 0
    data[at] ^= 1
    file.chmod(0o644)
    file.write_bytes(bytes(data))
    done = subprocess.run(
        [sys.executable, "-m", "ckptengine", "convert", str(tmp_path / "root"), str(tmp_path / "out"), "--to", "zarr"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "t.half" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]


def test_conversion_starts_without_torch(tmp_path: Path) -> None:
    save(tmp_path / "root")
    script = (
        "import sys; from ckptengine.cli import main; "
        "code = main(['convert', sys.argv[1], sys.argv[2], '--to', 'zarr']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "root"), str(tmp_path / "out")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
