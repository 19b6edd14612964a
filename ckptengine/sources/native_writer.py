"""Write our own format from any source: one root with one committed step, tensors whole, spread over a few rank files.

A native checkpoint restores onto every layout, so the target has none of its own: each tensor lies in one piece in one
file.  Values of another format are kept as they are read there; restoring a live state leaves its own values alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ckptengine import native
from ckptengine.layout import layout_json
from ckptengine.layout.box import Box
from ckptengine.layout.digest import GRANULE_BYTES, Words, combine_each, parse_digest, standard_each
from ckptengine.layout.sharding import replicated
from ckptengine.plan.write import Owner
from ckptengine.sources.native import FOREIGN
from ckptengine.sources.stream import group_by_size, in_file_order, stream_boxes, stream_memory_bytes
from ckptengine.sources.writer import Document, Job, Sink, Target, Unit
from ckptengine.state.encoding import encode
from ckptengine.store import names, rankfile
from ckptengine.store.envelope import seal
from ckptengine.store.manifest import FileRecord, Manifest, TensorRecord
from ckptengine.store.root import utc_now
from ckptengine.version import version

FILE_BYTES = 2 << 30
_ATTEMPT = _SAVE = 1
_LARGE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which tensors lie in which file; ordinals count all tensors by name."""

    ordinals: Mapping[str, int]
    groups: Sequence[Sequence[str]]
    run: str


class NativeWriter:
    """The writer of ``--to native``."""

    format = "native"
    options: tuple[str, ...] = ()
    ranked = False

    def units(self, job: Job) -> Sequence[Unit]:
        """One unit per rank file."""
        plan = _plan(job)
        units = []
        for rank, group in enumerate(plan.groups):
            nbytes = sum(job.tensor(name).nbytes for name in group)
            path = f"{names.step_dir(job.step or 0)}/{names.rank_file(rank, _ATTEMPT, _SAVE)}"
            units.append(
                Unit(
                    key=f"rank-{rank:05d}",
                    tensors=tuple(group),
                    read_bytes=nbytes,
                    write_bytes=nbytes + rankfile.HEADER_BYTES,
                    memory_bytes=stream_memory_bytes(job),
                    files=(path,),
                )
            )
        return units

    def write(self, job: Job, unit: Unit, target: Target) -> Document:
        """One rank file, front to back."""
        plan = _plan(job)
        rank = int(unit.key.removeprefix("rank-"))
        identity = _identity(job, plan, rank)
        file = _RankFile(job, [plan.ordinals[name] for name in unit.tensors], unit.tensors)
        with target.create(unit.files[0]) as sink:
            sink.write(rankfile.encode_header(identity))
            file.stream(job, sink)
            table, tail = file.end()
            sink.write(table)
            sink.write(tail)
            nbytes = sink.position
        return {"file": [nbytes, native.crc64(tail)]}

    def finish(self, job: Job, results: Mapping[str, Document], target: Target) -> None:
        """Attempt records, then the manifest."""
        plan = _plan(job)
        record = {
            "number": _ATTEMPT,
            "run": plan.run,
            "parent": 0,
            "inherited": [],
            "host": "",
            "pid": 0,
            "created": utc_now(),
        }
        _put(target, f"{names.ATTEMPTS}/{names.attempt_claim(_ATTEMPT)}", b"")
        for copy in (0, 1):
            _put(target, f"{names.ATTEMPTS}/{names.attempt_record(_ATTEMPT, copy)}", seal("attempt", record))
        manifest = _manifest(job, plan, results)
        _put(target, f"{names.step_dir(job.step or 0)}/{manifest.file}", manifest.encode())


