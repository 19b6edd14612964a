"""The verb verify: every byte of a checkpoint against its digest, and exact cover of every tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ckptengine import native
from ckptengine.errors import CheckpointError, DigestMismatch
from ckptengine.layout.box import Box
from ckptengine.layout.cover import prove_cover
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.operations.digests import digest_of
from ckptengine.operations.read import BoxReader
from ckptengine.operations.zipcheck import ZipCheck
from ckptengine.sources.native import NativeSource
from ckptengine.sources.port import Checksummed, Files, Source
from ckptengine.store import rankfile
from ckptengine.store.history import History

_CHUNK_BYTES = 8 << 20
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class Verdict(NamedTuple):
    """``problems``: empty where a checkpoint holds.  ``unproven``: how many tensors have nothing to compare with."""

    problems: list[CheckpointError]
    unproven: int


def verify(source: Source, progress: Progress | None = None) -> Verdict:
    """Every problem of a checkpoint.

    Of our own format every byte is checked: attempt records, headers, extents, padding, granule tables, indexes, the
    tensors' digests and their cover.  Of a foreign one: cover, every record of torch.save's files against its CRC-32,
    tensors and whole files against the digests that are recorded of them, and that all other bytes can be read.
    """
    if isinstance(source, NativeSource):
        return Verdict(_verify_native(source, progress), 0)
    return _verify_foreign(source, progress)


def _verify_native(source: NativeSource, progress: Progress | None) -> list[CheckpointError]:
    problems: list[CheckpointError] = []
    if source.of_root:
        problems += History(source.files).damaged_records()
    done = 0
    for rank, record in enumerate(source.manifest.files):
        problems += _verify_rank_file(source, rank, progress, done)
        done += record.nbytes
    if problems:
        return problems
    for name in source.names():
        try:
            tensor = source.tensor(name)
            prove_cover(name, tensor.shape, [fragment.box for fragment in tensor.fragments])
        except CheckpointError as error:
            problems.append(error)
    return problems or _verify_digests(source)


def _verify_foreign(source: Source, progress: Progress | None) -> Verdict:
    problems: list[CheckpointError] = []
    tensors: list[LogicalTensor] = []
    for name in source.names():
        try:
            tensors.append(source.tensor(name))
        except CheckpointError as error:
            problems.append(error)
    try:
        source.values()
    except CheckpointError as error:
        problems.append(error)
    whole = source.checksums() if isinstance(source, Checksummed) else {}
    problems += _verify_files(source.files, whole, progress)
    zips = ZipCheck(source, [fragment for tensor in tensors for fragment in tensor.fragments], whole)
    problems += zips.run(progress)
    unproven, aliases = 0, source.aliases()
    for tensor in tensors:
        checked = all(zips.covers(fragment) for fragment in tensor.fragments)
        try:
            _verify_tensor(source, tensor, recompute=not checked and tensor.name not in aliases)
        except CheckpointError as error:
            problems.append(error)
        unproven += tensor.digest is None and not checked
    return Verdict(problems, unproven)


def _verify_files(files: Files, checksums: Mapping[str, str], progress: Progress | None) -> list[CheckpointError]:
    """Whole files against the checksums that were recorded of them."""
    problems: list[CheckpointError] = []
    sizes: dict[str, int] = {}
    for path in checksums:
        try:
            sizes[path] = files.size(path)
        except CheckpointError as error:
            problems.append(error)
    done, total = 0, sum(sizes.values())
    for path, size in sizes.items():
        found = hashlib.sha256()
        try:
            for start in range(0, size, _CHUNK_BYTES):
                found.update(files.read(path, start, min(_CHUNK_BYTES, size - start)))
                if progress is not None:
                    progress(min(done + start + _CHUNK_BYTES, done + size), total)
        except CheckpointError as error:
            problems.append(error)
            continue
        finally:
            done += size
        if found.hexdigest() != checksums[path]:
            problems.append(
                DigestMismatch(
                    f"{files.root}/{path} has the SHA-256 {found.hexdigest()}, {checksums[path]} was recorded"
                )
            )
    return problems


def _verify_rank_file(source: NativeSource, rank: int, progress: Progress | None, done: int) -> list[CheckpointError]:
    """Header, tail, every extent, every gap of one rank file."""
    reader = source.reader
    path, total = reader.path(rank), source.manifest.nbytes
    problems: list[CheckpointError] = []
    try:
        tail = reader.tail(rank)
    except CheckpointError as error:
        return [error]
    cursor = rankfile.HEADER_BYTES
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while cursor < tail.table:
        count = min(_CHUNK_BYTES, tail.table - cursor)
        try:
            reader.read_verified(path, cursor, buffer[:count])
        except CheckpointError as error:
            problems.append(error)
        cursor += count
        if progress is not None:
            progress(done + cursor, total)
    try:
        reader.check_granules(rank)
    except CheckpointError as error:
        problems.append(error)
    return problems


def _verify_tensor(source: Source, tensor: LogicalTensor, *, recompute: bool) -> None:
    if not recompute:
        prove_cover(tensor.name, tensor.shape, [fragment.box for fragment in tensor.fragments])
        return
    reader = BoxReader(source, tensor)
    found = digest_of(tensor, lambda _, box, out: reader.read(box, out), _CHUNK_BYTES)
    if tensor.digest is not None and found != tensor.digest:
        raise DigestMismatch(f"tensor {tensor.name!r} has the digest {found}, {tensor.digest} was recorded")


def _verify_digests(source: NativeSource) -> list[CheckpointError]:
    """The digest of every logical tensor, recomputed from its verified bytes where fragments are not whole runs."""
    problems: list[CheckpointError] = []
    for record in source.manifest.tensors:
        tensor = source.tensor(record.name)
        fragments = list(tensor.fragments)
        if len(fragments) == 1 and fragments[0].box == Box.whole(tensor.shape):
            row = source.reader.row_at(fragments[0].file, fragments[0].offset)
            same = row is not None and int(row["crc"]) == record.crc
        elif not fragments:
            same = record.crc == native.crc64(b"")
        else:
            reader = BoxReader(source, tensor)
            same = digest_of(tensor, lambda _, box, out, r=reader: r.read(box, out), _CHUNK_BYTES) == record.digest  # type: ignore[misc]
        if not same:
            problems.append(DigestMismatch(f"tensor {record.name!r} does not have the digest in the manifest"))
    return problems
