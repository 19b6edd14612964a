"""What another job left on a tier in front of a root is neither restored nor mixed in."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

import ckptengine as ce
from ckptengine.errors import Conflict
from ckptengine.operations.levels.one_run import place_of

from .jobs import folder_of, is_exactly, run_steps, state_of


def train(root: str | Path, tiers: list[str | Path], upto: int, run: str | None = None) -> int:
    """Go on to step ``upto``; what was restored, after a look whether it is exact."""
    state = state_of(0)
    places = [ce.Tier(path) for path in tiers]
    with ce.Checkpointer(state, root, tiers=places, interval=ce.Every(steps=1), run=run, random=False) as checkpointer:
        start = checkpointer.restore() or 0
        assert is_exactly(state, start)
        run_steps(checkpointer, state, range(start + 1, upto + 1))
    return start


def test_a_new_job_does_not_go_on_from_another_s_tier(tmp_path: Path) -> None:
    train(tmp_path / "first", [tmp_path / "disk"], 3)
    with pytest.raises(Conflict, match=r"disk holds step 3 of run .* another job left it there") as refused:
        train(tmp_path / "second", [tmp_path / "disk"], 3)
    assert str(tmp_path / "disk") in str(refused.value)
    assert train(tmp_path / "second", [tmp_path / "other"], 2) == 0
    assert train(tmp_path / "first", [tmp_path / "disk"], 4) == 3, "nothing was changed, and the lock was let go"


def test_checkpoints_of_the_same_number_are_told_apart(tmp_path: Path) -> None:
    """Step, attempt and save are equal: by these alone one would be taken for the other."""
    for name in ("a", "b"):
        train(tmp_path / name, [tmp_path / f"{name}-disk"], 3)
    with pytest.raises(Conflict):
        train(tmp_path / "a", [tmp_path / "b-disk"], 4)
    assert train(tmp_path / "a", [tmp_path / "a-disk"], 4) == 3


def test_host_memory_and_second_tiers_too(tmp_path: Path, memory: str) -> None:
    train(tmp_path / "first", [memory, tmp_path / "disk"], 3)
    with pytest.raises(Conflict, match=folder_of(memory).name):
        train(tmp_path / "second", [memory, tmp_path / "new"], 3)
    with pytest.raises(Conflict, match="disk"):
        train(tmp_path / "second", [tmp_path / "new", tmp_path / "disk"], 3)
    shutil.rmtree(folder_of(memory))
    assert train(tmp_path / "second", [memory, tmp_path / "new"], 1) == 0


def test_what_was_copied_together_with_its_root_is_known(tmp_path: Path) -> None:
    train(tmp_path / "root", [tmp_path / "disk"], 3)
    for name in ("root", "disk"):
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-moved")
    assert train(tmp_path / "root-moved", [tmp_path / "disk-moved"], 4) == 3


def test_a_root_whose_records_are_damaged_is_no_reason_to_refuse(tmp_path: Path) -> None:
    train(tmp_path / "root", [tmp_path / "disk"], 3)
    for path in (tmp_path / "root" / "attempts").glob("*.0.json"):
        path.write_bytes(b"rubbish")
    assert train(tmp_path / "root", [tmp_path / "disk"], 4) == 3


def empty(root: Path) -> None:
    for inside in root.iterdir():
        shutil.rmtree(inside) if inside.is_dir() else inside.unlink()


@pytest.mark.parametrize("lose", [shutil.rmtree, empty])
def test_a_root_that_was_lost_is_filled_again_from_its_tier(
    tmp_path: Path, lose: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "root"
    train(root, [tmp_path / "disk"], 3)
    lose(root)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, "ckptengine"):
        assert train(Path("link/root"), [tmp_path / "disk"], 3) == 3, "the same root, by another name"
    assert "holds nothing, it was emptied or lost" in caplog.text
    assert ce.steps(root) == [3]
    shutil.rmtree(tmp_path / "disk")
    assert train(root, [tmp_path / "disk"], 4) == 3, "all of it has come to the root again"
    shutil.rmtree(root)
    assert train(root, [tmp_path / "disk"], 4) == 4, "and again"


def test_a_remote_root_that_was_lost(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    name = uuid.uuid4().hex
    train(f"memory://{name}/run", [tmp_path / "disk"], 3)
    fsspec.filesystem("memory").rm(f"/{name}", recursive=True)
    assert train(f"memory://{name}/run/", [tmp_path / "disk"], 4) == 3
    with pytest.raises(Conflict):
        train(f"memory://{name}/other", [tmp_path / "disk"], 4)


def test_a_root_that_takes_the_place_of_a_lost_one_says_so(tmp_path: Path) -> None:
    train(tmp_path / "root", [tmp_path / "disk"], 3, run="gpt")
    (tmp_path / "root").rename(tmp_path / "lost")
    with pytest.raises(Conflict, match=r"say so: run='gpt'") as refused:
        train(tmp_path / "new", [tmp_path / "disk"], 4)
    assert str(tmp_path / "root") in str(refused.value), "for which root it was saved"
    with pytest.raises(Conflict, match="run 'gpt'"):
        train(tmp_path / "new", [tmp_path / "disk"], 4, run="bert")
    assert train(tmp_path / "new", [tmp_path / "disk"], 4, run="gpt") == 3
    assert train(tmp_path / "new", [tmp_path / "disk"], 5) == 4, "from then on it is the root"


def test_a_new_run_does_not_go_on_from_what_an_emptied_root_has_left(tmp_path: Path) -> None:
    train(tmp_path / "root", [tmp_path / "disk"], 3, run="first")
    shutil.rmtree(tmp_path / "root")
    with pytest.raises(Conflict, match="step 3 of run 'first'"):
        train(tmp_path / "root", [tmp_path / "disk"], 3, run="second")
    assert train(tmp_path / "root", [tmp_path / "other"], 3, run="second") == 0


@pytest.mark.parametrize("number", [1, 2])
def test_runs_of_one_name_are_told_apart(tmp_path: Path, number: int) -> None:
    """Both were given the same ``run=``; steps, attempts and saves are equal too, or those of the tier go further."""
    for name, times in (("a", number), ("b", 1)):
        for _ in range(times):
            train(tmp_path / name, [tmp_path / f"{name}-disk"], 1 + times, run="gpt")
            train(tmp_path / name, [tmp_path / f"{name}-disk"], 2 + times, run="gpt")
    with pytest.raises(Conflict, match="another job left it"):
        train(tmp_path / "b", [tmp_path / "a-disk"], 6, run="gpt")
    assert train(tmp_path / "b", [tmp_path / "b-disk"], 4, run="gpt") == 3


def test_records_alone_of_another_job_hide_nothing(tmp_path: Path) -> None:
    """Somebody has removed the steps that were in the way, and only those."""
    train(tmp_path / "first", [tmp_path / "disk"], 3)
    train(tmp_path / "first", [tmp_path / "disk"], 4)
    train(tmp_path / "second", [tmp_path / "other"], 2)
    for folder in (tmp_path / "disk").glob("step-*"):
        shutil.rmtree(folder)
    with pytest.raises(Conflict, match="disk holds records of run"):
        train(tmp_path / "second", [tmp_path / "disk"], 3)


def test_a_root_that_was_put_back_as_it_was_some_time_ago(tmp_path: Path) -> None:
    train(tmp_path / "root", [tmp_path / "disk"], 2)
    shutil.copytree(tmp_path / "root", tmp_path / "backup")
    train(tmp_path / "root", [tmp_path / "disk"], 4)
    shutil.rmtree(tmp_path / "root")
    (tmp_path / "backup").rename(tmp_path / "root")
    assert train(tmp_path / "root", [tmp_path / "disk"], 5) == 4


def test_tiers_of_several_runs_behind_which_nothing_is_left(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(tmp_path / "root", [tmp_path / name], 2, run=name)
        shutil.rmtree(tmp_path / "root")
    with pytest.raises(Conflict, match="of several runs"):
        train(tmp_path / "root", [tmp_path / "a", tmp_path / "b"], 3)
    shutil.rmtree(tmp_path / "b")
    assert train(tmp_path / "root", [tmp_path / "a", tmp_path / "b"], 3) == 2


def test_another_run_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    ce.Checkpointer({"a": 1}, tmp_path, run="one").save(1).result(20)
    with pytest.raises(Conflict, match="holds checkpoints of run 'one', not of 'two'"):
        ce.Checkpointer({"a": 1}, tmp_path, run="two")
    with ce.Checkpointer({"a": 1}, tmp_path, run="one") as checkpointer:
        assert checkpointer.restore() == 1, "and the lock was let go"


def test_no_credentials_are_recorded(tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    root = f"memory://user:hunter2@{uuid.uuid4().hex}/run"
    train(root, [tmp_path / "disk"], 1)
    found = [path.read_bytes() for path in (tmp_path / "disk" / "attempts").iterdir()]
    assert any(place_of(ce.Tier(root)).encode() in data for data in found)
    assert not any(b"hunter" in data for data in found)
    assert place_of(ce.Tier("s3://KEY:hunter2@bucket/run/?token=hunter3")) == "s3://bucket/run"
