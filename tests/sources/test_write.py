"""Writers: what the real libraries load, and what we read again, is what was converted."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import ckptengine as ce
from ckptengine.errors import AlreadyExists, CheckpointError, UnsupportedValue, UnusableRequest
from ckptengine.layout.box import Box
from ckptengine.operations.convert import convert
from ckptengine.sources.detect import open_source
from ckptengine.sources.emit import dumps
from ckptengine.sources.jsonvalues import from_json, to_json
from ckptengine.sources.stream import cut_rows

from .trees import counting, holds, raw

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip
VALUES = {"epoch": 3, "names": ["a", {"b": 2.5}], "betas": (0.9, 0.999), "raw": b"xy", "none": None}


def tensors() -> dict[str, torch.Tensor]:
    """Weights, moments, counters, odd shapes, several dtypes."""
    made = {
        "model.emb.weight": counting(13, 6, dtype=torch.bfloat16),
        "model.layers.0.weight": counting(10, 6, dtype=torch.bfloat16),
        "model.layers.0.bias": counting(10, dtype=torch.bfloat16),
        "model.flags": counting(7, dtype=torch.bool),
        "model.count": torch.tensor(5),
        "model.empty": torch.zeros(0, 3),
    }
    for name in ("emb.weight", "layers.0.weight", "layers.0.bias"):
        shape = made[f"model.{name}"].shape
        made |= {f"optim.{name}.{kind}": counting(*shape, start=i) for i, kind in enumerate(("exp_avg", "exp_avg_sq"))}
        made[f"optim.{name}.step"] = torch.tensor(2.0)
    return made


def groups() -> list[dict[str, Any]]:
    return [
        {"params": ["emb.weight", "layers.0.weight"], "lr": 0.1, "betas": (0.9, 0.999)},
        {"params": ["layers.0.bias"], "lr": 0.2, "betas": (0.9, 0.999)},
    ]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A state with an optimizer and a tie, in a format that holds all of it."""
    made = tensors()
    state: dict[str, Any] = {"model": {}, "optim": {"state": {}, "param_groups": groups()}, "extra": VALUES}
    for name, tensor in made.items():
        if name.startswith("model."):
            state["model"][name.removeprefix("model.")] = tensor
        else:
            parameter, _, kind = name.removeprefix("optim.").rpartition(".")
            state["optim"]["state"].setdefault(parameter, {})[kind] = tensor
    state["model"]["head.weight"] = state["model"]["emb.weight"]
    torch.save(state, tmp_path / "source.pt")
    return tmp_path / "source.pt"


def everything() -> dict[str, torch.Tensor]:
    return tensors() | {"model.head.weight": tensors()["model.emb.weight"]}


def _zero(value: object) -> object:
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else None


def check_values(path: Path) -> None:
    values: Any = open_source(path).values()
    assert values["extra"] == VALUES
    assert [group["lr"] for group in values["optim"]["param_groups"]] == [0.1, 0.2]


