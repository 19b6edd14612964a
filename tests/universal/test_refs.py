"""Exported references, opened by stock zarr and fsspec in a process in which nothing of ours can be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box
from ckptengine.layout.tensor import Fragment, LogicalTensor
from ckptengine.operations.read import BoxReader
from ckptengine.universal import grid, refs
from ckptengine.universal.refs import refs as make_refs
from tests.universal.checkpoints import FolderSource, content, stored, whole

READER = """
import json, sys, hashlib
sys.modules["ckptengine"] = None  # importing it would fail
import warnings
import fsspec, zarr
warnings.filterwarnings("ignore")
fs = fsspec.filesystem("reference", fo=sys.argv[1], asynchronous=True, remote_options={"asynchronous": True})
group = zarr.open_group(zarr.storage.FsspecStore(fs, read_only=True), mode="r")
found = {}
for path, node in group.members(max_depth=None):
    if isinstance(node, zarr.Array):
        data = node[...]
        found[node.attrs["ckptengine"]["name"]] = [str(data.dtype), list(data.shape), data.tobytes().hex()]
json.dump(found, sys.stdout)
"""


def test_stock_zarr_reads_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refs, "TARGET_BYTES", 256)
    truths = {
        "model.whole": ("bfloat16", (12, 10), [Box.whole((12, 10))]),
        "model.rows": ("float32", (12, 10), [Box((i, 0), (4, 10)) for i in (0, 4, 8)]),
        "model.columns": ("float8_e4m3fn", (12, 10), [Box((0, 0), (12, 5)), Box((0, 5), (12, 5))]),
        "model.uneven": ("int64", (9, 4), [Box((0, 0), (5, 4)), Box((5, 0), (4, 4))]),
        "optim.step": ("float32", (), [Box.whole(())]),
        "model.prime": ("float64", (127, 3), [Box.whole((127, 3))]),
    }
    arrays = {name: content(dtype, shape) for name, (dtype, shape, _) in truths.items()}
    tensors = [stored(tmp_path, name, dtype, arrays[name], boxes) for name, (dtype, _, boxes) in truths.items()]
    transposed = content("float32", (3, 5))
    (tmp_path / "t.bin").write_bytes(np.ascontiguousarray(transposed.T).tobytes())
    tensors.append(LogicalTensor("model.small", "float32", (3, 5), [Fragment(Box.whole((3, 5)), "t.bin", 0, (1, 3))]))
    arrays["model.small"] = transposed
    document = make_refs(FolderSource(tmp_path, tensors), BoxReader)
    data = {key: value for key, value in document["refs"].items() if not key.endswith("zarr.json")}
    assert all(isinstance(value, list) or key == "model/small/c/0/0" for key, value in data.items())
    assert len([key for key in data if key.startswith("model/rows/")]) == 3
    out = tmp_path / "refs.json"
    out.write_text(json.dumps(document))
    done = subprocess.run(
        [sys.executable, "-c", READER, str(out)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == arrays.keys()
    for name, (_, shape, hexed) in found.items():
        assert tuple(shape) == arrays[name].shape
        assert bytes.fromhex(hexed) == arrays[name].tobytes()
    assert found["model.whole"][0] == "uint16"


def test_tensors_that_no_grid_fits_are_named(tmp_path: Path) -> None:
    truth = content("float32", (64, 63))
    good = whole(tmp_path, "model.good", "float32", truth)
    boxes = [Box((0, 0), (3, 63)), Box((3, 0), (1, 7)), Box((3, 7), (1, 56)), Box((4, 0), (60, 63))]
    strided = LogicalTensor("model.bad", "float32", (63, 64), [Fragment(Box.whole((63, 64)), "x", 0, (1, 63))])
    runs = stored(tmp_path, "model.runs", "float32", truth, boxes)
    with pytest.raises(LayoutError, match=r"1 of 3 tensors.*model\.bad.*convert"):
        make_refs(FolderSource(tmp_path, [good, strided, runs]), BoxReader)


@pytest.mark.parametrize("limit", [1, 100, 256, 1 << 20])
def test_contiguous_grids_cut_no_fragment(limit: int) -> None:
    cuts = [
        [Box((i, 0), (6, 10)) for i in (0, 6)],
        [Box((i, j), (6, 5)) for i in (0, 6) for j in (0, 5)],
        [Box((0, 0), (8, 10)), Box((8, 0), (4, 10))],
        [Box((0, 0), (12, 4)), Box((0, 4), (12, 6))],
        [Box((0, 0), (3, 10)), Box((3, 0), (1, 8)), Box((3, 8), (1, 2)), Box((4, 0), (8, 10))],
    ]
    for boxes in cuts:
        tensor = LogicalTensor("w", "float32", (12, 10), [Fragment(box, "f", 0) for box in boxes])
        found = grid.contiguous_grid(tensor, limit)
        assert found is not None
        assert found.contiguous
        for index in np.ndindex(*grid.chunk_counts(found.shape, tensor.shape)):
            box = grid.chunk_box(index, found.shape, tensor.shape)
            assert box.shape == found.shape
            (owner,) = [f for f in tensor.fragments if f.box.intersect(box)]
            assert owner.box.contains(box)
            assert owner.part(box, 4).is_contiguous
