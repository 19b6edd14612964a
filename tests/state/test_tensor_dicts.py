"""Dicts of many tensors are confirmed as a whole, and every change of one is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ckptengine.state.flatten import flatten
from ckptengine.state.walker import Walker


def _state() -> dict[str, Any]:
    return {"t": {f"w.{i}": torch.full((3, 2), float(i)) for i in range(20)}, "step": 1}


def _reordered(tensors: dict[Any, Any]) -> None:
    tensors["w.0"] = tensors.pop("w.0")


def _renamed(tensors: dict[Any, Any]) -> None:
    entries = [(f"v.{i}", tensor) for i, tensor in enumerate(tensors.values())]
    tensors.clear()
    tensors.update(entries)


def _replaced(tensors: dict[Any, Any]) -> None:
    tensors["w.3"] = tensors["w.3"].clone()


def _repointed(tensors: dict[Any, Any]) -> None:
    tensors["w.3"].data = torch.zeros(3, 2)


def _reshaped(tensors: dict[Any, Any]) -> None:
    tensors["w.3"].resize_(2, 3)


def _with_a_value(tensors: dict[Any, Any]) -> None:
    tensors["w.3"] = 7


def _grown(tensors: dict[Any, Any]) -> None:
    tensors["more"] = torch.zeros(1)


CHANGES = [_reordered, _renamed, _replaced, _repointed, _reshaped, _with_a_value, _grown]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: Callable[[dict[Any, Any]], None]) -> None:
    state = _state()
    walker = Walker(state, random=False)
    walker.flatten()
    change(state["t"])
    again, fresh = walker.flatten(), flatten(state, random=False)
    assert again.values == fresh.values
    assert again.structure_key == fresh.structure_key
    seen = {leaf.name: (leaf.tensor.data_ptr(), tuple(leaf.tensor.shape)) for leaf in again.tensors}
    assert seen == {leaf.name: (leaf.tensor.data_ptr(), tuple(leaf.tensor.shape)) for leaf in fresh.tensors}


def test_keys_that_are_equal_and_of_another_type_are_other_names() -> None:
    state: dict[str, Any] = {"t": {i: torch.zeros(2) for i in range(10)}}
    walker = Walker(state, random=False)
    walker.flatten()
    tensors = dict(state["t"])
    state["t"].clear()
    state["t"].update((float(i), tensor) for i, tensor in tensors.items())
    assert walker.flatten().values == flatten(state, random=False).values


def test_leaves_are_reused_also_of_a_dict_that_was_made_again() -> None:
    state = _state()
    walker = Walker(state, random=False)
    first = walker.flatten()
    state["t"], state["step"] = dict(state["t"]), 2
    second = walker.flatten()
    assert second.tensors is first.tensors
    assert second.values == flatten(state, random=False).values != first.values
