"""Which of many fragments share elements with a box."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box
from ckptengine.layout.tensor import Fragment

_FEW = 8


@runtime_checkable
class FindsFragments(Protocol):
    """Fragments that can be found by box without listing all of them."""

    def overlapping(self, box: Box) -> Iterable[Fragment]:
        """The fragments that share an element with ``box``."""
        ...


class FragmentIndex:
    """Fragments of one tensor sorted along the dimension that tells them apart best.

    A query is a binary search and a scan of what overlaps in that dimension.  Sequences that find fragments by
    themselves (`FindsFragments`) are asked instead.
    """

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        self._fragments = fragments
        self._is_sorted = not isinstance(fragments, FindsFragments) and len(fragments) > _FEW
        if self._is_sorted:
            self._sort()

    def _sort(self) -> None:
        boxes = [fragment.box for fragment in self._fragments]
        try:
            low = np.array([box.offsets for box in boxes], np.int64).reshape(len(boxes), -1)
            high = np.array([box.ends for box in boxes], np.int64).reshape(len(boxes), -1)
        except (OverflowError, ValueError):
            raise LayoutError("fragments of one tensor have different ranks, or indices beyond 2**63") from None
        if not low.shape[1]:
            self._is_sorted = False
            return
        self._dim = max(range(low.shape[1]), key=lambda d: np.unique(low[:, d]).size)
        self._order = np.argsort(low[:, self._dim], kind="stable")
        self._low, self._high = low[self._order], high[self._order]
        self._reach = np.maximum.accumulate(self._high[:, self._dim])

    def overlapping(self, box: Box) -> list[tuple[Fragment, Box]]:
        """(fragment, the elements it shares with ``box``) of every one that shares any."""
        if not self._is_sorted:
            candidates = self._fragments
            if isinstance(candidates, FindsFragments):
                candidates = list(candidates.overlapping(box))
            pairs = [(fragment, fragment.box.intersect(box)) for fragment in candidates]
            return [(fragment, common) for fragment, common in pairs if common is not None]
        start, end = box.offsets[self._dim], box.offsets[self._dim] + box.shape[self._dim]
        first = int(np.searchsorted(self._reach, start, "right"))
        last = int(np.searchsorted(self._low[:, self._dim], end, "left"))
        low = np.maximum(self._low[first:last], np.array(box.offsets, np.int64))
        extent = np.minimum(self._high[first:last], np.array(box.ends, np.int64)) - low
        hits = np.flatnonzero((extent > 0).all(axis=1))
        places = self._order[first + hits].tolist()
        whole = (extent[hits] == (self._high - self._low)[first:last][hits]).all(axis=1).tolist()
        corners = zip(places, whole, low[hits].tolist(), extent[hits].tolist(), strict=True)
        return [
            (fragment, fragment.box if is_whole else Box(tuple(a), tuple(n)))
            for fragment, is_whole, a, n in ((self._fragments[i], w, a, n) for i, w, a, n in corners)
        ]