class _RankFile:
    """The extents of one file in file order, digested as they pass."""

    def __init__(self, job: Job, ordinals: Sequence[int], tensors: Sequence[str]) -> None:
        held = [(o, name) for o, name in zip(ordinals, tensors, strict=True) if job.tensor(name).nbytes]
        self._tensors = [name for _, name in held]
        self._sizes = [job.tensor(name).nbytes for name in self._tensors]
        self._offsets, self._end = _place(self._sizes)
        self._keys = [ordinal for ordinal, _ in held]
        self._granules: list[list[Words]] = [[] for _ in held]
        self._rest = b""
        self._now = 0

    def stream(self, job: Job, sink: Sink) -> None:
        """Append the body, from the header's end to the granule table."""

        def begin(number: int) -> None:
            self._flush()
            self._now = number
            _pad(sink, self._offsets[number])

        def write(data: memoryview) -> None:
            sink.write(data)
            self._digest(data)

        stream_boxes(job, [(name, Box.whole(job.tensor(name).shape)) for name in self._tensors], write, begin)
        self._flush()
        _pad(sink, self._end)

    def _digest(self, data: memoryview) -> None:
        granules = self._granules[self._now] if self._granules else []
        if self._rest:
            head = min(GRANULE_BYTES - len(self._rest), len(data))
            self._rest += bytes(data[:head])
            data = data[head:]
            if len(self._rest) < GRANULE_BYTES:
                return
            granules.append(native.raw_granules(self._rest, GRANULE_BYTES))
        cut = len(data) - len(data) % GRANULE_BYTES
        granules.append(native.raw_granules(data[:cut], GRANULE_BYTES))
        self._rest = bytes(data[cut:])

    def _flush(self) -> None:
        if self._rest:
            self._granules[self._now].append(native.raw_granules(self._rest, GRANULE_BYTES))
            self._rest = b""

    def end(self) -> tuple[bytes, bytes]:
        """Granule table and tail."""
        joined = [np.concatenate(parts) if parts else np.empty(0, np.uint64) for parts in self._granules]
        index = np.zeros(len(self._keys), rankfile.INDEX_DTYPE)
        index["tensor"], index["offset"], index["nbytes"] = self._keys, self._offsets, self._sizes
        index["crc"] = _extent_crcs(joined, self._sizes)
        order = np.argsort(index["tensor"], kind="stable")
        table = np.concatenate([np.empty(0, np.uint64), *(joined[i] for i in order.tolist())])
        return rankfile.encode_tail(self._end, index[order], table, {})


def _extent_crcs(granules: Sequence[Words], sizes: Sequence[int]) -> Words:
    """Standard CRCs of extents from the raw ones of their granules; those of equal size at once, most are."""
    by_size: dict[int, list[int]] = {}
    for position, size in enumerate(sizes):
        by_size.setdefault(size, []).append(position)
    found = np.zeros(len(sizes), np.uint64)
    for size, positions in by_size.items():
        found[positions] = combine_each(np.stack([granules[p] for p in positions]), GRANULE_BYTES, size)
    return standard_each(found, np.array(sizes, np.uint64))


def _place(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Large tensors begin at a page, so that they can be written without a copy; small ones are packed."""
    cursor = rankfile.HEADER_BYTES
    offsets: list[int] = []
    for nbytes in sizes:
        cursor += -cursor % (rankfile.BLOCK_BYTES if nbytes >= _LARGE_BYTES else rankfile.PACK_ALIGN_BYTES)
        offsets.append(cursor)
        cursor += nbytes
    return offsets, cursor + -cursor % rankfile.BLOCK_BYTES


def _pad(sink: Sink, position: int) -> None:
    if sink.position < position:
        sink.write(bytes(position - sink.position))


def _plan(job: Job) -> _Plan:
    """A function of the job alone, so that every run and machine finds the same files."""
    ordered = sorted(name for name in job.names if name not in job.aliases)
    groups = group_by_size(in_file_order(job, ordered), lambda name: job.tensor(name).nbytes, FILE_BYTES) or [[]]
    text = json.dumps([job.step, [[name, job.tensor(name).dtype, list(job.tensor(name).shape)] for name in ordered]])
    run = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return _Plan({name: ordinal for ordinal, name in enumerate(ordered)}, groups, run)


def _identity(job: Job, plan: _Plan, rank: int) -> rankfile.FileIdentity:
    return rankfile.FileIdentity(
        run=plan.run, attempt=_ATTEMPT, save=_SAVE, step=job.step or 0, rank=rank, world=len(plan.groups)
    )


def _manifest(job: Job, plan: _Plan, results: Mapping[str, Document]) -> Manifest:
    tensors = []
    ranks = {name: rank for rank, group in enumerate(plan.groups) for name in group}
    for name in plan.ordinals:
        tensor = job.tensor(name)
        digest = job.digests.get(name)
        crc = parse_digest(digest) if digest is not None else native.crc64(b"")
        tensors.append(TensorRecord(name, tensor.dtype, tuple(tensor.shape), ranks[name], Owner(0), crc))
    encoded = job.encoded_values
    return Manifest(
        run=plan.run,
        attempt=_ATTEMPT,
        save=_SAVE,
        step=job.step or 0,
        world=len(plan.groups),
        created=utc_now(),
        writer=f"ckptengine {version} convert",
        metrics=dict(job.metrics),
        layouts=[layout_json.to_json(replicated([rank])) for rank in range(len(plan.groups))],
        tensors=tensors,
        aliases=dict(job.aliases),
        values=encoded if encoded is not None else {"$": FOREIGN, "v": encode(job.values, "values")},
        files=[FileRecord(*results[f"rank-{rank:05d}"]["file"]) for rank in range(len(plan.groups))],
    )


def _put(target: Target, path: str, data: bytes) -> None:
    with target.create(path) as sink:
        sink.write(data)


WRITER = NativeWriter
