"""What commands say to somebody new: one line for what cannot be done, and what to type instead."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

import ckptengine as ce
from ckptengine.cli import COMMANDS, main

from .jobs import flip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``run`` with steps 1 and 2, ``dcp``, ``weights.pt`` and an empty directory ``empty``."""
    monkeypatch.chdir(tmp_path)
    state: dict[str, Any] = {"a": torch.arange(3.0), "s": torch.tensor(1), "note": "x" * 3000}
    with ce.Checkpointer(state, "run", random=False) as checkpointer:
        checkpointer.save(1, metrics={"loss": 1 / 3}).result()
        checkpointer.fence()
        state["s"] += 1
        checkpointer.save(2, metrics={"loss": 0.5, "steps": 7}).result()
    with pytest.MonkeyPatch.context() as quiet:
        quiet.setattr("warnings.warn", lambda *_, **__: None)  # that there is one process
        dcp.save({"a": torch.arange(3.0)}, checkpoint_id="dcp")
    torch.save({"a": torch.arange(3.0)}, "weights.pt")
    Path("empty").mkdir()
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that says why."""
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code  # type: ignore[assignment]
    assert status == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith(f"ckptengine {arguments[0]}: ")
    return line


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(arguments) == status
    found = capsys.readouterr()
    assert found.err == ""
    return found.out


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "bench"])
def test_bad_arguments_take_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, command, "--no-such-option")
    assert f"ckptengine {command} --help" in line


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", ["ls", "prune"])
@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("run/step-000000001", "is one step of the root run: ckptengine {} run, or ckptengine show run@1"),
        ("run/step-000000099", "there is no directory run/step-000000099"),
        ("run@1", "run@1: this takes a whole root: ckptengine {} run"),
        ("dcp", "dcp is a dcp checkpoint and no root of steps: ckptengine show dcp tells what is in it"),
        ("weights.pt", "weights.pt is a file and no root: ckptengine show weights.pt"),
        ("nowhere", "there is no directory nowhere"),
    ],
)
def test_what_is_no_root(command: str, path: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    more = ["--keep-last", "1"] if command == "prune" else []
    assert told.format(command) in refused(capsys, command, path, *more)
    assert sorted(Path().rglob("*")) == before, "not even a lock is left there"


@pytest.mark.usefixtures("here")
def test_an_empty_root_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "ls", "empty") == "empty: no checkpoints\n"
    assert said(capsys, "prune", "empty", "--keep-last", "1") == "deleted 0 saves, 0 B freed; steps that stay: none\n"


def test_a_url_with_nothing_there(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    url = f"memory://{uuid.uuid4().hex}/run"
    ce.save({"a": torch.zeros(1)}, url, 1)
    assert "committed" in said(capsys, "ls", url)
    for path in (f"{url}/step-000000001", f"{url}-other"):
        assert f"there are no checkpoints at {path}" in refused(capsys, "ls", path)


@pytest.mark.usefixtures("here")
def test_ls_and_show_write_numbers_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert "loss=0.333333\n" in said(capsys, "ls", "run")
    assert "metrics  loss=0.333333\n" in said(capsys, "show", "run@1")
    assert json.loads(said(capsys, "ls", "run", "--json"))["steps"][0]["metrics"] == {"loss": 1 / 3}
    assert "loss=0.5 steps=7\n" in said(capsys, "show", "run")
    assert said(capsys, "show", "run").endswith("xxx ... (all of it with --json)\n")


@pytest.mark.usefixtures("here")
def test_verify_says_what_it_can(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "verify", "run") == "run: step 2 holds: 2 tensors of a native checkpoint\n"
    assert said(capsys, "verify", "run@1") == "run@1: step 1 holds: 2 tensors of a native checkpoint\n"
    assert said(capsys, "verify", "dcp") == "dcp: holds: 1 tensor of a dcp checkpoint\n"
    assert said(capsys, "convert", "dcp", "st", "--to", "safetensors")
    can = "; it records no digests: all that can be told is that their bytes can be read"
    assert said(capsys, "verify", "st") == f"st: holds: 1 tensor of a safetensors checkpoint{can}\n"
    flip(Path("run"), 2)
    text = said(capsys, "verify", "run@2", status=1)
    assert text.endswith("run@2: DAMAGED, 1 problem\n")


@pytest.mark.usefixtures("here")
def test_diff_counts_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "diff", "run@1", "run@2", status=1)
    assert "s: 1 element differs, largest difference 1: 1 and 2\n" in text
    text = said(capsys, "diff", "run", "dcp", status=1)
    assert text.splitlines()[-1].endswith("; 1 tensor only in A; 1 value not equal")


@pytest.mark.usefixtures("here")
def test_places_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("zarr", reason="zarr is not installed")
    line = refused(capsys, "show", "run", "--refs", "nowhere/refs.json")
    assert "nowhere/refs.json: No such file or directory" in line
    assert "--dir weights.pt is a file" in refused(capsys, "demo", "--dir", "weights.pt")
    assert "--keep-last 0: a whole number from 1 on" in refused(capsys, "prune", "run", "--keep-last", "0")


@pytest.mark.usefixtures("here")
def test_convert_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "convert", "run", "out", "--to", "safetensors", "--layout", "dp=1", "--workers", "1")
    assert "cover   each element of 2 tensors is stored exactly once\n" in text
    assert "in 1 file, 1 work unit\n" in text
    assert "with 1 worker\n" in text
    assert "None" not in text
    assert text.endswith("done\n")
