"""What is nested in lists and tuples comes back nested so, whatever format it went through."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from ckptengine.errors import UnusableRequest
from ckptengine.operations.convert import convert
from ckptengine.operations.diff import diff
from ckptengine.operations.opening import open_any
from ckptengine.sources.detect import open_source

from .trees import counting


def state_of_lists() -> dict[str, Any]:
    """What a job with two models saves: lists and tuples of state dicts, tensors and numbers."""
    groups = [{"params": [0, 1], "lr": 0.1}]

    def optimizer(start: int) -> dict[str, Any]:
        return {"state": {n: {"exp_avg": counting(2, 3, start=start + n)} for n in (0, 1)}, "param_groups": groups}

    return {
        "models": [{"0.weight": counting(2, 3)}, {"0.weight": counting(2, 3, start=7)}],
        "optimizers": [optimizer(20), optimizer(40)],
        "mixed": [counting(4), {"x": counting(2), "y": 5}, None],
        "pair": (counting(3), 3),
        "named": [{"state": {0: {"step": 2}}, "param_groups": [{"params": [0], "param_names": ["a.w"]}]}],
    }


@pytest.mark.parametrize("middle", ["native", "zarr", "dcp", "safetensors"])
def test_lists_of_state_dicts_are_lists_again(tmp_path: Path, middle: str) -> None:
    state = state_of_lists()
    torch.save(state, tmp_path / "source.pt")
    convert(tmp_path / "source.pt", tmp_path / "middle", to=middle)
    assert diff(open_any(tmp_path / "source.pt"), open_any(tmp_path / "middle")).same
    state["named"][0]["state"][0]["step"] = torch.tensor(2)
    for source in ("source.pt", "middle"):
        convert(tmp_path / source, tmp_path / f"{source}.pt", to="torch")
        made = torch.load(tmp_path / f"{source}.pt", weights_only=True)
        assert shown(made) == shown(state)


def test_lists_in_dcp_are_what_torch_loads(tmp_path: Path) -> None:
    state = state_of_lists()
    del state["named"]
    torch.save(state, tmp_path / "source.pt")
    convert(tmp_path / "source.pt", tmp_path / "dcp", to="dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "back.pt")
    made = torch.load(tmp_path / "back.pt", weights_only=True)
    for optimizer in made["optimizers"]:
        optimizer["state"] = {int(number): moments for number, moments in optimizer["state"].items()}  # as torch does
    assert shown(made) == shown(state)
    own = {"models": state["models"], "mixed": state["mixed"][:2]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(own, checkpoint_id=tmp_path / "torch")
    assert open_source(tmp_path / "torch").values() == {"models": [None, None], "mixed": [None, {"y": 5}]}


def test_a_list_at_the_top_is_a_list_again(tmp_path: Path) -> None:
    torch.save([{"w": counting(2), "k": 1}, {"w": counting(3)}], tmp_path / "list.pt")
    convert(tmp_path / "list.pt", tmp_path / "again.pt", to="torch")
    made = torch.load(tmp_path / "again.pt", weights_only=True)
    assert shown(made) == shown([{"w": counting(2), "k": 1}, {"w": counting(3)}])


@pytest.mark.parametrize("state", [{"a": {"b": counting(2)}, "a.b": 5}, {"w": counting(2), "a": {"b": 1}, "a.b": 5}])
def test_two_things_under_one_key_of_dcp_are_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    """torch refuses to save them; one of them would be lost."""
    torch.save(state, tmp_path / "source.pt")
    with pytest.raises(UnusableRequest, match=r"'a.b' would be the key of two"):
        convert(tmp_path / "source.pt", tmp_path / "dcp", to="dcp")


def shown(value: Any) -> Any:
    """Nested values with tensors as their type, shape and elements, and tuples as lists."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.tolist())
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    return [shown(item) for item in value] if isinstance(value, list | tuple) else value
