"""Where parameters start in a legacy buffer of the distributed optimizer, whose buckets have lost their padding.

Pure.  The weights beside it are views of a buffer that still has the padding.  What is not known is where its buckets
end: a bucket is closed once it holds as many elements as a limit that the checkpoint does not say.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128
_MAX_STATES = 100_000


@dataclass(frozen=True, slots=True)
class Viewed:
    """A parameter's place in the padded buffer; ``is_shared``: a tied embedding, which may have its own bucket."""

    start: int
    size: int
    is_shared: bool = False

    @property
    def end(self) -> int:
        return self.start + self.size


def aligned(sizes: Sequence[int]) -> list[int]:
    """One bucket: every parameter starts at a multiple of `ALIGNMENT` elements."""
    starts: list[int] = []
    end = 0
    for size in sizes:
        starts.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = starts[-1] + size
    return starts


@dataclass(frozen=True, slots=True)
class _State:
    """Before parameter ``at``: its bucket's start, the padding removed so far, and between what the limit lies."""

    at: int = 0
    bucket: int = 0
    removed: tuple[int, ...] = (0,)
    low: int = 1
    high: float = math.inf


def without_padding(members: Sequence[Viewed], total: int) -> Iterator[list[int]]:
    """Starts of ``members`` in a buffer of ``total`` elements, for every way in which it may be cut into buckets."""
    if not members or any(a.end > b.start for a, b in itertools.pairwise(members)):
        return
    waiting = [_State(bucket=members[0].start)]
    for _ in range(_MAX_STATES):
        if not waiting:
            return
        state = waiting.pop()
        here = members[state.at]
        if state.at + 1 == len(members):
            if here.end - state.removed[-1] == total:
                yield [member.start - gone for member, gone in zip(members, state.removed, strict=True)]
            continue
        waiting += _next(state, here, members[state.at + 1])


def _next(state: _State, here: Viewed, following: Viewed) -> Iterator[_State]:
    """What may be between two parameters: nothing but alignment, or the end of a bucket (tried first)."""
    gap = following.start - here.end
    needed = -here.end % ALIGNMENT
    held = here.end - state.bucket
    removed = state.removed[-1]
    is_forced = here.is_shared or following.is_shared
    if gap == needed and (held < state.high or is_forced):
        low = state.low if is_forced else max(state.low, held + 1)
        yield _State(state.at + 1, state.bucket, (*state.removed, removed), low, state.high)
    if following.start % _BUCKET_ALIGNMENT == 0 and (held >= state.low or is_forced):
        high = state.high if is_forced else min(state.high, held)
        yield _State(state.at + 1, following.start, (*state.removed, removed + gap), state.low, high)
