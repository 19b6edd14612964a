"""DeepSpeed checkpoints under odd settings: some kept as DeepSpeed wrote them, all made anew where it is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

import ckptengine as ce
from ckptengine.errors import NotFound, RuleError, UnreadableFormat, UnusableRequest
from ckptengine.operations.convert import convert
from ckptengine.sources.deepspeed.plainopt import Pools, plain_optimizer
from ckptengine.sources.detect import open_source
from ckptengine.sources.files import InlineFiles, LocalFiles
from ckptengine.sources.torchzip import load_torch

from .make_deepspeed_zoo import CASES
from .reading import compare, read_bytes, truth_of_json, truth_of_safetensors
from .trees import holds

torch = pytest.importorskip("torch")
ARCHIVE = Path(__file__).parent / "data" / "deepspeed_more.tar.xz"
KEPT = ["stage0_dp2_bf16_each", "zero2_dp4_elastic_sgd", "zero2_dp3_nadam", "bf16opt_dp2_frozen_tied"]
INSTALLED = importlib.util.find_spec("deepspeed") is not None and importlib.util.find_spec("safetensors") is not None
WITHOUT_NAMES = {"stage0_dp2_fp32_reversed", "pipeline_pp2_dp1_fp32_stage0"}
"""Cases whose optimizer knows positions only, of which neither shapes nor values say what they mean."""


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("case", KEPT)
def test_equal_to_what_lay_in_memory(written: Path, case: str) -> None:
    compare(open_source(written / case / "checkpoint"), truth_of_json(written / case / "truth.json"))


@pytest.mark.skipif(not INSTALLED, reason="deepspeed is not installed")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", sorted(set(CASES) - WITHOUT_NAMES))
def test_equal_to_what_lay_in_memory_now(tmp_path: Path, case: str) -> None:
    script = str(Path(__file__).with_name("make_deepspeed_zoo.py"))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, str(tmp_path), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    compare(open_source(tmp_path / case / "checkpoint"), truth_of_safetensors(tmp_path / case / "truth.safetensors"))


# without ZeRO


@pytest.mark.parametrize("case", [case for case in KEPT if "elastic" not in case])
def test_written_without_zero_and_read_again(written: Path, tmp_path: Path, case: str) -> None:
    source = open_source(written / case / "checkpoint")
    convert(source, tmp_path / "target", to="deepspeed", layout="dp=3,zero=0")
    made = open_source(tmp_path / "target")
    files = sorted(path.name for path in (tmp_path / "target" / "global_step3").iterdir())
    assert files == ["mp_rank_00_model_states.pt"]
    names = set(made.names())
    assert names == set(source.names())
    for name in names:
        one, other = source.tensor(name), made.tensor(name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert read_bytes(source.files, one) == read_bytes(made.files, other), name
    before: Any = source.values()
    after: Any = made.values()
    assert after["optim"]["param_groups"] == before["optim"]["param_groups"]
    torch.load(tmp_path / "target" / "global_step3" / "mp_rank_00_model_states.pt", weights_only=True)


def test_names_of_files_say_the_precision(written: Path, tmp_path: Path) -> None:
    """DeepSpeed looks for ``bf16_*`` in bfloat16 training, whatever the weights that the source held were."""
    source = open_source(written / "zero2_dp3_nadam" / "checkpoint")
    convert(source, tmp_path / "three", to="deepspeed", layout="dp=2,zero=3")
    third = open_source(tmp_path / "three")
    assert third.tensor("model.embed.weight").dtype == "float32"
    convert(third, tmp_path / "one", to="deepspeed", layout="dp=2,zero=1")
    assert len(list((tmp_path / "one" / "global_step3").glob("bf16_zero_pp_rank_*_optim_states.pt"))) == 2
    convert(third, tmp_path / "half", to="deepspeed", layout="zero=1", options={"precision": "fp16"})
    assert len(list((tmp_path / "half" / "global_step3").glob("zero_pp_rank_*_optim_states.pt"))) == 1
    with pytest.raises(UnusableRequest, match="precision"):
        convert(third, tmp_path / "none", to="deepspeed", options={"precision": "int4"})


def test_states_without_settings_are_written_as_elastic(written: Path, tmp_path: Path) -> None:
    source = open_source(written / "zero2_dp4_elastic_sgd" / "checkpoint")
    for layout in ("zero=0", "dp=2,zero=3"):
        with pytest.raises(UnusableRequest, match="elastic"):
            convert(source, tmp_path / "none", to="deepspeed", layout=layout)
    convert(source, tmp_path / "two", to="deepspeed", layout="dp=3,zero=2")
    compare(open_source(tmp_path / "two"), truth_of_json(written / "zero2_dp4_elastic_sgd" / "truth.json"))
    path = next((tmp_path / "two" / "global_step3").glob("*zero_pp_rank_2_*"))
    state = torch.load(path, weights_only=False)["optimizer_state_dict"] if INSTALLED else None
    if state is not None:
        lean = [copy.numel() for copy in state["single_partition_of_fp32_groups"]]
        assert [held["momentum_buffer"].numel() for held in state["base_optimizer_state"]] == lean


def test_counters_that_differ_within_a_group(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.state[model.bias]["step"] += 4
    state = optimizer.state_dict()
    names = [name for name, _ in model.named_parameters()]
    groups = [{**group, "params": names} for group in state["param_groups"]]
    named = {"state": dict(zip(names, state["state"].values(), strict=True)), "param_groups": groups}
    torch.save({"model": model.state_dict(), "optim": named}, tmp_path / "c.pt")
    source = open_source(tmp_path / "c.pt")
    with pytest.raises(UnusableRequest, match=r"bias\.step differs from optim\.weight\.step.*zero=0"):
        convert(source, tmp_path / "flat", to="deepspeed", layout="zero=2")
    convert(source, tmp_path / "plain", to="deepspeed", layout="zero=0")
    made = open_source(tmp_path / "plain")
    assert read_bytes(made.files, made.tensor("optim.bias.step")) == b"\x00\x00\xa0\x40"  # 5.0


# experts without ZeRO


def experts_without_zero(folder: Path, ranks: int = 2) -> dict[str, Any]:
    """Two dense parameters and four experts of one layer on ``ranks`` expert-parallel ranks; exact, by position."""
    prefix = "moe.deepspeed_moe.experts.deepspeed_experts."
    dense = {"up": torch.arange(6.0).reshape(2, 3), "gate": torch.arange(4.0)}
    truth = {f"model.{name}": tensor for name, tensor in dense.items()}
    truth |= {f"optim.{name}.exp_avg": tensor + 100 for name, tensor in dense.items()}
    local = 4 // ranks
    groups = [{"lr": 0.1, "params": [0, 1]}, {"lr": 0.2, "moe": True, "params": [*range(2, 2 + 2 * local)]}]
    for rank in range(ranks):
        states = {at: {"exp_avg": tensor + 100} for at, tensor in enumerate(dense.values())}
        for here in range(local):
            expert = rank * local + here
            weights = {f"{prefix}{expert}.w": torch.full((3, 2), expert * 1.0), f"{prefix}{expert}.b": torch.ones(2)}
            torch.save(weights, folder / f"layer_0_expert_{expert}_mp_rank_00_model_states.pt")
            for kind, (name, tensor) in enumerate(weights.items()):
                states[2 + 2 * here + kind] = {"exp_avg": tensor * 10 + expert}
                truth |= {f"model.{name}": tensor, f"optim.{name}.exp_avg": tensor * 10 + expert}
        optimizer = {"state": states, "param_groups": groups}
        torch.save({"optimizer": optimizer}, folder / f"expp_rank_{rank}_mp_rank_00_optim_states.pt")
        if rank == 0:
            model = {"module": dense, "optimizer": optimizer, "buffer_names": [], "global_steps": 3}
            torch.save({**model, "num_experts": [4]}, folder / "mp_rank_00_model_states.pt")
    return truth


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_optimizers_of_experts(tmp_path: Path, ranks: int) -> None:
    truth = experts_without_zero(tmp_path, ranks)
    source = open_source(tmp_path)
    assert set(source.names()) == set(truth)
    for name, tensor in truth.items():
        held = source.tensor(name)
        assert held.shape == tuple(tensor.shape), name
        assert read_bytes(source.files, held) == tensor.numpy().tobytes(), name
    groups: Any = source.values()
    assert len(groups["optim"]["param_groups"][1]["params"]) == 8


@pytest.mark.parametrize("layout", ["zero=1", "dp=4,ep=2,zero=2", "dp=6,ep=2,zero=1", "dp=4,ep=4,zero=1"])
def test_experts_written_for_other_ranks(tmp_path: Path, layout: str) -> None:
    (tmp_path / "source").mkdir()
    truth = experts_without_zero(tmp_path / "source")
    convert(open_source(tmp_path / "source"), tmp_path / "target", to="deepspeed", layout=layout)
    made = open_source(tmp_path / "target")
    masters = {f"optim.{name.removeprefix('model.')}.master": t for name, t in truth.items() if "model." in name}
    assert set(made.names()) == {*truth, *masters}
    for name, tensor in {**truth, **masters}.items():
        assert read_bytes(made.files, made.tensor(name)) == tensor.numpy().tobytes(), name
    folder = tmp_path / "target" / "global_step3"
    assert len(list(folder.glob("layer_0_expert_?_mp_rank_00_model_states.pt"))) == 4
    module = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
    assert (set(module["module"]), module["num_experts"]) == ({"up", "gate"}, [4])


def test_a_universal_checkpoint_shows_the_weights_of_experts(tmp_path: Path) -> None:
    """Their model files are copied, or (as DeepSpeed's converter leaves it with AutoEP) only the masters are there."""
    (tmp_path / "source").mkdir()
    truth = experts_without_zero(tmp_path / "source")
    convert(open_source(tmp_path / "source"), tmp_path / "target", to="deepspeed-universal", layout="zero=1")
    folder = tmp_path / "target" / "global_step3_universal"
    module = folder / "mp_rank_00_model_states.pt"
    content = torch.load(module, weights_only=True)
    experts = {name: content["module"].pop(name) for name in list(content["module"]) if "experts" in name}
    torch.save(content, module)
    assert len(experts) == 8
    without = open_source(tmp_path / "target")
    assert set(truth) <= set(without.names())
    for name, tensor in experts.items():
        held = without.tensor(f"model.{name}")
        assert read_bytes(without.files, held) == tensor.numpy().tobytes(), name
    for number in range(4):
        file = f"layer_0_expert_{number}_mp_rank_00_model_states.pt"
        torch.save({name: t.bfloat16() for name, t in experts.items() if f"experts.{number}." in name}, folder / file)
    beside = open_source(tmp_path / "target")
    assert {beside.tensor(f"model.{name}").dtype for name in experts} == {"bfloat16"}
    assert set(truth) <= set(beside.names())


def test_experts_that_cannot_be_written(tmp_path: Path, written: Path) -> None:
    experts_without_zero(tmp_path)
    source = open_source(tmp_path)
    for layout, match in (("dp=3,ep=3,zero=1", "4 experts"), ("dp=3,ep=2,zero=1", "dp=3"), ("zero=3", "stage 3")):
        with pytest.raises(UnusableRequest, match=match):
            convert(source, tmp_path / "target", to="deepspeed", layout=layout)
    with pytest.raises(UnusableRequest, match="there are none"):
        dense = open_source(written / "zero2_dp3_nadam" / "checkpoint")
        convert(dense, tmp_path / "target", to="deepspeed", layout="dp=2,ep=2")


def test_a_missing_expert_optimizer_is_named(tmp_path: Path) -> None:
    experts_without_zero(tmp_path, 4)
    (tmp_path / "expp_rank_2_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(NotFound, match="expp_rank_2_mp_rank_00"):
        open_source(tmp_path)
    torch.save({"optimizer": None}, tmp_path / "expp_rank_2_mp_rank_00_optim_states.pt")
    with pytest.raises(UnreadableFormat, match="expp_rank_2"):
        open_source(tmp_path)


# tensor-parallel pieces that the checkpoint itself explains


def tensor_parallel(folder: Path, **info: Any) -> dict[str, Any]:
    """Two ranks with a column-, a row-parallel, a fused and a replicated weight; returns the whole ones."""
    whole = {
        "up": torch.arange(12.0).reshape(6, 2),
        "down": torch.arange(15.0).reshape(3, 5),
        "fused": torch.arange(16.0).reshape(8, 2),
        "norm": torch.arange(3.0),
    }
    up, down, fused = whole["up"], whole["down"], whole["fused"]
    first, second = torch.cat([fused[:2], fused[4:5], fused[6:7]]), torch.cat([fused[2:4], fused[5:6], fused[7:]])
    ranks = [
        {"up": up[:4], "down": down[:, :3], "fused": first, "norm": whole["norm"]},
        {"up": up[4:], "down": down[:, 3:], "fused": second, "norm": whole["norm"]},
    ]
    shards = {number: {"shard_shape": list(rank["up"].shape), "pieces": [{}]} for number, rank in enumerate(ranks)}
    recorded = {
        "tp_replicated_parameter_patterns": ["^norm$"],
        "parameter_with_row_parallelism_patterns": [r"^down$"],
        "parameter_with_sub_params": [{"patterns": ["^fused$"], "shape": [(4, 2, 2), -1], "partition_dim": 0}],
        "affine_map": {"version": 1, "params": {"^up$": {"logical_shape": [6, 2], "ranks": shards}}},
        **info,
    }
    for number, rank in enumerate(ranks):
        state = {"module": {name: tensor.clone() for name, tensor in rank.items()}, "buffer_names": []}
        state |= {"checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 2}, "global_steps": 3}
        torch.save({**state, "universal_checkpoint_info": recorded}, folder / f"mp_rank_{number:02d}_model_states.pt")
    return whole


def test_recorded_tensor_parallelism(tmp_path: Path) -> None:
    whole = tensor_parallel(tmp_path)
    source = open_source(tmp_path)
    for name, tensor in whole.items():
        held = source.tensor(f"model.{name}")
        assert held.shape == tuple(tensor.shape), name
        assert read_bytes(source.files, held) == tensor.numpy().tobytes(), name


@pytest.mark.parametrize(
    ("info", "name"),
    [
        ({"affine_map": {"params": {}}}, "up"),
        ({"affine_map": {"params": {"^up$": {"logical_shape": [7, 2], "ranks": {0: {"shard_shape": [4, 2]}}}}}}, "up"),
        ({"autotp_unsupported_parameter_patterns": {"^down$": "no"}}, "down"),
        ({"parameter_with_sub_params": [{"patterns": ["^fused$"], "shape": [-1, -1], "partition_dim": 0}]}, "fused"),
    ],
)
def test_what_is_not_recorded_is_refused(tmp_path: Path, info: dict[str, Any], name: str) -> None:
    tensor_parallel(tmp_path, **info)
    with pytest.raises(RuleError, match=f"{name} lies on 2 tensor-parallel ranks"):
        open_source(tmp_path)


def test_recorded_patterns_that_are_none(tmp_path: Path) -> None:
    tensor_parallel(tmp_path, tp_replicated_parameter_patterns=["("])
    with pytest.raises(UnreadableFormat, match="universal_checkpoint_info"):
        open_source(tmp_path)


def test_a_universal_checkpoint_holds_masters_of_trained_parameters_only(tmp_path: Path) -> None:
    """DeepSpeed's converter puts copies of buffers and frozen weights beside the masters."""
    (tmp_path / "zero").mkdir()
    for name, value, states in (("w", torch.ones(2, 3), ["exp_avg"]), ("seen", torch.arange(4), [])):
        (tmp_path / "zero" / name).mkdir()
        for state in ("fp32", *states):
            torch.save({"param": value.float(), "cat_dim": 0}, tmp_path / "zero" / name / f"{state}.pt")
    model = {"module": {"w": torch.ones(2, 3), "seen": torch.arange(4)}, "buffer_names": ["seen"], "global_steps": 1}
    shapes = [{"w": torch.Size((2, 3))}]
    torch.save({**model, "param_shapes": shapes}, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({"param_groups": [{"lr": 1.0, "step": 2, "params": [0]}]}, tmp_path / "zero" / "optimizer_state.pt")
    names = set(open_source(tmp_path).names())
    assert names == {"model.w", "model.seen", "optim.w.master", "optim.w.exp_avg", "optim.w.step"}


def test_an_optimizer_in_another_order_than_its_module(tmp_path: Path) -> None:
    """Without ZeRO only positions are kept: what the fp32 copies round to goes before the order of the module."""
    copies = {name: torch.randn(3, 3, generator=torch.Generator().manual_seed(at)) for at, name in enumerate("abc")}
    order = ["c", "a", "b"]
    states = {at: {"exp_avg": torch.full((3, 3), float(ord(name)))} for at, name in enumerate(order)}
    optimizer = {
        "optimizer_state_dict": {"state": states, "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]},
        "fp32_groups": [[copies[name] for name in order]],
    }
    module = {name: copy.bfloat16() for name, copy in copies.items()}
    known: dict[str, Any] = {
        "module": module,
        "buffer_names": [],
        "optimizer": optimizer,
        "param_shapes": None,
        "dp_world_size": 1,
    }
    torch.save(
        {**known, "dp_world_size": 1, "mp_world_size": 1, "ds_version": "0.19.8"},
        tmp_path / "mp_rank_00_model_states.pt",
    )
    source = open_source(tmp_path)
    expected = {f"model.{name}": tensor for name, tensor in module.items()}
    expected |= {f"optim.{name}.master": copy for name, copy in copies.items()}
    expected |= {f"optim.{name}.exp_avg": states[at]["exp_avg"] for at, name in enumerate(order)}
    holds(source, expected)


def test_positions_fill_a_live_optimizer_by_its_order(tmp_path: Path) -> None:
    """Two groups of equal shapes in plain fp32: nothing says which is which but the order of the live optimizer."""
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(3, 3)) for name in "abcd"})
    groups = [{"params": [model["b"], model["d"]], "lr": 0.1}, {"params": [model["a"], model["c"]], "lr": 0.2}]
    optimizer = torch.optim.AdamW(groups)
    model_before = {name: torch.full((3, 3), float(at)) for at, name in enumerate("abcd")}
    states = {at: {"step": torch.tensor(4.0), "exp_avg": torch.full((3, 3), at + 10.0)} for at in range(4)}
    for state in states.values():
        state["exp_avg_sq"] = state["exp_avg"] * 2
    listed = [{"lr": 0.1, "params": [0, 1]}, {"lr": 0.2, "params": [2, 3]}]
    known: dict[str, Any] = {"module": model_before, "buffer_names": [], "param_shapes": None, "global_steps": 4}
    known |= {"optimizer": {"state": states, "param_groups": listed}, "dp_world_size": 1, "mp_world_size": 1}
    torch.save(known, tmp_path / "mp_rank_00_model_states.pt")
    assert "optim.state.3.exp_avg" in open_source(tmp_path).names()
    assert ce.load({"model": model, "optim": optimizer}, tmp_path) == 4
    assert all(torch.equal(model[name].detach(), tensor) for name, tensor in model_before.items())
    for at, name in enumerate("bdac"):
        assert torch.equal(optimizer.state[model[name]]["exp_avg"], states[at]["exp_avg"]), name
        assert torch.equal(optimizer.state[model[name]]["exp_avg_sq"], states[at]["exp_avg_sq"]), name


def test_without_zero_a_step_that_its_group_counts_is_each_parameters(tmp_path: Path) -> None:
    """As fused optimizers keep it, and as it is read under ZeRO; a counter of the parameter's own comes first."""
    weight, bias = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    state = {0: {"exp_avg": weight / 2}, 1: {"exp_avg": bias / 2, "step": 9}}
    optimizer = {"state": state, "param_groups": [{"lr": 0.1, "step": 7, "params": [0, 1]}]}
    torch.save({"module": {"w": weight, "b": bias}, "optimizer": optimizer}, tmp_path / "m.pt")
    files = LocalFiles(str(tmp_path))
    held: Any = load_torch(files, "m.pt")
    inline = InlineFiles(files)
    found, _ = plain_optimizer(held["optimizer"], Pools(list(held["module"].items())), inline)
    steps = {name: piece for name, key, piece in found if key == "step"}
    assert {name: int.from_bytes(inline.read(piece.path, 0, 8), "little") for name, piece in steps.items()} == {
        "w": 7,
        "b": 9,
    }
