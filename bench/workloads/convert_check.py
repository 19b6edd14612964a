"""What a conversion made, read by the target format's own reader and compared bit for bit with the truth.

Our own format has no other reader than ours; DeepSpeed's folders are read by DeepSpeed (weights only: it has no reader
of moments without a training job).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from ..durability import files_under
from ..engine import Unavailable, require

Tensors = Iterator[tuple[str, torch.Tensor]]

WEIGHTS_ONLY = ("fp32 weights", "deepspeed")
"""Targets of which only weights are compared."""


def check(name: str, source: Path, target: Path, truth: Mapping[str, torch.Tensor]) -> str:
    """ "ok", or what differs; "not ..." where nothing here can read the target."""
    kind = name.partition(" -> ")[2]
    if name.startswith("deepspeed") and kind == "universal":
        kind = "deepspeed-universal"
    wanted = {key for key in truth if kind not in WEIGHTS_ONLY or key.endswith(":weight")}
    found: set[str] = set()
    wrong: list[str] = []
    try:
        for written, tensor in READERS[kind](target):
            key = truth_name(written)
            if key in wanted:
                found.add(key)
                if not equal(tensor, truth[key]):
                    wrong.append(key)
    except Unavailable as reason:
        return f"not read back: {reason}"
    missing = sorted(wanted - found)
    if missing:
        return f"MISSING {len(missing)} tensors, first {missing[0]}"
    return f"WRONG BYTES in {len(wrong)} tensors, first {wrong[0]}" if wrong else "ok"


def equal(tensor: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether type, shape and all bits are the same."""
    if (tensor.dtype, tensor.shape) != (truth.dtype, truth.shape):
        return False
    return torch.equal(bits(tensor), bits(truth))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def truth_name(written: str) -> str:
    """The truth's name of a written one: ours of a dict's key, or a parameter's of a model and its optimizer."""
    name = written.replace("\\", "").removeprefix("tensors.")
    if name.endswith((":weight", ":exp_avg", ":exp_avg_sq")):
        return name
    for state in ("exp_avg", "exp_avg_sq"):
        if name.startswith("optim.") and name.endswith(f".{state}"):
            return f"{name.removeprefix('optim.').removeprefix('state.').removesuffix(f'.{state}')}:{state}"
    return f"{name.removeprefix('model.').removeprefix('module.')}:weight"


def _safetensors(target: Path) -> Tensors:
    read: Callable[[Path], dict[str, torch.Tensor]] = require("safetensors.torch", "safetensors").load_file
    for file in files_under(target):
        if file.suffix == ".safetensors":
            yield from read(file).items()


def _zarr(target: Path) -> Tensors:
    group = require("zarr").open_group(str(target), mode="r")
    for _, array in group.members(max_depth=None):
        ours = array.attrs.get("ckptengine", {})
        if hasattr(array, "shape") and "name" in ours:
            whole = array[...] if array.shape else array[()]
            yield ours["name"], torch.as_tensor(whole).view(getattr(torch, ours["dtype"]))


def _dcp(target: Path) -> Tensors:
    recorded = FileSystemReader(target).read_metadata().state_dict_metadata
    empty = {
        key: torch.empty(about.size, dtype=about.properties.dtype)
        for key, about in recorded.items()
        if isinstance(about, TensorStorageMetadata)
    }
    load(empty, checkpoint_id=target, no_dist=True)
    yield from empty.items()


def _native(target: Path) -> Tensors:
    checkpoint = require("ckptengine").open(str(target))
    for name in checkpoint.names():
        yield name, checkpoint.read(name)


def _torch(target: Path) -> Tensors:
    for file in files_under(target):
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
        yield from loaded.get("tensors", loaded).items()


def _fp32(target: Path) -> Tensors:
    """What zero_to_fp32 writes, under its own names: torch files or safetensors."""
    yield from _safetensors(target)
    for file in files_under(target):
        if file.suffix == ".bin":
            yield from torch.load(file, weights_only=True).items()


def _universal(target: Path) -> Tensors:
    kinds = {"fp32.pt": "weight", "exp_avg.pt": "exp_avg", "exp_avg_sq.pt": "exp_avg_sq"}
    for file in files_under(target):
        if file.name in kinds and file.parent.parent.name == "zero":
            loaded = torch.load(file, weights_only=True)
            tensor = loaded["param"] if isinstance(loaded, dict) else loaded
            yield f"{file.parent.name}:{kinds[file.name]}", tensor


def _deepspeed(target: Path) -> Tensors:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    read = require("deepspeed.utils.zero_to_fp32", "deepspeed").get_fp32_state_dict_from_zero_checkpoint
    tags = [folder for folder in target.iterdir() if folder.is_dir()]
    root, tag = (target, tags[0].name) if (target / "latest").exists() else (target.parent, target.name)
    yield from read(str(root), tag=tag).items()


READERS: dict[str, Callable[[Path], Tensors]] = {
    "safetensors": _safetensors,
    "zarr": _zarr,
    "dcp": _dcp,
    "native": _native,
    "torch": _torch,
    "fp32 weights": _fp32,
    "deepspeed": _deepspeed,
    "deepspeed-universal": _universal,
}
