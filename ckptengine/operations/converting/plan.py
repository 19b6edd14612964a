"""What a conversion will do, as data: the units of its writer, their cost, and the proof that the source is whole."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.errors import UnusableRequest
from ckptengine.layout.cover import prove_cover
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.operations.converting.tensors import SourceTensors
from ckptengine.operations.read import SCRATCH_BYTES, default_workers
from ckptengine.sources.direct import BUFFER_BYTES
from ckptengine.sources.files import is_url
from ckptengine.sources.port import HoldsEncodedValues, KnowsPaths, Source
from ckptengine.sources.rules.parse import load_rules
from ckptengine.sources.spelled import spelled
from ckptengine.sources.writer import Job, Layout, Unit, Writer, WritesFile, no_path
from ckptengine.tiers.redact import redacted_url
from ckptengine.version import version

CHUNK_BYTES = 16 << 20
"""Largest box that a writer asks for at a time, where memory allows."""

LEAST_CHUNK_BYTES = 256 << 10

_THREAD_BYTES = SCRATCH_BYTES + BUFFER_BYTES
"""What each thread reads through beside what its unit needs."""

_WRITERS = {
    "native": "ckptengine.sources.native_writer",
    "zarr": "ckptengine.universal.write",
    "dcp": "ckptengine.sources.dcp.write",
    "safetensors": "ckptengine.sources.safetensors.write",
    "deepspeed": "ckptengine.sources.deepspeed.write",
    "deepspeed-universal": "ckptengine.sources.deepspeed.write_universal",
    "megatron": "ckptengine.sources.megatron.write",
    "torch": "ckptengine.sources.torchfile.write",
}
"""Where each format's writer is: a module with a ``WRITER`` that makes one.  Imported when it is asked for."""

FORMATS = tuple(_WRITERS)

Versions = dict[str, tuple[int, int]]
"""What tells whether files of the source were changed."""

OWN_FORMATS = ("native", "zarr")
"""Formats that keep canonical names; in all others tensors have the names that other tools know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a conversion reads and writes, and how far it came.

    ``write_bytes`` is exact for uncompressed targets and the most that a compressed one takes.  ``covered`` tensors are
    proven to be covered exactly by the source's fragments.  ``compared`` tensors had a digest in the source that equals
    the one computed while they were converted; ``verified`` ones were read again from the target; ``unverified`` ones
    the target does not hold under the same name, type and shape.  ``state`` is ``"planned"``, ``"committed"``, or
    ``"waiting"`` where other shards are not done.
    """

    source: str
    source_format: str
    step: int | None
    target: str
    format: str
    layout: Mapping[str, object]
    tensors: int
    units: int
    files: int
    read_bytes: int
    write_bytes: int
    peak_memory_bytes: int
    workers: int
    covered: int
    compared: int = 0
    verified: int = 0
    unverified: int = 0
    state: str = "planned"

    def to_json(self) -> dict[str, Any]:
        """The documented document that ``convert --json`` prints."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan with everything that carrying it out needs."""

    source: Source
    writer: Writer
    job: Job
    units: Sequence[Unit]
    plan: Plan
    memory_bytes: int
    fingerprint: str
    versions: Versions


def writer_of(format_name: str) -> Writer:
    """The writer of a format; `UnusableRequest` for one that this build cannot write."""
    path = _WRITERS.get(format_name)
    if path is None:
        raise UnusableRequest(f"no format {format_name!r} to convert to; formats are {', '.join(FORMATS)}")
    try:
        make: Callable[[], Writer] = importlib.import_module(path).WRITER
    except (ImportError, AttributeError) as error:
        raise UnusableRequest(f"this build cannot write {format_name}: {error}; write another format") from None
    return make()


