"""Conversions of what changes under them, and requests that a format would take no notice of."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ckptengine.cli import main as command
from ckptengine.errors import Damaged, RuleError, StorageFailed, UnusableRequest
from ckptengine.operations.convert import convert
from ckptengine.operations.converting import workspace as convert_workspace
from ckptengine.operations.converting.plan import make_plan
from ckptengine.operations.opening import open_any
from ckptengine.sources.port import Source
from ckptengine.sources.writer import Layout
from ckptengine.universal.write import ZarrWriter

from .test_convert import checkpoint, left_beside

MEGATRON = Path(__file__).parents[1] / "sources" / "data" / "megatron.tar.xz"


def fingerprint(source: Source, rules: Path | None = None) -> str:
    return make_plan(source, "out", to="zarr", rules=rules).fingerprint


def test_edited_rules_are_another_conversion(tmp_path: Path) -> None:
    """Otherwise one that was killed would go on, half of it under the rules as they were."""
    checkpoint(tmp_path / "in")
    convert(checkpoint(tmp_path / "in")[0], tmp_path / "stored", to="safetensors")
    base, rules = tmp_path / "base.toml", tmp_path / "rules.toml"
    text = "version = 1\n[[rule]]\nmatch = 'layers\\.0\\.weight'\nregroup = { parts = [1, 1], from = %d, to = 1 }\n"
    base.write_text(text % 5)
    rules.write_text("version = 1\nextends = 'base.toml'")
    first = fingerprint(open_any(tmp_path / "stored", None, rules), rules)
    assert fingerprint(open_any(tmp_path / "stored", None, rules), rules) == first
    base.write_text(text % 25)
    assert fingerprint(open_any(tmp_path / "stored", None, rules), rules) != first


def test_every_file_of_the_source_counts(tmp_path: Path) -> None:
    """Not only those in which tensors begin."""
    convert(checkpoint(tmp_path / "in")[0], tmp_path / "stored", to="dcp", layout="dp=2")
    source = open_any(tmp_path / "stored")
    files = {fragment.file for name in source.names() for fragment in source.tensor(name).fragments}
    assert len(files) == 2
    first = fingerprint(source)
    for file in files:
        os.utime(tmp_path / "stored" / file, ns=(1, 1))
        changed = fingerprint(open_any(tmp_path / "stored"))
        assert changed != first, file
        first = changed


@pytest.mark.parametrize("how", ["written", "removed"])
def test_a_source_that_changes_while_it_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    convert(checkpoint(tmp_path / "in")[0], tmp_path / "stored", to="torch")
    file = tmp_path / "stored" / "checkpoint.pt"
    real = ZarrWriter.write

    def changing(*arguments: Any) -> Any:
        made = real(*arguments)
        if how == "removed":
            file.unlink()
        else:
            os.utime(file, ns=(1, 1))
        return made

    monkeypatch.setattr(ZarrWriter, "write", changing)
    with pytest.raises(Damaged, match=r"checkpoint\.pt was changed while it was converted; nothing was kept"):
        convert(tmp_path / "stored", tmp_path / "out", to="zarr")
    assert left_beside(tmp_path) == ["in", "stored"]


@pytest.mark.parametrize(
    ("to", "option"), [("safetensors", "weights_only"), ("torch", "weights_only"), ("megatron", "legacy")]
)
def test_what_is_true_or_false_is_nothing_else(tmp_path: Path, to: str, option: str) -> None:
    """`weights_only=no` left out what was to be kept."""
    source, _ = checkpoint(tmp_path / "in")
    with pytest.raises(UnusableRequest, match=f"option {option} = 'no' is neither true nor false"):
        convert(source, tmp_path / "out", to=to, options={option: "no"})


@pytest.mark.parametrize("to", ["native", "zarr", "safetensors", "torch"])
def test_layouts_for_formats_that_have_none(tmp_path: Path, to: str) -> None:
    source, arrays = checkpoint(tmp_path / "in")
    for layout in ("tp=2", "zero=3", "cp=2"):
        with pytest.raises(UnusableRequest, match=f"{to} holds whole tensors.* leave --layout out"):
            convert(source, tmp_path / "out", to=to, layout=layout)
    assert convert(source, tmp_path / "out", to=to, layout=Layout(), dry_run=True).tensors == len(arrays)


def test_rules_of_a_target_may_be_given_as_a_path(tmp_path: Path) -> None:
    """They were taken as if none had been given, and the preset's cut was written."""
    with tarfile.open(MEGATRON) as tar:
        tar.extractall(tmp_path, filter="data")
    source = open_any(tmp_path / "legacy_tp2_pp2" / "checkpoint", None, "megatron-gpt")
    rules = tmp_path / "rules.toml"
    for parts, said in (("[0]", "have widths []"), ("[-1, 2]", "have widths [-1, 2]")):
        text = f"version = 1\noptional = true\n[[rule]]\nmatch = '.*linear_qkv.weight'\nshard = 0\nparts = {parts}"
        rules.write_text(text)
        with pytest.raises(RuleError) as caught:
            convert(source, tmp_path / "out", to="megatron", layout="tp=2", options={"legacy": True}, rules=rules)
        assert said in str(caught.value)


@pytest.mark.parametrize("text", ["version = 1\nx = 1", "version = 1\n[[rule]]\nmatch = 'zz'\nrename = 'a'"])
@pytest.mark.parametrize("verb", ["show", "verify", "diff", "convert"])
def test_wrong_rules_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, text: str
) -> None:
    convert(checkpoint(tmp_path / "in")[0], tmp_path / "stored", to="torch")
    rules = tmp_path / "rules.toml"
    rules.write_text(text)
    stored = str(tmp_path / "stored")
    rest = {"diff": [stored], "convert": [str(tmp_path / "out"), "--to", "native"]}.get(verb, [])
    capsys.readouterr()
    assert command([verb, stored, *rest, "--rules", str(rules)]) == 2
    told = capsys.readouterr()
    assert "rules.toml" in told.err
    assert told.err.count("\n") == 1
    assert left_beside(tmp_path) == ["in", "rules.toml", "stored"]


def test_a_disk_that_is_full_from_the_start_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = checkpoint(tmp_path / "in")

    def full(*_: object) -> None:
        raise StorageFailed("no space left")

    monkeypatch.setattr(convert_workspace, "_store", full)
    with pytest.raises(StorageFailed):
        convert(source, tmp_path / "out", to="zarr")
    assert left_beside(tmp_path) == ["in"]
    (tmp_path / ".out.convert").mkdir()  # what another process has begun is not ours to remove
    with pytest.raises(StorageFailed):
        convert(source, tmp_path / "out", to="zarr")
    assert left_beside(tmp_path) == [".out.convert", "in"]


def test_a_target_whose_name_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(UnusableRequest, match="cannot be a target"):
        convert(checkpoint(tmp_path / "in")[0], tmp_path / "a\0b", to="zarr")