class TestSafetensors:
    def test_everything_comes_back(self, source: Path, tmp_path: Path) -> None:
        target = tmp_path / "out"
        plan = convert(source, target, to="safetensors", verify=True)
        assert plan.state == "committed"
        made = open_source(target)
        assert made.aliases() == {"model.head.weight": "model.emb.weight"}
        holds(made, everything())
        check_values(target)

    @pytest.mark.parametrize("shard_bytes", [1, 100, 10_000])
    def test_the_real_library_loads_the_weights(self, source: Path, tmp_path: Path, shard_bytes: int) -> None:
        target = tmp_path / "out"
        convert(source, target, to="safetensors", options={"shard_bytes": shard_bytes, "weights_only": True})
        index = target / "model.safetensors.index.json"
        assert index.exists() == (shard_bytes < 10_000)
        files = {"model.safetensors"}
        if index.exists():
            document = json.loads(index.read_text())
            files = set(document["weight_map"].values())
            assert document["metadata"]["total_size"] == sum(t.nbytes for n, t in tensors().items() if n[0] == "m")
        assert {path.name for path in target.glob("*.safetensors")} == files
        loaded = {name: tensor for file in files for name, tensor in load_file(target / file).items()}
        expected = {n.removeprefix("model."): t for n, t in tensors().items() if n.startswith("model.")}
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
        if not index.exists():
            holds(open_source(target), {n: t for n, t in everything().items() if n.startswith("model.")})

    def test_dtypes_that_it_lacks(self, tmp_path: Path) -> None:
        torch.save({"z": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "x.pt")
        with pytest.raises(UnusableRequest, match=r"complex128.*model\.z"):
            convert(tmp_path / "x.pt", tmp_path / "out", to="safetensors")
        torch.save({"z": torch.zeros(2)}, tmp_path / "y.pt")
        with pytest.raises(UnusableRequest, match="shard_bytes"):
            convert(tmp_path / "y.pt", tmp_path / "out", to="safetensors", options={"shard_bytes": "5GB"})
        assert not (tmp_path / "out").exists()

    def test_a_checkpoint_without_tensors(self, tmp_path: Path) -> None:
        torch.save({"epoch": 3}, tmp_path / "x.pt")
        convert(tmp_path / "x.pt", tmp_path / "out", to="safetensors", verify=True)
        assert open_source(tmp_path / "out").values() == {"epoch": 3}

    def test_a_target_that_exists(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x").write_text("mine")
        with pytest.raises(AlreadyExists):
            convert(source, tmp_path / "out", to="safetensors")

    def test_damage_to_our_own_record(self, source: Path, tmp_path: Path) -> None:
        convert(source, tmp_path / "out", to="safetensors")
        record = tmp_path / "out" / "ckptengine.json"
        good = json.loads(record.read_text())
        for bad in (
            [],
            {},
            good | {"state": 5},
            good | {"version": 9},
            good | {"state": ["../x"]},
            good | {"step": "1"},
        ):
            record.write_text(json.dumps(bad))
            with pytest.raises(CheckpointError):
                open_source(tmp_path / "out")


class TestTorch:
    @pytest.mark.parametrize("name", ["out.pt", "out"])
    def test_everything_comes_back(self, source: Path, tmp_path: Path, name: str) -> None:
        convert(source, tmp_path / name, to="torch", verify=True)
        assert (tmp_path / name).is_file() == name.endswith(".pt")
        made = open_source(tmp_path / name)
        assert made.aliases() == {"model.head.weight": "model.emb.weight"}
        holds(made, everything())
        check_values(tmp_path / name)

    def test_torch_loads_it(self, source: Path, tmp_path: Path) -> None:
        convert(source, tmp_path / "out.pt", to="torch")
        for mmap in (False, True):
            loaded = torch.load(tmp_path / "out.pt", weights_only=True, mmap=mmap)
            weights = {n.removeprefix("model."): t for n, t in everything().items() if n.startswith("model.")}
            assert loaded["model"].keys() == weights.keys()
            assert all(torch.equal(loaded["model"][name], tensor) for name, tensor in weights.items())
            assert loaded["model"]["head.weight"].data_ptr() == loaded["model"]["emb.weight"].data_ptr()
            assert loaded["extra"] == VALUES
            assert loaded["optim"]["param_groups"][0]["params"] == [0, 1]
            assert torch.equal(loaded["optim"]["state"][1]["exp_avg"], tensors()["optim.layers.0.weight.exp_avg"])

    def test_an_optimizer_loads_it(self, tmp_path: Path) -> None:
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.3)
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        torch.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, tmp_path / "x.pt")
        convert(tmp_path / "x.pt", tmp_path / "y.pt", to="torch")
        loaded = torch.load(tmp_path / "y.pt", weights_only=True)
        other = torch.nn.Linear(3, 2)
        other.load_state_dict(loaded["model"])
        again = torch.optim.AdamW(other.named_parameters())
        again.load_state_dict(loaded["optim"])
        for one, two in zip(optimizer.state.values(), again.state.values(), strict=True):
            assert all(torch.equal(one[kind], two[kind]) for kind in one)
        assert again.param_groups[0]["lr"] == 0.3

    def test_every_dtype(self, tmp_path: Path) -> None:
        made = {str(dtype): counting(3, dtype=dtype) for dtype in DTYPES}
        torch.save({"model": made}, tmp_path / "x.pt")
        convert(tmp_path / "x.pt", tmp_path / "y.pt", to="torch", options={"weights_only": True})
        loaded = torch.load(tmp_path / "y.pt", weights_only=True)
        assert {name: (t.dtype, raw(t)) for name, t in loaded.items()} == {
            n: (t.dtype, raw(t)) for n, t in made.items()
        }
        holds(open_source(tmp_path / "y.pt"), {f"model.{name}": tensor for name, tensor in made.items()})

    @pytest.mark.parametrize("protocol_value", [0, 255, 256, -1, 1 << 40, -(1 << 80), 1 << 3000, 0.1, "é", "\ud800"])
    def test_emitted_values_are_read_by_pickle(self, protocol_value: object) -> None:
        value = {"v": [protocol_value, (protocol_value,), {"k": protocol_value}], "e": [[], (), {}], 5: {1, 2}}
        assert pickle.loads(dumps(value)) == value

    def test_nesting_is_kept_and_nothing_is_written_over(self, tmp_path: Path) -> None:
        state: dict[str, Any] = {"a": {"b": {"c": counting(2)}, "l": [counting(3), {"t": counting(4)}, 5]}}
        state |= {"": counting(6), "x": counting(7), "x.y": counting(8), "plain.dotted": counting(9)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state, checkpoint_id=tmp_path / "in", no_dist=True)
        convert(tmp_path / "in", tmp_path / "out.pt", to="torch", verify=True)
        assert sorted(open_source(tmp_path / "in").names()) == sorted(open_source(tmp_path / "out.pt").names())
        loaded = torch.load(tmp_path / "out.pt", weights_only=True)
        assert loaded.keys() == state.keys()
        assert torch.equal(loaded["a"]["b"]["c"], counting(2))
        assert torch.equal(loaded["a"]["l"][1]["t"], counting(4))
        assert (len(loaded["a"]["l"]), loaded["a"]["l"][2]) == (3, 5)

    def test_a_name_that_begins_another_one(self, tmp_path: Path) -> None:
        made = {"a.b": counting(2), "a": counting(3), ".": counting(4), "": counting(5)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(made, checkpoint_id=tmp_path / "in", no_dist=True)
        convert(tmp_path / "in", tmp_path / "ours", to="native")  # which does not keep how they were nested
        convert(tmp_path / "ours", tmp_path / "out.pt", to="torch", verify=True)
        holds(open_source(tmp_path / "out.pt"), made)

    def test_values_that_torch_refuses(self, tmp_path: Path) -> None:
        class Source:
            pass

        with pytest.raises(UnsupportedValue, match=r"value\.a\[1\]: a Source"):
            dumps({"a": [1, Source()]})


class TestDcp:
    @pytest.mark.parametrize(
        ("layout", "options"),
        [(None, {}), (None, {"file_bytes": 64}), (None, {"file_bytes": 1}), ("dp=3", {}), ("dp=4,tp=2", {})],
    )
    def test_everything_comes_back(
        self, source: Path, tmp_path: Path, layout: str | None, options: dict[str, object]
    ) -> None:
        convert(source, tmp_path / "out", to="dcp", layout=layout, options=options, verify=True)
        made = open_source(tmp_path / "out")
        assert made.format == "dcp"
        holds(made, everything())
        check_values(tmp_path / "out")

    @pytest.mark.parametrize("layout", [None, "dp=3"])
    def test_torch_loads_it(self, source: Path, tmp_path: Path, layout: str | None) -> None:
        convert(source, tmp_path / "out", to="dcp", layout=layout)
        live: dict[str, Any] = {"model": {}, "optim": {"state": {}, "param_groups": [{"lr": 0.0}, {"lr": 0.0}]}}
        for name, tensor in everything().items():
            if name.startswith("model."):
                live["model"][name.removeprefix("model.")] = torch.zeros_like(tensor)
            else:
                parameter, _, kind = name.removeprefix("optim.").rpartition(".")
                live["optim"]["state"].setdefault(parameter, {})[kind] = torch.zeros_like(tensor)
        live["extra"] = {"epoch": 0, "names": ["", {"b": 0.0}], "betas": (), "raw": b"", "none": 0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(live, storage_reader=dcp.FileSystemReader(tmp_path / "out"), no_dist=True)
        for name, tensor in everything().items():
            if name.startswith("model."):
                found = live["model"][name.removeprefix("model.")]
            else:
                parameter, _, kind = name.removeprefix("optim.").rpartition(".")
                found = live["optim"]["state"][parameter][kind]
            assert torch.equal(found, tensor), name
        assert live["optim"]["param_groups"] == [{"lr": 0.1}, {"lr": 0.2}]
        assert live["extra"] == VALUES

    @pytest.mark.parametrize("to", ["dcp", "torch"])
    def test_flattened_optimizers_stay_flat(self, tmp_path: Path, to: str) -> None:
        """As torchtitan has them: weights at the top, the optimizer's keys flattened."""
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.3)
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        states = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
        state = {**model.state_dict(), "optimizer": states}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state, checkpoint_id=tmp_path / "in", no_dist=True)
            torch.save(state, tmp_path / "in.pt")
            for source in ("in", "in.pt"):
                out = tmp_path / f"{source}-out"
                convert(tmp_path / source, out, to=to, verify=True)
                moment = open_source(tmp_path / source).tensor("optimizer.0.weight.exp_avg")
                assert open_source(out).tensor("optimizer.0.weight.exp_avg").shape == moment.shape == (2, 3)
                if to == "torch":
                    live: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
                    assert source == "in" or live.keys() == state.keys()
                else:
                    live = {"optimizer": {key: _zero(value) for key, value in states.items()}}
                    dcp.load(live, checkpoint_id=out, no_dist=True)
                assert live["optimizer"].keys() == states.keys()
                for key, value in states.items():
                    same = torch.equal(live["optimizer"][key], value) if torch.is_tensor(value) else None
                    assert same if same is not None else live["optimizer"][key] == value, key

    def test_arrays_among_the_values(self, tmp_path: Path) -> None:
        array = np.arange(6, dtype=">i2").reshape(2, 3)
        torch.save({"model": {"w": counting(2)}, "rng": {"keys": array}}, tmp_path / "x.pt")
        convert(tmp_path / "x.pt", tmp_path / "out", to="dcp")
        values: Any = open_source(tmp_path / "out").values()
        assert np.array_equal(values["rng"]["keys"], array)
        live = {"rng": {"keys": None}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(live, storage_reader=dcp.FileSystemReader(tmp_path / "out"), no_dist=True)
        assert np.array_equal(live["rng"]["keys"], array)  # type: ignore[arg-type]
        convert(tmp_path / "x.pt", tmp_path / "y.pt", to="torch")
        assert torch.load(tmp_path / "y.pt", weights_only=True)["rng"] == {"keys": array.tolist()}

    def test_torch_turns_it_into_one_file(self, source: Path, tmp_path: Path) -> None:
        convert(source, tmp_path / "out", to="dcp")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp_to_torch_save(tmp_path / "out", tmp_path / "x.pt")
        loaded = torch.load(tmp_path / "x.pt", weights_only=True)
        assert torch.equal(loaded["model"]["emb.weight"], tensors()["model.emb.weight"])
        assert torch.equal(loaded["optim"]["state"]["emb.weight"]["step"], torch.tensor(2.0))
        assert loaded["extra"] == VALUES

    def test_every_dtype(self, tmp_path: Path) -> None:
        made = {f"model.{dtype}": counting(3, 2, dtype=dtype) for dtype in DTYPES}
        torch.save({"model": {name.removeprefix("model."): t for name, t in made.items()}}, tmp_path / "x.pt")
        convert(tmp_path / "x.pt", tmp_path / "out", to="dcp")
        holds(open_source(tmp_path / "out"), made)
        live = {"model": {name.removeprefix("model."): torch.zeros_like(tensor) for name, tensor in made.items()}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(live, storage_reader=dcp.FileSystemReader(tmp_path / "out"), no_dist=True)
        assert all(raw(live["model"][name.removeprefix("model.")]) == raw(tensor) for name, tensor in made.items())


@given(
    st.lists(st.integers(0, 7), max_size=4),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
    st.integers(1, 4),
    st.integers(1, 200),
)
@settings(max_examples=200, deadline=None)
def test_rows_tile_a_box_in_order(shape: list[int], corner: list[int], item_bytes: int, chunk_bytes: int) -> None:
    box = Box(tuple(corner[: len(shape)]), tuple(shape))
    size = torch.Size([a + n for a, n in zip(corner, shape, strict=False)])
    numbers = torch.arange(size.numel()).reshape(size)
    window = numbers[tuple(slice(a, a + n) for a, n in zip(box.offsets, box.shape, strict=True))].reshape(-1)
    seen = []
    for part in cut_rows(box, item_bytes, chunk_bytes):
        assert 0 < part.size <= max(chunk_bytes // item_bytes, 1)
        cut = tuple(slice(a, a + n) for a, n in zip(part.offsets, part.shape, strict=True))
        seen.append(numbers[cut].reshape(-1))
    assert torch.equal(torch.cat(seen) if seen else window[:0], window)


def test_values_as_json() -> None:
    value = {**VALUES, "inf": float("inf"), "set": {1, 2}, "c": 1j, 5: "int key", "d": {"$x": 1}}
    assert from_json(json.loads(json.dumps(to_json(value)))) == value


def test_numbered_parameters_get_their_names_from_the_live_job(tmp_path: Path) -> None:
    """What the refusal of a format that needs names tells its reader to do."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "numbered.pt")
    with pytest.raises(UnusableRequest, match=r"groups name '0'.*restore the checkpoint into its model and optimizer"):
        convert(tmp_path / "numbered.pt", tmp_path / "out", to="deepspeed")
    state = {"model": model, "optimizer": optimizer}
    ce.load(state, tmp_path / "numbered.pt")
    ce.save(state, tmp_path / "named", step=1)
    assert convert(tmp_path / "named", tmp_path / "out", to="deepspeed").state == "committed"
    moments = {f"optim.{name}.exp_avg": optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}
    source = ce.open(tmp_path / "out")
    assert all(torch.equal(source.read(name), moment) for name, moment in moments.items())


@pytest.mark.parametrize("form", ["zero=0", "zero=1,dp=2", "zero=3,dp=2", "universal"])
def test_what_is_neither_model_nor_optimizer_is_deepspeeds_client_state(tmp_path: Path, form: str) -> None:
    model = torch.nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(model.named_parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    ema, seen, rng = torch.arange(15.0).reshape(5, 3), torch.tensor([7]), torch.get_rng_state()
    others = {"ema.weight": ema, "seen.0": seen, "rng": rng}
    state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    more = {"ema": {"weight": ema, "decay": 0.9}, "seen": [seen, "x"], "rng": rng}
    torch.save({**state, **more}, tmp_path / "in.pt")
    if form == "universal":
        convert(tmp_path / "in.pt", tmp_path / "out", to="deepspeed-universal")
    else:
        convert(tmp_path / "in.pt", tmp_path / "out", to="deepspeed", layout=form)
    source = ce.open(tmp_path / "out")
    assert set(others) <= set(source.names())
    assert all(torch.equal(source.read(name), tensor) for name, tensor in others.items())
    values: Any = source.values()
    assert (values["ema"], values["seen"]) == ({"decay": 0.9}, [None, "x"])
    for file in (tmp_path / "out").rglob("*model_states.pt"):
        client = torch.load(file, weights_only=True)
        assert torch.equal(client["ema"]["weight"], others["ema.weight"])
        assert torch.equal(client["seen"][0], others["seen.0"])
        assert client["ema"]["decay"] == 0.9
    convert(tmp_path / "out", tmp_path / "back.pt", to="torch")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert torch.equal(back["rng"], others["rng"])
    assert torch.equal(back["seen"][0], others["seen.0"])
    assert back["seen"][1] == "x"
