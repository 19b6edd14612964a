"""Write one file of torch.save, which ``torch.load(weights_only=True)`` loads.

The file holds what the source held, nested as it was.  Where the source does not say how, the first part of a tensor's
name is a key and the rest a key of the dict under it, so that ``load_state_dict(file["model"])`` works.  An optimizer
whose groups are among the values is written as torch's own optimizers give themselves, parameters numbered, with their
names under ``param_names``.  Values that torch would refuse to load are an error; numpy arrays become lists, small
tensors among the values are tensors again.

Options: ``weights_only`` (default False): only what lies under ``model.``, as a plain state dict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ckptengine.errors import UnsupportedValue
from ckptengine.layout.box import Box, row_major_strides
from ckptengine.layout.dtypes import itemsize
from ckptengine.sources.emit import Tensor, dumps, storage_of
from ckptengine.sources.nesting import put_tensors
from ckptengine.sources.optimizers import FLAT_STATE, Optimizer, optimizers_in, split_names
from ckptengine.sources.smalltensors import as_stored
from ckptengine.sources.stream import stream_boxes, stream_memory_bytes
from ckptengine.sources.torchfile.source import OWN_RECORD, SUFFIXES
from ckptengine.sources.typed import plain_values
from ckptengine.sources.writer import Document, Job, Target, Unit
from ckptengine.sources.zipwriter import ALIGNMENT, ZipWriter, zip_bytes

FILE = "checkpoint.pt"
VERSION = 1
MAX_ARRAY_ITEMS = 1 << 20
_WEIGHTS = "model."


class TorchWriter:
    """The writer of ``--to torch``."""

    format = "torch"
    options = ("weights_only",)
    ranked = False

    def file(self, target_name: str) -> str | None:
        """A target named like a file of torch.save is that file."""
        return FILE if target_name.endswith(SUFFIXES) else None

    def units(self, job: Job) -> Sequence[Unit]:
        """One: the format is one file, written from its first byte to its last."""
        names = _stored(job)
        nbytes = [job.tensor(name).nbytes for name in names]
        records, small = _records(job, names)
        sizes = [*map(len, records.values()), *nbytes, *map(len, small)]
        size = zip_bytes([*records, *(f"data/{i}" for i in range(len(names) + len(small)))], sizes)
        return [Unit(FILE, tuple(names), sum(nbytes), size, stream_memory_bytes(job), (FILE,))]

    def write(self, job: Job, unit: Unit, target: Target) -> Document:
        """The whole file."""
        names = _stored(job)
        with target.create(FILE) as sink:
            zipped = ZipWriter(sink)
            records, small = _records(job, names)
            for name, data in records.items():
                zipped.add(name, data)
            boxes = [(name, Box.whole(job.tensor(name).shape)) for name in names]
            stream_boxes(job, boxes, zipped.write, lambda number: zipped.begin(f"data/{number}"))
            for number, data in enumerate(small, len(names)):
                zipped.add(f"data/{number}", data)
            zipped.finish()
        return {}

    def finish(self, job: Job, results: Mapping[str, Document], target: Target) -> None:
        """Nothing is left: the file is whole."""


def _stored(job: Job) -> list[str]:
    """The names whose bytes are written, in the order of their storages."""
    only = job.flag("weights_only")
    return [name for name in job.names if name not in job.aliases and (not only or name.startswith(_WEIGHTS))]


def _records(job: Job, names: Sequence[str]) -> tuple[dict[str, bytes], list[bytes]]:
    """Everything but tensor data, and the storages of the small tensors that are among the values."""
    small: list[bytes] = []
    tensors = {name: _tensor(job, name, number) for number, name in enumerate(names)}
    tensors |= {alias: tensors[name] for alias, name in job.aliases.items() if name in tensors}
    if job.flag("weights_only"):
        root: dict[Any, Any] | list[Any] = {name.removeprefix(_WEIGHTS): tensor for name, tensor in tensors.items()}
    else:
        values, small = as_stored(plain_values(job), len(names))
        root = _nested(job, _loadable(values, "values"), tensors)
    records = {
        "data.pkl": dumps(root),
        ".format_version": b"1",
        ".storage_alignment": str(ALIGNMENT).encode(),
        "byteorder": b"little",
        "version": b"3\n",
    }
    if not job.flag("weights_only"):
        own = {"version": VERSION, "step": job.step, "tensors": len(names), "provenance": dict(job.provenance)}
        records[OWN_RECORD] = json.dumps(own).encode()
    return records, small


def _tensor(job: Job, name: str, number: int) -> Tensor:
    tensor = job.tensor(name)
    storage = storage_of(str(number), tensor.dtype, tensor.nbytes, itemsize(tensor.dtype))
    return Tensor(storage, tensor.dtype, tensor.shape, row_major_strides(tensor.shape))


def _nested(job: Job, values: Any, tensors: Mapping[str, Tensor]) -> dict[Any, Any] | list[Any]:
    root = values if isinstance(values, dict | list) else {} if values is None else {"values": values}
    found = optimizers_in(root)
    states = split_names(tensors, found)
    for optimizer in found:
        _set(root, optimizer.path, _torch_form(optimizer, root, tensors, states))
    put_tensors(job, root, {name: tensor for name, tensor in tensors.items() if name not in states})
    return root


def _torch_form(
    optimizer: Optimizer,
    root: dict[Any, Any] | list[Any],
    tensors: Mapping[str, Tensor],
    states: Mapping[str, tuple[Optimizer, str, str]],
) -> dict[Any, Any]:
    """An optimizer's state dict as torch gives it: parameters by number, their names beside them; or flattened."""
    node: Any = root
    for key in optimizer.path:
        node = node[key]
    own = {(parameter, kind): tensors[n] for n, (owner, parameter, kind) in states.items() if owner is optimizer}
    if optimizer.flat:
        return {**node, **{f"{FLAT_STATE}{parameter}.{kind}": tensor for (parameter, kind), tensor in own.items()}}
    numbers = {name: number for number, name in enumerate(optimizer.parameters)}
    rest = node.get("state")
    state: dict[Any, Any] = {
        numbers.get(str(key), key): dict(parts) for key, parts in (rest if isinstance(rest, dict) else {}).items()
    }
    for (parameter, kind), tensor in own.items():
        state.setdefault(numbers.get(parameter, parameter), {})[kind] = tensor
    groups = []
    for group in optimizer.groups:
        params = [str(name) for name in group["params"]]
        unnamed = all(name.isdigit() for name in params)
        names = {} if unnamed else {"param_names": params}
        groups.append({**group, "params": [numbers[name] for name in params], **names})
    return {**node, "state": state, "param_groups": groups}


def _set(root: Any, path: Sequence[str | int], value: object) -> None:
    for key in path[:-1]:
        root = root[key]
    root[path[-1]] = value


def _loadable(value: object, name: str) -> Any:
    """A copy of plain values in which numpy arrays are lists."""
    if isinstance(value, np.ndarray):
        if value.size > MAX_ARRAY_ITEMS:
            raise UnsupportedValue(
                f"{name}: an array of {value.size} numbers has no form that torch.load(weights_only=True) accepts; "
                "convert to native or zarr, or save it as a tensor"
            )
        return value.tolist()
    if isinstance(value, dict):
        return {key: _loadable(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_loadable(item, f"{name}[{number}]") for number, item in enumerate(value))
    return value


WRITER = TorchWriter
