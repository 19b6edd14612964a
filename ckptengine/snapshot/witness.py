"""Witnesses: a word about every live tensor, taken at registration and again before the fence lets go.

A write that comes before the bytes are captured and advances no version counter (``.data``, numpy, DLPack) leaves
nothing else to tell of it: what is captured then equals the memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ckptengine import native
from ckptengine.layout.digest import Words

Rows = npt.NDArray[np.int64]

_WHOLE_BYTES = 4 << 10
"""Per tensor of the state, on average: so much is digested whole, the smallest tensors first."""
_WHOLE_LEAST_BYTES, _WHOLE_MOST_BYTES = 1 << 20, 32 << 20
_LINES = 1 << 18
"""Cache lines that are looked at in all, of tensors that are not digested whole."""
_MOST_LINES = 16
"""Of one tensor: any write to an eighth of it in a row is found."""

_seeds = itertools.count()


class Watched:
    """The memory of tensors that may wait, one row each; those that no witness can be taken of have none.

    That is what lies on a device, and strided views with memory between their elements.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        sizes = [_dense_bytes(tensor) for tensor in tensors]
        places = zip(tensors, sizes, strict=True)
        self._addresses = np.array([tensor.data_ptr() if size else 0 for tensor, size in places], np.uint64)
        self._sizes = np.array(sizes, np.uint64)
        self._whole_bytes = _whole_bytes(self._sizes)
        self._lines = max(1, min(_MOST_LINES, _LINES // max(1, len(sizes))))

    def take(self) -> Witnesses:
        """What is there now; the tensors must lie where they did."""
        seed = next(_seeds)  # other places in every save
        return Witnesses(self, seed, self.words(slice(None), seed))

    def words(self, rows: Rows | slice, seed: int) -> Words:
        """A word for each of some rows."""
        addresses, sizes = self._addresses[rows], self._sizes[rows]
        return native.witnesses(addresses, sizes, whole_bytes=self._whole_bytes, lines=self._lines, seed=seed)


@dataclass(frozen=True, slots=True)
class Witnesses:
    """What was there at one registration."""

    watched: Watched
    seed: int
    words: Words

    def belied(self, rows: Rows) -> Rows:
        """Those of ``rows`` whose memory is not what it was; the tensors must lie where they did."""
        changed: Rows = rows[self.watched.words(rows, self.seed) != self.words[rows]]
        return changed


def _dense_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor that is one block of host memory in whatever order; 0 for any other."""
    if not tensor.is_cpu:
        return 0
    if not tensor.is_contiguous():
        expected = 1
        for stride, extent in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            if extent != 1 and stride != expected:
                return 0
            expected *= extent
    return tensor.nbytes


def _whole_bytes(sizes: Words) -> int:
    """Up to which size tensors are digested whole, so that all of them together are not too much."""
    most = min(max(len(sizes) * _WHOLE_BYTES, _WHOLE_LEAST_BYTES), _WHOLE_MOST_BYTES)
    ordered = np.sort(sizes)
    fitting = int(np.searchsorted(np.cumsum(ordered), most, "right"))
    return int(ordered[fitting]) - 1 if fitting < len(ordered) else int(ordered[-1]) if len(ordered) else 0
