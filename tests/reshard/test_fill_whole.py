"""Targets that whole extents fill: by columns, verified one by one, each extent read once however many want it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptengine as ce
from ckptengine.errors import DigestMismatch
from ckptengine.layout.piece import whole
from ckptengine.operations.filling.fill import Fill
from ckptengine.operations.filling.plan import Extents
from ckptengine.operations.opening import open_any
from ckptengine.state.target import Target

COUNT = 500


def _values(number: int) -> torch.Tensor:
    return torch.arange(number, number + number % 11 + 1, dtype=torch.int32)


def _target(number: int) -> Target:
    shape = tuple(_values(number).shape)
    return Target(f"t{number}", torch.full(shape, -1, dtype=torch.int32), whole(shape))


def _remote(source: Any) -> Any:
    source.files.local_path = lambda path: None
    return source


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("whole")
    ce.save({f"t{i}": _values(i) for i in range(COUNT)}, found, 1)
    return found


@pytest.mark.parametrize("way", [lambda source: source, _remote], ids=["local", "remote"])
def test_every_tensor_gets_its_own_bytes(root: Path, way: Callable[[Any], Any]) -> None:
    numbers = [*range(COUNT), 7, 7, 300]  # some wanted several times
    targets = [_target(number) for number in numbers]
    filled = Fill(way(open_any(root)), targets).run()
    for number, target in zip(numbers, targets, strict=True):
        assert torch.equal(target.tensor, _values(number))
    assert filled.wanted_bytes == sum(target.tensor.nbytes for target in targets)
    assert filled.read_bytes < filled.wanted_bytes + (64 << 10)


def test_what_one_extent_fills_needs_no_plan(root: Path) -> None:
    source: Any = open_any(root)
    wholes, others = Extents(source).wholes([_target(number) for number in (3, 9, 3, 12)])
    assert wholes.targets.tolist() == [1, 3]
    assert others == [0, 2]
    assert wholes.nbytes(source.reader) == _values(9).nbytes + _values(12).nbytes


@pytest.mark.parametrize("way", [lambda source: source, _remote], ids=["local", "remote"])
def test_one_flipped_bit_is_found_and_named(tmp_path: Path, way: Callable[[Any], Any]) -> None:
    ce.save({f"t{i}": _values(i) for i in range(COUNT)}, tmp_path, 1)
    at = open_any(tmp_path).tensor("t271").fragments[0].offset
    file = next(tmp_path.glob("step-*/rank-*"))
    data = bytearray(file.read_bytes())
    data[at + 1] ^= 16
    file.write_bytes(data)
    with pytest.raises(DigestMismatch, match=r"of tensor 't271'"):
        Fill(way(open_any(tmp_path)), [_target(number) for number in range(COUNT)]).run()
    with pytest.raises(DigestMismatch, match=r"of tensor 't271'"):
        ce.open(tmp_path).state_dict()
    Fill(way(open_any(tmp_path)), [_target(number) for number in range(COUNT) if number != 271]).run()


def test_a_state_dict_of_small_and_large_tensors(tmp_path: Path) -> None:
    large = torch.arange((1 << 20) + 3, dtype=torch.int32)
    small = {f"t{i}": _values(i) for i in range(COUNT)}
    ce.save({"m": {**small, "large": large, "tied": small["t5"], "none": torch.empty(0, 3)}}, tmp_path, 1)
    found = ce.open(tmp_path).state_dict("m")
    assert torch.equal(found["large"], large)
    assert all(torch.equal(found[name], tensor) for name, tensor in small.items())
    assert found["tied"] is found["t5"]
    assert found["none"].shape == (0, 3)
