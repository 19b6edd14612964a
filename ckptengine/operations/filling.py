"""Fill live tensors from a source: verified bytes, straight into place on the CPU, through host memory elsewhere."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ckptengine.layout.piece import Piece
from ckptengine.operations.read import BoxReader
from ckptengine.sources.port import Source
from ckptengine.state.fill import Target

_UNIT = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "V16"}
_WORKERS = 4


def fill_targets(source: Source, targets: Sequence[Target]) -> None:
    """Fill every piece of every target.  Raises what the source raises; some targets may be filled by then."""
    if len(targets) <= 1:
        for target in targets:
            fill_target(source, target)
        return
    with ThreadPoolExecutor(min(_WORKERS, 2 * (os.cpu_count() or 1)), "ckptengine-restore") as pool:
        futures = [pool.submit(fill_target, source, target) for target in targets]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()


def fill_target(source: Source, target: Target) -> None:
    """Fill one target's pieces."""
    reader = BoxReader(source, source.tensor(target.name))
    tensor = target.tensor
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        for piece in target.pieces:
            reader.read(piece.box, array_of(tensor, piece), workers=1)
        return
    host = torch.empty(tuple(tensor.shape), dtype=tensor.dtype)
    for piece in target.pieces:
        reader.read(piece.box, array_of(host, piece), workers=1)
    with torch.no_grad():
        tensor.copy_(host)


def array_of(tensor: torch.Tensor, piece: Piece) -> npt.NDArray[Any]:
    """The region of a contiguous CPU tensor that holds ``piece``, as a writable array of opaque units."""
    item = tensor.element_size()
    unit = np.dtype(_UNIT[item])
    if piece.box.size == 0:
        return np.empty(piece.box.shape, unit)
    span = 1 + sum((n - 1) * s for n, s in zip(piece.box.shape, piece.strides, strict=True))
    address = tensor.data_ptr() + piece.start * item
    flat = np.frombuffer((ctypes.c_uint8 * (span * item)).from_address(address), unit)
    strides = tuple(stride * item for stride in piece.strides)
    return np.lib.stride_tricks.as_strided(flat, piece.box.shape, strides, writeable=True)
