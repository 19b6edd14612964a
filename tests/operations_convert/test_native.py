"""Our own checkpoints to zarr and back: digests, live values, and no torch on the way."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict

import ckptengine as ce
from ckptengine.errors import UnreadableFormat
from ckptengine.operations.diff import diff
from ckptengine.operations.opening import open_any
from ckptengine.operations.read import read_tensor
from ckptengine.state.readable import readable


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


OF_LIBRARIES = [np.arange(3), np.float32(1.5), torch.Size([1, 2]), datetime.date(2026, 11, 29)]


@pytest.mark.parametrize("value", OF_LIBRARIES, ids=lambda value: type(value).__name__)
def test_values_are_read_where_nothing_has_loaded_their_types(tmp_path: Path, value: object) -> None:
    ce.save({"t": torch.zeros(2), "v": value}, tmp_path / "root", 1)
    script = (
        "import sys; from ckptengine.operations.opening import open_any; "
        "(found,) = open_any(sys.argv[1]).values().values(); print(type(found), found)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "root")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"{type(value)} {value}\n", done.stderr


def test_a_tag_of_a_newer_version_is_refused_and_not_left_out() -> None:
    with pytest.raises(UnreadableFormat, match="newer version"):
        readable({"v": {"$": "later", "v": 1}}, lambda *_: None)


def state_dicts() -> dict[str, object]:
    """A state as users of torch DCP hold it: dicts whose keys have dots, and a dict with a list."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optim": states, "a.b": torch.arange(3.0), "l": [torch.arange(2.0)], "epoch": 4}


def zeros(value: object) -> object:
    if isinstance(value, dict):
        return {key: zeros(part) for key, part in value.items()}
    if isinstance(value, list):
        return [zeros(part) for part in value]
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else 0 if type(value) is int else value


def leaves(value: object, path: tuple[object, ...] = ()) -> dict[tuple[object, ...], object]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in leaves(part, (*path, key)).items()}
    return {path: value}


def same(a: object, b: object) -> bool:
    first, second = leaves(a), leaves(b)
    return first.keys() == second.keys() and all(
        torch.equal(x, second[key]) if isinstance(x, torch.Tensor) else x == second[key]  # type: ignore[arg-type]
        for key, x in first.items()
    )


@pytest.mark.filterwarnings("ignore:torch.distributed")
def test_dots_in_keys_are_no_nesting_elsewhere(tmp_path: Path) -> None:
    state = state_dicts()
    ce.save(state, tmp_path / "root", 5)
    assert "model.0\\.weight" in ce.open(tmp_path / "root").names()
    for to in ("dcp", "torch", "safetensors"):
        plan = ce.convert(tmp_path / "root", tmp_path / to, to=to, verify=True)
        assert (plan.verified, plan.unverified) == (plan.tensors, 0)
        assert diff(open_any(tmp_path / "root"), open_any(tmp_path / to), values=False).same
    found = zeros(state)
    dcp.load(found, checkpoint_id=tmp_path / "dcp", no_dist=True)  # type: ignore[arg-type]
    assert same(found, state)
    assert load_file(tmp_path / "safetensors" / "model.safetensors").keys() == state["model"].keys()  # type: ignore[attr-defined]
    loaded = torch.load(tmp_path / "torch" / "checkpoint.pt", weights_only=True)
    assert torch.equal(loaded["a.b"], torch.arange(3.0))
    assert loaded["model"].keys() == state["model"].keys()  # type: ignore[attr-defined]
    assert loaded["optim"]["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.filterwarnings("ignore:torch.distributed")
@pytest.mark.parametrize("kind", ["dcp", "torch", "native", "zarr", "safetensors"])
def test_state_dicts_are_filled_from_other_formats(tmp_path: Path, kind: str) -> None:
    state = state_dicts()
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    if kind != "dcp":
        ce.convert(tmp_path / "dcp", tmp_path / kind, to=kind)
    found = zeros(state)
    ce.load(found, tmp_path / kind)
    assert same(found, state)


def test_a_name_that_another_leaf_has_is_not_taken(tmp_path: Path) -> None:
    torch.save({"x": {"a.b": torch.ones(2)}}, tmp_path / "x.pt")
    live = {"x": {"a.b": torch.zeros(2), "a": {"b": torch.zeros(2)}}}
    with pytest.raises(ce.CheckpointError, match="in the live state, not in the checkpoint"):
        ce.load(live, tmp_path / "x.pt")
