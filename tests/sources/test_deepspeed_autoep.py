"""Experts that AutoEP spread over ranks: as DeepSpeed wrote them, and what is refused."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptengine.errors import Damaged, NotFound, UnreadableFormat
from ckptengine.sources.detect import open_source

from .make_deepspeed_autoep import CASES
from .reading import compare, truth_of_json

ARCHIVE = Path(__file__).parent / "data" / "deepspeed_autoep.tar.xz"
MODEL = "mp_rank_00_model_states.pt"


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoep")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_all_experts_in_one_tensor(written: Path, case: str) -> None:
    source = open_source(written / case / "checkpoint")
    truth = truth_of_json(written / case / "truth.json")
    compare(source, truth, exact=False)
    experts = [name for name in truth if ".experts.w1" in name]
    assert {source.tensor(name).shape[0] for name in experts} == {4}
    assert len(experts) == 4  # the weight, its master and two moments
    assert {name for name in source.names() if not name.endswith(".step")} - set(truth) <= {
        "model.model.layers.0.mlp.gate.gate.weight"  # the router once more, under its old name
    }
    groups: Any = source.values()
    trained = [name for group in groups["optim"]["param_groups"] for name in group["params"]]
    assert len(trained) == len(set(trained)) == len({name for name in truth if name.endswith(".master")})


@pytest.fixture
def altered(written: Path, tmp_path: Path) -> Any:
    """A copy of a checkpoint whose model file a function changed."""

    def make(change: Any) -> Path:
        folder = Path(shutil.copytree(written / "autoep2_dp4_zero1" / "checkpoint" / "global_step2", tmp_path / "copy"))
        content = torch.load(folder / MODEL, weights_only=True)
        change(content)
        torch.save(content, folder / MODEL)
        return folder

    return make


def reorder(content: dict[str, Any]) -> None:
    content["ds_autoep_layers"][0]["expert_placement"]["ranks"][0]["experts"] = [0, 2]
    content["ds_autoep_layers"][0]["expert_placement"]["ranks"][1]["experts"] = [1, 3]


def forget(content: dict[str, Any]) -> None:
    content["ds_autoep_layers"] = None


def more(content: dict[str, Any]) -> None:
    layer = content["ds_autoep_layers"][0]
    layer["num_experts"] = 5
    layer["expert_placement"] = None


def unnamed(content: dict[str, Any]) -> None:
    content["ds_autoep_layers"][0]["expert_key_prefix"] = 7


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (reorder, UnreadableFormat, "do not follow one another"),
        (forget, UnreadableFormat, "unknown what the other ranks hold"),
        (more, Damaged, "the ranks hold 4 experts"),
        (unnamed, UnreadableFormat, "ds_autoep_layers"),
    ],
)
def test_what_is_not_understood_is_refused(altered: Any, change: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        open_source(altered(change))


def test_a_missing_expert_is_named(altered: Any) -> None:
    folder = altered(lambda content: None)
    (folder / "layer_0_expert_2_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(NotFound, match=r"w1 has 4 experts, of which the file of number 2"):
        open_source(folder)
    (folder / "layer_0_expert_2_mp_rank_00_model_states.pt").write_bytes(
        (folder / "layer_0_expert_1_mp_rank_00_model_states.pt").read_bytes()
    )
    with pytest.raises(UnreadableFormat, match="two expert files"):
        open_source(folder)
