"""Fill live tensors from a source: verified bytes, straight into place on the CPU, through host memory elsewhere.

From our own format everything that a rank wants is planned at once and read in file order, each stored byte at most
once.  Foreign formats are read tensor by tensor.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ckptengine.layout.piece import Piece
from ckptengine.operations.filling.batches import batches_of
from ckptengine.operations.filling.native import Executor
from ckptengine.operations.filling.plan import Extents, plan_fill
from ckptengine.operations.filling.whole import Wholes
from ckptengine.operations.read import BoxReader
from ckptengine.plan.read import ReadPlan
from ckptengine.sources.native import NativeSource
from ckptengine.sources.port import Source
from ckptengine.state.target import Target

STAGE_BYTES = 256 << 20
"""Host memory through which tensors are filled that lie on a device or are not contiguous, largest tensor aside."""

_UNIT = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "V16"}
_WORKERS = 4


@dataclass(frozen=True, slots=True)
class Filled:
    """What one rank's restore read: bytes its targets hold, and bytes read for them (granules and gaps included)."""

    wanted_bytes: int
    read_bytes: int


class Fill:
    """Targets with the proof that each of their elements has exactly one stored source; nothing is changed yet."""

    def __init__(self, source: Source, targets: Sequence[Target], *, shared: bool = False) -> None:
        """``shared``: other ranks of this machine read too, and what they read in common is in the page cache.

        Raises `LayoutError` for elements that no fragment or several hold, and what reading an index raises.
        """
        self._source = source
        if not isinstance(source, NativeSource):
            self._foreign = [(target, BoxReader(source, source.tensor(target.name))) for target in targets]
            for target, reader in self._foreign:
                for piece in target.pieces:
                    reader.parts(piece.box)
            return
        extents = Extents(source)
        self._groups: list[_Group] = []
        for group in _groups(targets):
            whole = [t for t in group if shared and _is_whole(source, t)]
            alone = [t for t in group if not (shared and _is_whole(source, t))]
            self._groups += [_group(extents, part, part is whole) for part in (whole, alone) if part]
        self._extents = extents.by_file()

    def run(self) -> Filled:
        """Fill every target.  Raises `Damaged`, `NotFound` or `StorageFailed`; some targets may be filled by then."""
        if not isinstance(self._source, NativeSource):
            return self._run_foreign()
        wanted = read = 0
        for group in self._groups:
            tensors = [_landing(target) for target in group.targets]
            addresses = [tensor.data_ptr() for tensor in tensors]
            nbytes = [tensor.numel() * tensor.element_size() for tensor in tensors]
            executor = Executor(self._source, addresses, nbytes, shared=group.shared)
            whole = group.wholes.batches(self._source.reader, addresses)
            read += executor.run(chain(whole, batches_of(group.plan.reads, self._extents, addresses)))
            wanted += group.wholes.nbytes(self._source.reader) + group.plan.wanted_bytes
            with torch.no_grad():
                for target, tensor in zip(group.targets, tensors, strict=True):
                    if tensor is not target.tensor:
                        target.tensor.copy_(tensor, non_blocking=False)
        return Filled(wanted, read)

    def _run_foreign(self) -> Filled:
        with ThreadPoolExecutor(min(_WORKERS, 2 * (os.cpu_count() or 1)), "ckptengine-restore") as pool:
            futures = [pool.submit(_fill_foreign, target, reader) for target, reader in self._foreign]
            try:
                for future in futures:
                    future.result()
            finally:
                for future in futures:
                    future.cancel()
        pieces = [(piece, target.tensor.element_size()) for target, _ in self._foreign for piece in target.pieces]
        wanted = sum(piece.size * item for piece, item in pieces)
        return Filled(wanted, wanted)


def fill_targets(source: Source, targets: Sequence[Target]) -> Filled:
    """Fill every piece of every target; see `Fill`."""
    return Fill(source, targets).run()


@dataclass(frozen=True, slots=True)
class _Group:
    """Targets that are filled together: from whole extents, or by the plan."""

    targets: tuple[Target, ...]
    wholes: Wholes
    plan: ReadPlan
    shared: bool


def _group(extents: Extents, targets: list[Target], shared: bool) -> _Group:
    wholes, others = extents.wholes(targets)
    return _Group(tuple(targets), wholes, plan_fill(extents, targets, others), shared)


def _groups(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """First what is filled in place, then what is staged, `STAGE_BYTES` at a time."""
    in_place = [target for target in targets if _in_place(target.tensor)]
    if in_place:
        yield in_place
    group: list[Target] = []
    held = 0
    for target in (part for one in targets if not _in_place(one.tensor) for part in _parts(one)):
        nbytes = target.tensor.numel() * target.tensor.element_size()
        if group and held + nbytes > STAGE_BYTES:
            yield group
            group, held = [], 0
        group.append(target)
        held += nbytes
    if group:
        yield group


def _parts(target: Target) -> Iterator[Target]:
    """A large contiguous tensor on a device in stretches of rows, so that staging stays bounded."""
    tensor = target.tensor
    nbytes = tensor.numel() * tensor.element_size()
    simple = len(target.pieces) == 1 and target.pieces[0].box.shape == tuple(tensor.shape) and tensor.ndim > 0
    if nbytes <= STAGE_BYTES or not simple or target.pieces[0].start or not target.pieces[0].is_contiguous:
        yield target
        return
    box = target.pieces[0].box
    rows = max(1, STAGE_BYTES // (nbytes // box.shape[0]))
    for start in range(0, box.shape[0], rows):
        count = min(rows, box.shape[0] - start)
        part = replace(box, offsets=(box.offsets[0] + start, *box.offsets[1:]), shape=(count, *box.shape[1:]))
        yield replace(target, tensor=tensor.narrow(0, start, count), pieces=(Piece.packed(part),))


def _in_place(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.is_contiguous()


def _is_whole(source: NativeSource, target: Target) -> bool:
    """Whether a target is the whole stored tensor: other ranks then want the same bytes."""
    return sum(piece.size for piece in target.pieces) == source.tensor(target.name).size


def _landing(target: Target) -> torch.Tensor:
    """Contiguous host memory for a target: itself, or a copy with what no piece covers as it is."""
    tensor = target.tensor
    if _in_place(tensor):
        return tensor
    host = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    if sum(piece.size for piece in target.pieces) != tensor.numel():
        host.copy_(tensor.detach())
    return host


def _fill_foreign(target: Target, reader: BoxReader) -> None:
    host = _landing(target)
    for piece in target.pieces:
        reader.read(piece.box, array_of(host, piece), workers=1)
    if host is not target.tensor:
        with torch.no_grad():
            target.tensor.copy_(host)


def array_of(tensor: torch.Tensor, piece: Piece) -> npt.NDArray[Any]:
    """The region of a contiguous CPU tensor that holds ``piece``, as a writable array of opaque units."""
    item = tensor.element_size()
    unit = np.dtype(_UNIT[item])
    if piece.box.size == 0:
        return np.empty(piece.box.shape, unit)
    span = 1 + sum((n - 1) * s for n, s in zip(piece.box.shape, piece.strides, strict=True))
    address = tensor.data_ptr() + piece.start * item
    flat = np.frombuffer(memoryview((ctypes.c_uint8 * (span * item)).from_address(address)), unit)
    strides = tuple(stride * item for stride in piece.strides)
    return np.lib.stride_tricks.as_strided(flat, piece.box.shape, strides, writeable=True)
