"""``ls`` with tiers and URLs, and ``show --policy``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ckptengine as ce
from ckptengine.cli import main

from .jobs import flip, folder_of, run_steps, state_of


@pytest.fixture
def places(tmp_path: Path, memory: str) -> list[str]:
    """Steps 1 to 4: memory has the newest two, the disk 2 and 4, the root 4."""
    places = [memory, str(tmp_path / "disk"), str(tmp_path / "root")]
    tiers = [
        ce.Tier(places[0], interval=ce.Every(steps=1), keep=ce.Keep(last=2)),
        ce.Tier(places[1], interval=ce.Every(steps=2), keep=ce.Keep()),
    ]
    state = state_of(0)
    with ce.Checkpointer(state, places[2], tiers=tiers, interval=ce.Every(steps=4)) as checkpointer:
        for step in range(1, 5):
            run_steps(checkpointer, state, range(step, step + 1))
            checkpointer.wait()
    return places


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_ls_says_where_each_step_lies(places: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    memory, disk, root = places
    found = said(capsys, "ls", root)
    assert [(row["step"], row["state"], row["tiers"]) for row in found["steps"]] == [
        (2, "committed", [disk]),
        (3, "captured", [memory]),
        (4, "committed", [memory, disk, "root"]),
    ], "host memory alone is never called committed"
    assert found["troubles"] == {}
    assert main(["ls", root]) == 0
    text = capsys.readouterr().out
    assert f"{memory},{disk},root" in text


def test_no_command_prints_credentials(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    url, copy = (f"memory://me:hunter2-secret@{tmp_path.name}/{name}" for name in ("run", "copy"))
    ce.save(state_of(1), url, 1)
    for command in (
        ["ls", url],
        ["show", url],
        ["verify", url],
        ["diff", url, f"{url}@1"],
        ["convert", url, copy, "--to", "safetensors", "--verify"],
        ["verify", copy],
        ["prune", url, "--keep-last", "1"],
    ):
        for arguments in (command, [*command, "--json"]):
            status = main(arguments)
            assert status == (2 if arguments[0] == "convert" and "--json" in arguments else 0), "it exists by then"
    for absent in (["verify", f"{url}-x"], ["ls", f"{url}-x"], ["prune", f"{url}-x", "--keep-last", "1"]):
        assert main(absent) == 2
    said = "".join(capfd.readouterr())
    assert tmp_path.name in said
    assert "hunter2" not in said


def test_ls_of_a_damaged_root(places: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _, disk, root = places
    flip(Path(root), 4).unlink()
    found = said(capsys, "ls", root)
    (row,) = [row for row in found["steps"] if row["step"] == 4]
    assert row["state"] == "damaged"
    assert "is missing" in row["reason"]
    assert disk in row["tiers"]


def test_ls_of_a_tier_that_is_gone(places: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.rmtree(folder_of(places[0]))
    found = said(capsys, "ls", places[2], "--tier", "nosuchprotocol://x/y")
    assert [row["step"] for row in found["steps"]] == [2, 4]
    assert list(found["troubles"]) == ["nosuchprotocol://x/y"]


def test_ls_of_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    url = "memory://listed/run"
    ce.save(state_of(3), url, 3)
    found = said(capsys, "ls", url)
    assert [(row["step"], row["state"], row["tiers"]) for row in found["steps"]] == [(3, "committed", ["root"])]
    assert found["steps"][0]["tensors"] == 2
    assert main(["ls", "nosuchprotocol://x/y"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_show_policy(places: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    memory, disk, root = places
    found = said(capsys, "show", root, "--policy")
    assert found["places"] == places
    assert found["interval"] == "every 1 steps; every 2 steps; every 4 steps"
    assert found["on_failure"] == "raise at the next hook"
    assert found["tiers"] == [
        f"{memory}: every 1 steps; keep the last 2",
        f"{disk}: every 2 steps; keep everything",
        f"{root}: every 4 steps; keep everything",
    ]
    assert found["cost"]["samples"] >= 1
    stolen_s = found["cost"]["stolen_s"]
    for one in found["advice"]:
        assert one["period_s"] >= max(stolen_s / 0.01, min((2 * stolen_s * one["mtbf_s"]) ** 0.5, 4 * 3600.0), 1.0)
    assert main(["show", root, "--policy"]) == 0
    assert "advice" in capsys.readouterr().out


def test_show_policy_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / ".policy.json").write_text("{")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / ".policy.json").write_text('{"format": 1, "cost": 7}')
    for path in (tmp_path, tmp_path / "bad", tmp_path / "odd", "memory://x/y"):
        assert main(["show", str(path), "--policy"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_prune_removes_what_a_killed_job_left_of_its_record(tmp_path: Path) -> None:
    ce.save(state_of(1), tmp_path, 1)
    left = [tmp_path / ".policy.json.tmp", tmp_path / ".policy.json.6628.tmp"]
    for path in left:
        path.write_text('{"format"')
    (tmp_path / ".policy.json").write_text('{"format": 1}')
    assert main(["prune", str(tmp_path), "--keep-last", "1", "--dry-run"]) == 0
    assert all(path.exists() for path in left)
    assert main(["prune", str(tmp_path), "--keep-last", "1"]) == 0
    assert not any(path.exists() for path in left)
    assert (tmp_path / ".policy.json").exists()


def test_prune_deletes_nothing_for_a_step_of_which_not_every_byte_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3):
        ce.save(state_of(step), tmp_path, step)
    bent = flip(tmp_path, 3)
    told = json.loads(_pruned(capsys, tmp_path, "--dry-run", "--json"))
    assert [(one["step"], one["why"]) for one in told["removed"]] == [(1, "not kept by the policy")]
    assert [one["step"] for one in told["damaged"]] == [3]
    assert bent.name in told["damaged"][0]["why"]
    assert "kept step 3, which is damaged: " in _pruned(capsys, tmp_path)
    assert ce.steps(tmp_path) == [2, 3]
    assert ce.load(state_of(0), tmp_path) == 2

    flip(tmp_path, 2)
    told = json.loads(_pruned(capsys, tmp_path, "--json"))
    assert ([one["step"] for one in told["damaged"]], told["kept"]) == ([2, 3], [2, 3]), "where none is good, all stay"
    ce.save(state_of(1), tmp_path, 1)
    told = json.loads(_pruned(capsys, tmp_path, "--json"))
    assert ([one["step"] for one in told["damaged"]], told["kept"]) == ([2, 3], [1, 2, 3])


def test_prune_keeps_the_save_that_stands_in_for_a_damaged_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        ce.save(state_of(step), tmp_path, step)
    ce.save(state_of(9), tmp_path, 2)
    bent = max(tmp_path.glob("step-000000002/rank-*"))
    bent.write_bytes(bent.read_bytes()[:-1])
    _pruned(capsys, tmp_path)
    live = state_of(0)
    assert ce.load(live, tmp_path) == 2
    assert live["note"] == {"step": 2}


def _pruned(capsys: pytest.CaptureFixture[str], root: Path, *more: str) -> str:
    assert main(["prune", str(root), "--keep-last", "1", *more]) == 0
    return capsys.readouterr().out


def test_every_key_that_is_printed_is_documented(places: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs/commands.md").read_text(encoding="utf-8")
    _, disk, root = places
    ce.save(state_of(5), root, 5)
    flip(Path(root), 5)
    printed = {
        "ls": said(capsys, "ls", root),
        "show": said(capsys, "show", f"{disk}@2", "--layout"),
        "show --policy": said(capsys, "show", root, "--policy"),
        "prune": json.loads(_pruned(capsys, Path(disk), "--json")),
    }
    assert main(["verify", f"{root}@5", "--json"]) == 1
    printed["verify"] = json.loads(capsys.readouterr().out)
    free = {"metrics", "troubles", "aliases", "values", "layout"}
    for command, document in printed.items():
        missing = {key for key in _keys(document, free) if f"`{key}`" not in text}
        assert not missing, command


def _keys(document: Any, free: set[str]) -> set[str]:
    """Keys of a document, without those that the checkpoint itself brings."""
    if isinstance(document, list):
        return set().union(*(_keys(one, free) for one in document))
    if not isinstance(document, dict):
        return set()
    return set(document).union(*(_keys(value, free) for key, value in document.items() if key not in free))


def test_a_place_that_cannot_be_reached_is_not_an_empty_one(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("aiohttp")
    for url in ("http://127.0.0.1:9/run", "http://me:hunter2@127.0.0.1:9/run"):
        assert main(["ls", url]) == 2
        told = capsys.readouterr().err
        assert "Cannot connect" in told
        assert "no checkpoints" not in told
        assert "hunter2" not in told
