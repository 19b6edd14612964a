"""Filling live memory is an update like any other: what another checkpointer is still capturing is captured first."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

import ckptengine as ce
from ckptengine.checkpointer import Checkpointer

from .test_guard import WITHIN_S, Held, assert_holds


def _fill_while_saving(tmp_path: Path, fill: Any) -> None:
    state = {f"t{i}": torch.arange(5000.0) + 10_000 * i for i in range(4)}
    ce.save({name: -value for name, value in state.items()}, tmp_path / "other", 3)
    held = Held()
    wanted = {name: value.clone() for name, value in state.items()}
    with ce.Checkpointer(state, tmp_path / "run", file_ops=held, random=False) as checkpointer:
        held.shut()
        handle = checkpointer.save(1)
        assert held.reached.wait(WITHIN_S)
        filling = threading.Thread(target=fill, args=(state, tmp_path / "other"))
        filling.start()
        filling.join(0.3)
        assert filling.is_alive()
        held.open()
        filling.join(WITHIN_S)
        assert not filling.is_alive()
        assert handle.result(WITHIN_S) == 1
    assert_holds(tmp_path / "run", 1, wanted)
    assert all(torch.equal(state[name], -value) for name, value in wanted.items())


def test_load_waits_for_captures_in_flight(tmp_path: Path) -> None:
    _fill_while_saving(tmp_path, ce.load)


def test_another_checkpointer_s_restore_does_too(tmp_path: Path) -> None:
    def restore(state: Any, root: Path) -> None:
        with Checkpointer(state, root, random=False) as other:
            assert other.restore() == 3

    _fill_while_saving(tmp_path, restore)
