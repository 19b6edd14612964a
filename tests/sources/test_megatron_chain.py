"""One optimizer, or the chain of optimizers that Megatron makes of it: a job loads the number that it has itself."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptengine.errors import UnusableRequest
from ckptengine.operations.convert import convert
from ckptengine.operations.opening import open_any
from ckptengine.sources.detect import open_source

from .memory import MemorySource
from .reading import compare, truth_of_json

ARCHIVE = Path(__file__).parent / "data" / "megatron_chain.tar.xz"

EXPERTS = "decoder.layers.mlp.experts.experts.linear_fc1."
DENSE = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"]
COMMON = {"lr_mult": 1.0, "is_decoupled_lr": False, "default_config": True, "lr": 0.125}


def group(wd_mult: float, is_expert_parallel: bool, **more: Any) -> dict[str, Any]:
    return {**COMMON, "wd_mult": wd_mult, "is_expert_parallel": is_expert_parallel, **more}


def one(*groups: dict[str, Any], **outer: Any) -> dict[str, Any]:
    return {"optimizer": {"param_groups": [dict(group) for group in groups]}, **outer}


SINGLE = one(group(1.0, False), group(0.0, False), grad_scaler={"scale": 8.0})
CHAIN = {
    0: one(group(1.0, False), group(0.0, False), grad_scaler={"scale": 8.0}),
    1: one(group(1.0, True), group(0.0, True), grad_scaler={"scale": 4.0}),
}


def source_of(optimizer: Any, parameters: list[str], steps: dict[str, float] | None = None) -> MemorySource:
    arrays: dict[str, np.ndarray] = {}
    for number, parameter in enumerate(parameters):
        arrays[f"model.{parameter}"] = np.full((2, 3), number, np.float16)
        arrays[f"optim.{parameter}.master"] = np.full((2, 3), number, np.float32)
        arrays[f"optim.{parameter}.step"] = np.array((steps or {}).get(parameter, 3), np.float32)
    return MemorySource(arrays, {"optimizer": optimizer})


def written(source: Any, target: Path, layout: str | None, **options: Any) -> Any:
    convert(source, target, to="megatron", layout=layout, options=options)
    return open_source(target).values()["optimizer"]


def groups(optimizer: Any) -> list[Any]:
    assert all(group.pop("step", 3.0) == 3.0 for group in optimizer["optimizer"]["param_groups"])
    return optimizer["optimizer"]["param_groups"]


@pytest.mark.parametrize("master", ["param", "fp32_param"])
def test_a_chain_becomes_one_optimizer(tmp_path: Path, master: str) -> None:
    made = written(source_of(CHAIN, [*DENSE, EXPERTS + "weight"]), tmp_path / "target", "ep=1", master=master)
    assert groups(made) == groups(SINGLE)
    assert made["grad_scaler"] == {"scale": 8.0}  # the first optimizer's is the one that scales the loss


@pytest.mark.parametrize(
    ("parameters", "mults"),
    [(["weight"], [1.0]), (["weight", "bias"], [1.0, 0.0]), (["weight0", "weight1", "bias0", "bias1"], [1.0, 0.0])],
)
def test_one_optimizer_becomes_a_chain(tmp_path: Path, parameters: list[str], mults: list[float]) -> None:
    """Megatron wants just the groups that the experts have: without biases there is none without decay."""
    names = [*DENSE, "decoder.layers.mlp.shared_experts.linear_fc1.bias", *(EXPERTS + name for name in parameters)]
    embeddings = group(1.0, False, max_lr=1.0, default_config=False)
    single = one(group(1.0, False), embeddings, group(0.0, False), grad_scaler={"scale": 8.0})
    made = written(source_of(single, names), tmp_path / "target", "ep=2")
    assert sorted(made) == [0, 1]
    assert groups(made[0]) == groups(single)
    assert groups(made[1]) == [group(mult, True) for mult in mults]
    assert made[1]["grad_scaler"] == {"scale": 8.0}


@pytest.mark.parametrize(("layout", "optimizer"), [(None, CHAIN), ("tp=2", CHAIN), ("ep=4", CHAIN), (None, SINGLE)])
def test_the_number_stays_where_nothing_else_is_asked_for(tmp_path: Path, layout: str | None, optimizer: Any) -> None:
    made = written(source_of(optimizer, [*DENSE, EXPERTS + "weight", EXPERTS + "bias"]), tmp_path / "target", layout)
    if optimizer is CHAIN:
        assert {number: groups(each) for number, each in made.items()} == {n: groups(CHAIN[n]) for n in CHAIN}
        assert [made[number]["grad_scaler"] for number in CHAIN] == [{"scale": 8.0}, {"scale": 4.0}]
    else:
        assert groups(made) == groups(SINGLE)


@pytest.mark.parametrize("between", ["dcp", "native", "zarr"])
def test_a_chain_by_way_of_another_format(tmp_path: Path, between: str) -> None:
    """torch DCP makes text of the numbers."""
    convert(source_of(CHAIN, [*DENSE, EXPERTS + "weight"]), tmp_path / "between", to=between)
    made = written(open_any(tmp_path / "between"), tmp_path / "target", None)
    assert {number: groups(each) for number, each in made.items()} == {
        number: groups(CHAIN[number]) for number in CHAIN
    }


def test_a_model_without_experts_has_one_optimizer(tmp_path: Path) -> None:
    assert groups(written(source_of(SINGLE, DENSE), tmp_path / "target", "ep=2")) == groups(SINGLE)


def test_the_first_virtual_stage_has_an_optimizer_of_its_own(tmp_path: Path) -> None:
    """And the other way round, where that is not asked for."""
    option = "overlap_param_gather_with_optimizer_step"
    made = written(source_of(SINGLE, DENSE), tmp_path / "split", None, **{option: True})
    assert {number: groups(each) for number, each in made.items()} == dict.fromkeys([0, 1], groups(SINGLE))
    source = open_source(tmp_path / "split")
    assert sorted(written(source, tmp_path / "kept", None)) == [0, 1]
    assert groups(written(source, tmp_path / "one", None, **{option: False})) == groups(SINGLE)
    experts = source_of(CHAIN, [*DENSE, EXPERTS + "weight"])
    made = written(experts, tmp_path / "three", None, **{option: True})
    assert [groups(made[n]) for n in range(3)] == [groups(CHAIN[0]), groups(CHAIN[0]), groups(CHAIN[1])]


def test_experts_with_options_of_their_own_are_not_put_to_the_others(tmp_path: Path) -> None:
    chain = {0: SINGLE, 1: one(group(1.0, True) | {"lr": 0.5}, group(2.0, True))}
    source = source_of(chain, [*DENSE, EXPERTS + "weight"])
    with pytest.raises(UnusableRequest, match=r"differ in lr, .*ep=N"):
        convert(source, tmp_path / "target", to="megatron", layout="ep=1")
    assert list(tmp_path.iterdir()) == []
    chain[1] = one(group(1.0, True), group(2.0, True))
    made = written(source_of(chain, [*DENSE, EXPERTS + "weight"]), tmp_path / "target", "ep=1")
    assert groups(made) == [*groups(SINGLE), group(2.0, False)]


@pytest.mark.parametrize("master", ["param", "fp32_param"])
def test_parameters_that_counted_differently_are_refused(tmp_path: Path, master: str) -> None:
    source = source_of(SINGLE, DENSE, {DENSE[1]: 2})
    with pytest.raises(UnusableRequest, match=r"word_embeddings\.weight\.step is 3\.0 and .*weight\.step is 2\.0"):
        convert(source, tmp_path / "target", to="megatron", options={"master": master})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("case", ["tiny_chunks_alone", "tiny_legacy_chunks_alone"])
def test_virtual_stages_of_a_chain(saved: Path, case: str) -> None:
    """The second optimizer has all virtual stages but the first, and no experts."""
    source = open_source(saved / case / "checkpoint", rules="megatron-gpt" if "legacy" in case else None)
    compare(source, truth_of_json(saved / case / "truth.json"), exact=False)


def test_the_scale_of_the_loss_is_kept(saved: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    source = open_source(saved / "tiny_legacy_fp16" / "checkpoint", rules="megatron-gpt")
    convert(source, tmp_path / "one", to="megatron")
    convert(open_source(tmp_path / "one"), tmp_path / "native", to="native")
    convert(open_any(tmp_path / "native"), tmp_path / "two", to="megatron", options={"master": "param"})
    for target in ("one", "two"):
        common = torch.load(tmp_path / target / "iter_0000003" / "common.pt", weights_only=False)
        scaler = common["optimizer"]["grad_scaler"]
        assert torch.equal(scaler.pop("scale"), torch.tensor([4096.0]))
        assert scaler == {"growth_tracker": 3, "hysteresis_tracker": 2}
        state = common["optimizer"]["optimizer"].get("state", {"common_step": torch.tensor(3.0)})
        assert torch.equal(state["common_step"], torch.tensor(3.0))
    values = [open_source(tmp_path / target).values()["optimizer"]["grad_scaler"] for target in ("one", "two")]
    assert values[0]["scale"]["data"].tolist() == values[1]["scale"]["data"].tolist() == [4096.0]
