"""Write safetensors as Hugging Face does: ``model.safetensors``, or shards with an index.

What lies under ``model.`` is written under its own name, as transformers loads it.  Everything else (masters, moments,
counters) goes beside it into ``state*.safetensors`` under canonical names, and values, step and ties into
``ckptengine.json``; other tools ignore these.

A target whose name ends in ``.safetensors`` is one file, which holds weights and nothing else.

Options: ``shard_bytes`` (default 5,000,000,000: the most data in one file), ``weights_only`` (default False: leave out
everything that is not under ``model.``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from ckptengine.errors import UnusableRequest
from ckptengine.layout.box import Box
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.jsonvalues import to_json
from ckptengine.sources.safetensors.header import DTYPES
from ckptengine.sources.safetensors.source import INDEX_SUFFIX, OWN_FILE, OWN_KEY, SUFFIX
from ckptengine.sources.stream import group_by_size, stream_boxes, stream_memory_bytes
from ckptengine.sources.typed import plain_values
from ckptengine.sources.writer import Document, Job, Target, Unit

SHARD_BYTES = 5_000_000_000
VERSION = 1
_NAMES = {dtype: kind for kind, dtype in DTYPES.items()}
_WEIGHTS = "model."
_PAGE_BYTES = 4096
_LARGE_BYTES = 16 << 20
"""From this much data on, it begins at a page: so it can be written without a copy."""

_CONFIGURATIONS = ("config", "generation_config", "adapter_config")


class SafetensorsWriter:
    """The writer of ``--to safetensors``."""

    format = "safetensors"
    options = ("shard_bytes", "weights_only")
    ranked = False

    def file(self, target_name: str) -> str | None:
        """A target named like a safetensors file is that file."""
        return f"model{SUFFIX}" if target_name.endswith(SUFFIX) else None

    def units(self, job: Job) -> Sequence[Unit]:
        """One unit per file."""
        if self.file(job.target_name) is not None:
            _check_fits_one_file(job)
        unfit = [name for name in _wanted(job) if job.tensor(name).dtype not in _NAMES]
        if unfit:
            raise UnusableRequest(
                f"safetensors has no {job.tensor(unfit[0]).dtype} (tensor {unfit[0]!r}"
                + (f" and {len(unfit) - 1} more" if len(unfit) > 1 else "")
                + "); convert to torch, dcp or native instead"
                + ("" if unfit[0].startswith(_WEIGHTS) else ", or leave it out with --option weights_only=true")
            )
        return [_unit(job, path, names) for path, names in _shards(job).items()]

    def write(self, job: Job, unit: Unit, target: Target) -> Document:
        """One file, streamed in the order of its header."""
        own = not unit.key.startswith("model")
        header, order = _header(job, unit.tensors, own)
        with target.create(unit.key) as sink:
            sink.write(header)
            boxes = [(name, Box.whole(job.tensor(name).shape)) for name in order]
            stream_boxes(job, boxes, sink.write, lambda number: None)
        return {}

    def finish(self, job: Job, results: Mapping[str, Document], target: Target) -> None:
        """The index, the model's configuration where the source has one, and what only we read."""
        if self.file(job.target_name) is not None:
            return  # a file has nothing beside it
        shards = {path: names for path, names in _shards(job).items() if path.startswith("model")}
        if len(shards) > 1:
            total = sum(job.tensor(name).nbytes for names in shards.values() for name in names)
            index = {name.removeprefix(_WEIGHTS): path for path, names in shards.items() for name in names}
            _write_json(target, "model" + INDEX_SUFFIX, {"metadata": {"total_size": total}, "weight_map": index})
        plain = plain_values(job)
        values = plain if isinstance(plain, dict) else {}
        for name in _CONFIGURATIONS:
            if isinstance(values.get(name), dict):
                _write_json(target, f"{name}.json", to_json(values[name]))
        written = set(_wanted(job))
        own = {
            "version": VERSION,
            "step": job.step,
            "metrics": to_json(dict(job.metrics), "metrics"),
            "aliases": {alias: name for alias, name in job.aliases.items() if name in written},
            "values": to_json(plain),
            "state": [path for path in _shards(job) if not path.startswith("model")],
            "digests": dict(job.digests),
            "provenance": dict(job.provenance),
        }
        _write_json(target, OWN_FILE, own)


def _write_json(target: Target, path: str, document: object) -> None:
    with target.create(path) as sink:
        sink.write(json.dumps(document, indent=2).encode())


def _wanted(job: Job) -> list[str]:
    """Names that are written: every tensor once, without its aliases."""
    only = job.flag("weights_only")
    return [name for name in job.names if name not in job.aliases and (name.startswith(_WEIGHTS) or not only)]


def _check_fits_one_file(job: Job) -> None:
    """`UnusableRequest` where a single file would leave something out, or hold nothing."""
    other = [name for name in _wanted(job) if not name.startswith(_WEIGHTS)]
    if other:
        raise UnusableRequest(
            f"{job.target_name} is one file of weights, and {other[0]!r} is none ({len(other)} in all); leave out what "
            "is none with --option weights_only=true, or name a folder"
        )
    if "shard_bytes" in job.options:
        raise UnusableRequest(f"{job.target_name} is one file; leave shard_bytes out, or name a folder")
    if not _wanted(job):
        raise UnusableRequest(f"the source holds no weights to write into {job.target_name}; name a folder")


def _shards(job: Job) -> dict[str, list[str]]:
    """The names in each file."""
    most = job.options.get("shard_bytes", SHARD_BYTES)
    if type(most) is not int or most <= 0:
        raise UnusableRequest(f"option shard_bytes must be a positive number of bytes, not {most!r}")
    wanted = _wanted(job)
    if job.target_name.endswith(SUFFIX):
        return {f"model{SUFFIX}": wanted}
    found: dict[str, list[str]] = {}
    for stem, names in (
        ("model", [name for name in wanted if name.startswith(_WEIGHTS)]),
        ("state", [name for name in wanted if not name.startswith(_WEIGHTS)]),
    ):
        groups = group_by_size(names, lambda name: job.tensor(name).nbytes, most)
        for number, group in enumerate(groups, 1):
            found[f"{stem}{SUFFIX}" if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}{SUFFIX}"] = (
                group
            )
    return found


def _unit(job: Job, path: str, names: Sequence[str]) -> Unit:
    nbytes = sum(job.tensor(name).nbytes for name in names)
    header, _ = _header(job, names, not path.startswith("model"))
    return Unit(path, tuple(names), nbytes, nbytes + len(header), stream_memory_bytes(job), (path,))


def _header(job: Job, names: Sequence[str], own: bool) -> tuple[bytes, list[str]]:
    """The bytes before the data, and the order of the data: wide elements first, so that all are aligned."""
    tensors = {name: job.tensor(name) for name in names}
    order = sorted(names, key=lambda name: (-_width(tensors[name]), name))
    document: dict[str, object] = {"__metadata__": {"format": "pt", OWN_KEY: str(VERSION)} if own else {"format": "pt"}}
    position = 0
    for name in order:
        tensor = tensors[name]
        shape = list(tensor.shape)
        if tensor.dtype == "float4_e2m1fn_x2" and shape:
            shape[-1] *= 2
        end = position + tensor.nbytes
        stored = name if own else name.removeprefix(_WEIGHTS)
        document[stored] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % (_PAGE_BYTES if position >= _LARGE_BYTES else 8))
    return len(text).to_bytes(8, "little") + text, order


def _width(tensor: LogicalTensor) -> int:
    return tensor.nbytes // math.prod(tensor.shape) if tensor.size else 1


WRITER = SafetensorsWriter
