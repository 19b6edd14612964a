"""Finding what lies at a path: formats, steps, single files, URLs."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save, save_file

from ckptengine.errors import CheckpointError, NotFound, UnreadableFormat, UnusableRequest
from ckptengine.sources.detect import open_source, split_step
from ckptengine.sources.files import open_files
from ckptengine.sources.target import RemoteTarget

from .trees import counting, holds


def step_folder(folder: Path, value: int) -> None:
    folder.mkdir(parents=True)
    save_file({"a": counting(3, start=value)}, folder / "model.safetensors")


@pytest.mark.parametrize("pattern", ["checkpoint-{}", "step-{:09d}", "step{}", "global_step{}", "iter_{:07d}"])
def test_folders_of_steps(tmp_path: Path, pattern: str) -> None:
    for step in (2, 10, 9):
        step_folder(tmp_path / pattern.format(step), step)
    (tmp_path / "runs").mkdir()
    for path, step in ((str(tmp_path), 10), (f"{tmp_path}@9", 9), (f"{tmp_path}@latest", 10)):
        source = open_source(path)
        assert source.step == step
        holds(source, {"model.a": counting(3, start=step)})
    assert open_source(tmp_path, 2).step == 2
    with pytest.raises(NotFound, match="no step 3; the last ones are 2, 9, 10"):
        open_source(f"{tmp_path}@3")


def test_a_folder_around_a_checkpoint_says_where_it_is(tmp_path: Path) -> None:
    step_folder(tmp_path / "weights", 1)
    (tmp_path / "context").mkdir()
    with pytest.raises(UnreadableFormat, match=r"it has context/, weights/; open one of its folders: weights/ \(safe"):
        open_source(tmp_path)
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(UnreadableFormat, match=r"\.metadata .*: that save was not finished"):
        open_source(tmp_path)


def test_latest_files_decide(tmp_path: Path) -> None:
    for step in (1, 2):
        step_folder(tmp_path / f"global_step{step}", step)
    (tmp_path / "latest").write_text("global_step1")
    assert open_source(tmp_path).step == 1
    assert open_source(tmp_path, 2).step == 2
    (tmp_path / "latest").write_text("global_step7")
    with pytest.raises(NotFound, match="global_step7"):
        open_source(tmp_path)
    (tmp_path / "latest").write_text("../x")
    with pytest.raises(NotFound, match="which does not exist"):
        open_source(tmp_path)
    (tmp_path / "latest").unlink()
    step_folder(tmp_path / "iter_0000003", 3)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3\n")
    assert open_source(tmp_path).step == 3


def test_an_at_sign_in_a_name_is_a_name(tmp_path: Path) -> None:
    step_folder(tmp_path / "run@5", 1)
    holds(open_source(tmp_path / "run@5"), {"model.a": counting(3, start=1)})
    torch.save({"b": counting(2)}, tmp_path / "me@home.pt")
    holds(open_source(tmp_path / "me@home.pt"), {"model.b": counting(2)})
    assert split_step("a@b@7") == ("a@b", 7, True)
    assert split_step("a@7b") == ("a@7b", None, False)


@pytest.mark.parametrize("path", ["nothing", "nothing@5", "nothing@latest"])
def test_nothing_there(tmp_path: Path, path: str) -> None:
    with pytest.raises(NotFound, match=r"no checkpoint at .*nothing"):
        open_source(tmp_path / path)


def test_unknown_content(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFormat, match="it has nothing"):
        open_source(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UnreadableFormat, match=r"it has notes\.txt"):
        open_source(tmp_path)
    with pytest.raises(UnreadableFormat, match=r"notes\.txt is no checkpoint"):
        open_source(tmp_path / "notes.txt")


def test_a_linked_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "links").mkdir()
    save_file({"a": counting(3)}, tmp_path / "blobs" / "data")
    (tmp_path / "links" / "x.safetensors").symlink_to("../blobs/data")
    holds(open_source(tmp_path / "links" / "x.safetensors"), {"model.a": counting(3)})


def test_urls(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    system.pipe_file(f"{root}/run/step-5/model.safetensors", save({"a": counting(3)}))
    for path in ("run", "run@5", "run/step-5", "run/step-5/model.safetensors"):
        holds(open_source(f"memory:/{root}/{path}"), {"model.a": counting(3)})
    with pytest.raises(NotFound, match="nothing"):
        open_source(f"memory:/{root}/nothing")
    with pytest.raises(CheckpointError):
        open_source("no-such-protocol://x/y")
    step_folder(tmp_path / "step-1", 1)
    assert open_source(f"file://{tmp_path}@1").step == 1


def test_a_step_that_a_single_checkpoint_is_not(tmp_path: Path) -> None:
    """It was opened all the same, and said to be of the step that was asked for."""
    save_file({"a": counting(3)}, tmp_path / "model.safetensors")
    torch.save({"b": counting(2)}, tmp_path / "b.pt")
    for path in (tmp_path, tmp_path / "b.pt"):
        assert open_source(path).step is None
        for asked in (lambda path=path: open_source(f"{path}@5"), lambda path=path: open_source(path, 5)):
            with pytest.raises(NotFound, match="does not say which step it is, and not step 5; leave the step out"):
                asked()
    torch.save(
        {"state_dict": {"w": counting(2)}, "global_step": 7, "pytorch-lightning_version": "2"}, tmp_path / "l.ckpt"
    )
    assert open_source(tmp_path / "l.ckpt", 7).step == 7
    with pytest.raises(NotFound, match=r"l\.ckpt is one checkpoint, which is of step 7, and not step 5"):
        open_source(tmp_path / "l.ckpt", 5)


def test_protocols_that_nobody_knows(tmp_path: Path) -> None:
    """Reading and writing say so in the same words."""
    for url in ("nope://x", "simplecache::nope://x"):
        for opened in (open_files, RemoteTarget.from_url):
            with pytest.raises(UnusableRequest, match=r"nope://x: fsspec knows no protocol 'nope'"):
                opened(url)
