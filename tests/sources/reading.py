"""Reads any source by walking its fragments one element run at a time, beside every planner."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.port import Files, Source

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"


def read_bytes(files: Files, tensor: LogicalTensor) -> bytes:
    """The row-major bytes of a tensor; fails when its fragments overlap or leave a gap."""
    width = itemsize(tensor.dtype)
    out = np.zeros(tensor.shape, np.dtype((np.void, width)))
    hits = np.zeros(tensor.shape, np.int8)
    for fragment in tensor.fragments:
        window = tuple(slice(a, a + n) for a, n in zip(fragment.box.offsets, fragment.box.shape, strict=True))
        span = files.read(fragment.file, fragment.offset, fragment.span_elements() * width)
        raw = np.frombuffer(span, np.dtype((np.void, width)))
        if fragment.strides is None:
            part = raw.reshape(fragment.box.shape)
        else:
            strides = tuple(stride * width for stride in fragment.strides)
            part = np.lib.stride_tricks.as_strided(raw, fragment.box.shape, strides)
        out[window] = part
        hits[window] += 1
    assert (hits == 1).all(), f"{tensor.name} is not covered exactly once"
    return out.tobytes()


def compare(source: Source, truth: dict[str, tuple[str, list[int], str]], *, exact: bool = True) -> None:
    """Every tensor of the truth (name -> dtype, shape, SHA-256) is in the source, bit for bit."""
    names = set(source.names())
    missing = sorted(set(truth) - names)
    assert not missing, f"missing {missing[:5]} of {len(missing)}; the source has {sorted(names)[:5]}"
    if exact:
        assert not names - set(truth), f"not in the truth: {sorted(names - set(truth))[:5]}"
    for name, (dtype, shape, digest) in truth.items():
        tensor = source.tensor(name)
        assert (tensor.dtype, list(tensor.shape)) == (dtype, list(shape)), name
        assert hashlib.sha256(read_bytes(source.files, tensor)).hexdigest() == digest, name


def truth_of_json(path: Path) -> dict[str, tuple[str, list[int], str]]:
    """The truth beside a fixture."""
    document = json.loads(path.read_text())
    return {name: (t["dtype"].removeprefix("torch."), t["shape"], t["sha256"]) for name, t in document.items()}


def truth_of_safetensors(path: Path) -> dict[str, tuple[str, list[int], str]]:
    """The truth beside a checkpoint written by one of the make_*.py scripts."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    dtypes = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "F64": "float64", "I32": "int32"}
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (8 + length + at for at in entry["data_offsets"])
            digest = hashlib.sha256(data[start:stop]).hexdigest()
            found[name] = (dtypes[entry["dtype"]], entry["shape"], digest)
    return found