def make_plan(
    source: Source,
    target: str,
    *,
    to: str,
    layout: Layout | None = None,
    rules: str | os.PathLike[str] | None = None,
    memory_bytes: int = 1 << 30,
    workers: int | None = None,
    options: Mapping[str, object] | None = None,
) -> Planned:
    """Plan a conversion; reads metadata only.

    Raises `LayoutError` where a tensor of the source is not covered exactly, `UnusableRequest` for a format, option or
    bound that cannot be kept, and what the writer raises for what its format cannot hold.
    """
    writer = _writer_for(to, layout, options or {})
    source = source if to in OWN_FORMATS else spelled(source)
    names, aliases, tensors = list(source.names()), source.aliases(), SourceTensors(source)
    own = [name for name in names if name not in aliases]
    versions = file_versions(source, _proven_files(map(tensors.tensor, own)))
    threads = _fitting_workers(workers, memory_bytes)
    job = Job(
        names=names,
        tensor=tensors.tensor,
        read=tensors.read,
        read_many=tensors.read_many,
        values=source.values(),
        encoded_values=source.encoded_values() if isinstance(source, HoldsEncodedValues) else None,
        aliases=aliases,
        step=source.step,
        metrics=source.metrics,
        layout=layout or Layout(),
        chunk_bytes=max(LEAST_CHUNK_BYTES, min(CHUNK_BYTES, memory_bytes // (4 * threads))),
        options=dict(options or {}),
        provenance=_provenance(source, rules),
        rules=None if rules is None else os.fspath(rules),
        target_name=_target_name(writer, target),
        path=source.path if isinstance(source, KnowsPaths) else no_path,
    )
    units = writer.units(job)
    plan = Plan(
        source=source.files.root,
        source_format=source.format,
        step=source.step,
        target=redacted_url(target),
        format=to,
        layout={} if layout is None else dataclasses.asdict(layout),
        tensors=len(names),
        units=len(units),
        files=len({file for unit in units for file in unit.files}),
        read_bytes=sum(unit.read_bytes for unit in units),
        write_bytes=sum(unit.write_bytes for unit in units),
        peak_memory_bytes=_peak_memory_bytes(to, units, threads, memory_bytes),
        workers=threads,
        covered=len(own),
    )
    fingerprint = _fingerprint(tensors, job, units, plan, versions)
    return Planned(source, writer, job, units, plan, memory_bytes, fingerprint, versions)


def _writer_for(to: str, layout: Layout | None, options: Mapping[str, object]) -> Writer:
    """The writer of a format; `UnusableRequest` for what it would take no notice of."""
    writer = writer_of(to)
    unknown = sorted(options.keys() - set(writer.options))
    if unknown:
        raise UnusableRequest(
            f"no such option for {to}: {', '.join(unknown)}; there are {', '.join(writer.options) or 'none'}"
        )
    if layout not in (None, Layout()) and not writer.ranked:
        raise UnusableRequest(f"{to} holds whole tensors, which fit every layout; leave --layout out")
    return writer


def _proven_files(tensors: Iterable[LogicalTensor]) -> set[str]:
    """The files of tensors, each of which is proven to be covered exactly."""
    files: set[str] = set()
    for tensor in tensors:
        prove_cover(tensor.name, tensor.shape, [fragment.box for fragment in tensor.fragments])
        files.update(fragment.file for fragment in tensor.fragments)
    return files


def _target_name(writer: Writer, target: str) -> str:
    """The last part of the target's path; `UnusableRequest` for a single file on remote storage."""
    name = os.path.basename(target.rstrip("/"))
    single = writer.file(name) if isinstance(writer, WritesFile) else None
    if single is not None and is_url(target) and not target.startswith("file://"):
        raise UnusableRequest(f"{name} names a file, and remote targets are folders; leave its suffix out")
    return name


def _provenance(source: Source, rules: object) -> dict[str, object]:
    """What the target records of where it came from."""
    return {
        "version": version,
        "source": source.files.root,
        "format": source.format,
        "step": source.step,
        "rules": None if rules is None else str(rules),
    }


def _peak_memory_bytes(to: str, units: Sequence[Unit], threads: int, memory_bytes: int) -> int:
    """What the largest units hold at the same time; `UnusableRequest` where one alone needs more than there is."""
    largest = sorted((unit.memory_bytes for unit in units), reverse=True)[:threads]
    if largest and largest[0] + _THREAD_BYTES > memory_bytes:
        raise UnusableRequest(
            f"converting to {to} needs {largest[0] + _THREAD_BYTES} bytes of memory for one of its files and may use "
            f"{memory_bytes}; allow more memory"
        )
    return min(memory_bytes, sum(largest) + threads * _THREAD_BYTES)


def _fitting_workers(workers: int | None, memory_bytes: int) -> int:
    """Threads that fit into the memory: each needs a chunk, a file's buffer and scratch."""
    if memory_bytes < 32 << 20:
        raise UnusableRequest(f"{memory_bytes} bytes of memory are too few to convert anything; allow 32 MiB or more")
    if workers is not None and workers < 1:
        raise UnusableRequest(f"{workers} workers cannot work; ask for one or more")
    return max(1, min(workers or default_workers(), memory_bytes // (32 << 20)))


def _fingerprint(tensors: SourceTensors, job: Job, units: Sequence[Unit], plan: Plan, versions: Versions) -> str:
    """What must be equal for a later run to go on where this one stopped."""
    digest = hashlib.sha256()
    what: list[object] = [
        plan.source,
        plan.source_format,
        plan.step,
        plan.format,
        plan.layout,
        None if job.rules is None else load_rules(job.rules).texts,
        plan.read_bytes,
    ]
    what.append(sorted((key, str(value)) for key, value in job.options.items()))
    what.append(version)
    what.append(sorted(versions.items()))
    digest.update(json.dumps(what).encode())
    for name in job.names:
        tensor = tensors.tensor(name)
        first = tensor.fragments[0] if len(tensor.fragments) else None
        where = None if first is None else (first.file, first.offset)
        digest.update(repr((name, tensor.dtype, tensor.shape, tensor.digest, where)).encode())
    for unit in units:
        digest.update(repr((unit.key, unit.files)).encode())
    return digest.hexdigest()


def file_versions(source: Source, files: Iterable[str]) -> Versions:
    """The size of each file and, where it is local, when it was written; -1 for one that is gone."""
    found: Versions = {}
    for file in files:
        local = source.files.local_path(file)
        try:
            status = None if local is None else os.stat(local)
        except FileNotFoundError:
            found[file] = -1, 0
        else:
            found[file] = (source.files.size(file), 0) if status is None else (status.st_size, status.st_mtime_ns)
    return found
