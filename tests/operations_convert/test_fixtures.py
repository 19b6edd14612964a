"""Real checkpoints of the frameworks to zarr, read by stock zarr and held against what the frameworks said."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import zarr

from ckptengine.operations.convert import convert
from ckptengine.operations.diff import diff
from ckptengine.operations.opening import open_any

FIXTURES = Path(__file__).parents[2].parent / "shared" / "fixtures"
TRUTHS = sorted(FIXTURES.glob("*/*/truth.json"))


@pytest.mark.skipif(not TRUTHS, reason="the real checkpoints are not beside the repository")
@pytest.mark.parametrize("truth", TRUTHS, ids=lambda path: path.parent.name)
def test_real_checkpoints_as_zarr(tmp_path: Path, truth: Path) -> None:
    wanted = json.loads(truth.read_text())
    plan = convert(truth.parent / "checkpoint", tmp_path / "out", to="zarr", verify=True)
    assert plan.verified == plan.covered
    group = zarr.open_group(str(tmp_path / "out"), mode="r")
    held = {}
    for _, node in group.members(None):
        if isinstance(node, zarr.Array):
            ours = node.attrs["ckptengine"]
            digest = hashlib.sha256(node[...].tobytes()).hexdigest()
            held[ours["name"]] = (ours["dtype"], list(node.shape), digest)
    aliases = group.attrs["ckptengine"]["aliases"]
    for name, entry in wanted.items():
        found = held[aliases.get(name, name)]
        assert found == (entry["dtype"].removeprefix("torch."), entry["shape"], entry["sha256"]), name
    assert diff(open_any(truth.parent / "checkpoint"), open_any(tmp_path / "out")).same
