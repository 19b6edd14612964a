"""Which parameters lay on which rank: blocks of a model dealt out over pipeline stages so that every buffer is full.

Pure but for the comparison that the caller hands in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptengine.sources.dcp.metadata import Chunk
from ckptengine.sources.megatron.module_order import NO_COPIES, TIED, Copies, Degrees, Model, Parameter

ALIGNMENT = 64
MAX_ATTEMPTS = 20_000
"""How many ways to fill the buffers of one stage are tried of one order of modules."""


@dataclass(slots=True, eq=False)
class Bucket:
    """One bucket: its length in elements, and the key of each state's tensor.

    ``bounds`` are where the pieces that were stored of it begin and end; None where that says nothing of parameters.
    """

    length: int
    keys: dict[str, str] = field(default_factory=dict)
    bounds: frozenset[int] | None = None

    def add_bounds(self, chunks: Sequence[Chunk]) -> None:
        """Note the pieces of one state."""
        self.bounds = frozenset(at for c in chunks for at in (c.offsets[0], c.offsets[0] + c.shape[0]))

    def is_full(self, end: int) -> bool:
        """Whether nothing can follow: a bucket may end where the next one's parameter would have been aligned to."""
        return end <= self.length <= _aligned(end)

    def fits(self, start: int, size: int) -> bool:
        """Whether a parameter can lie there: parameters were stored one by one."""
        end = start + size
        return end <= self.length and (self.bounds is None or (start in self.bounds and end in self.bounds))


@dataclass(frozen=True, slots=True)
class Buffer:
    """The buckets of one model-parallel rank, virtual stage and element type."""

    dtype: str
    buckets: tuple[Bucket, ...]

    @property
    def length(self) -> int:
        return sum(bucket.length for bucket in self.buckets)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where the elements of one rank's part of a parameter lie: from ``start`` on in ``bucket``."""

    parameter: Parameter
    bucket: Bucket
    start: int


Ranks = Mapping[int, Sequence[Buffer]]
"""The buffers of each model-parallel rank, in order; a rank that trains nothing is left out."""


class Dealing:
    """The ways in which a model's blocks fill the buffers of ranks, one run of blocks for each virtual stage.

    Virtual stages go round the pipeline stages ``chunks`` times.  A later stage may hold a copy of the embedding.
    """

    def __init__(self, model: Model, degrees: Degrees, chunks: int, ranks: Ranks) -> None:
        self._model = model
        self._degrees = degrees
        self._stages = degrees.pp * chunks
        self._ranks = ranks
        self._kinds = len({weight.dtype for weight in model.weights.values()})
        self._attempts = 0
        self._known: dict[tuple[int, int, int], list[Parameter]] = {}

    def __iter__(self) -> Iterator[list[Slot]]:
        yield from self._from(0, 0, dict.fromkeys(self._ranks, 0))

    def _from(self, stage: int, first: int, taken: Mapping[int, int]) -> Iterator[list[Slot]]:
        """Slots of a stage and all after it; ``taken`` is how many buffers of each rank are full already."""
        if stage == self._stages:
            if first == len(self._model.blocks):
                yield []
            return
        left = (self._stages - 1 - stage) // self._degrees.pp  # how often the same ranks come again
        for last, copies in self._runs(stage, first, taken):
            self._attempts += 1
            placed = self._place(stage, range(first, last), copies, taken) if self._attempts <= MAX_ATTEMPTS else None
            if placed is None:
                continue
            slots, more = placed
            rest = (len(self._ranks[rank]) - count for rank, count in more.items())
            if all(count <= left * self._kinds and (left or not count) for count in rest):
                for others in self._from(stage + 1, last, {**taken, **more}):
                    yield [*slots, *others]

    def _runs(self, stage: int, first: int, taken: Mapping[int, int]) -> Iterator[tuple[int, Copies]]:
        """(end of the run, its copies of the embedding) that a stage can have by the sizes alone."""
        rank, tp, ep = next(self._degrees.ranks(stage % self._degrees.pp))
        buffers = self._ranks.get(rank, ())[taken.get(rank, 0) :]
        run: list[Parameter] = []
        for last in range(first, len(self._model.blocks) + 1):
            if last > first:
                run += self._parameters(last - 1, tp, ep)
            if stage == self._stages - 1 and last < len(self._model.blocks):
                continue
            for copies in self._model.copies if stage else (NO_COPIES,):
                here = self._with_copies(run, copies, tp)
                mine = buffers[: len({parameter.dtype for parameter in here})]
                size, room = sum(p.size for p in here), sum(buffer.length for buffer in mine)
                if size <= room <= size + (ALIGNMENT - 1) * len(here):
                    yield last, copies

    def _with_copies(self, run: Sequence[Parameter], copies: Copies, tp: int) -> Sequence[Parameter]:
        if copies == NO_COPIES:
            return run
        copy = replace(self._model.part(TIED, None, tp, self._degrees.tp), is_copy=True)
        return [*[copy] * copies[0], *run, *[copy] * copies[1]]

    def _parameters(self, block: int, tp: int, ep: int) -> list[Parameter]:
        at = (block, tp, ep)
        if at not in self._known:
            self._known[at] = self._model.parameters(block, tp, ep, self._degrees)
        return self._known[at]

    def _place(
        self, stage: int, blocks: range, copies: Copies, taken: Mapping[int, int]
    ) -> tuple[list[Slot], dict[int, int]] | None:
        """The slots of all ranks of a stage, and how many buffers of each are full then; None where they do not fit.

        Each stage has one buffer for each element type.
        """
        slots: list[Slot] = []
        more: dict[int, int] = {}
        for rank, tp, ep in self._degrees.ranks(stage % self._degrees.pp):
            run = [parameter for block in blocks for parameter in self._parameters(block, tp, ep)]
            parameters = self._with_copies(run, copies, tp)
            dtypes = list(dict.fromkeys(parameter.dtype for parameter in parameters))
            begin = taken.get(rank, 0)
            buffers = self._ranks.get(rank, ())[begin : begin + len(dtypes)]
            if sorted(buffer.dtype for buffer in buffers) != sorted(dtypes):
                return None
            for buffer in buffers:
                filled = fill([p for p in parameters if p.dtype == buffer.dtype][::-1], buffer)
                if filled is None:
                    return None
                slots += filled
            if rank in self._ranks:
                more[rank] = begin + len(dtypes)
        return slots, more


def fill(parameters: Sequence[Parameter], buffer: Buffer) -> list[Slot] | None:
    """Parameters one after another, each from a multiple of `ALIGNMENT` on, that fill all buckets; or None."""
    slots: list[Slot] = []
    rest = iter(buffer.buckets)
    bucket, end = next(rest, None), 0
    for parameter in parameters:
        if bucket is not None and bucket.is_full(end):
            bucket, end = next(rest, None), 0
        start = _aligned(end)
        end = start + parameter.size
        if bucket is None or not bucket.fits(start, parameter.size):
            return None
        slots.append(Slot(parameter, bucket, start))
    is_full = bucket is not None and bucket.is_full(end) and next(rest, None) is None
    return slots if is_full else None


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


_Path = tuple["_Path", Slot] | None


def align(parameters: Sequence[Parameter], buffer: Buffer, agrees: Callable[[Slot], bool]) -> list[Slot] | None:
    """Parameters in the same order that fill all buckets where some of them may be left out; None unless just one
    such choice has the contents of all of its parameters.

    Buckets of which nothing is known may have been several, put together without the gaps between them; in each of them
    parameters start at multiples of `ALIGNMENT` from its own beginning on.
    """
    places: dict[tuple[int, int, int], tuple[int, _Path]] = {(0, 0, 0): (1, None)}  # bucket, end, beginning modulo
    for parameter in parameters:
        found = dict(places)
        for (number, end, base), (ways, path) in places.items():
            if buffer.buckets[number].is_full(end):
                number, end, base = number + 1, 0, 0
            if number == len(buffer.buckets):
                continue
            bucket = buffer.buckets[number]
            starts = {base + _aligned(end - base): base}
            if bucket.bounds is None:
                starts.setdefault(end, end % ALIGNMENT)
            for start, new in starts.items():
                slot = Slot(parameter, bucket, start)
                if bucket.fits(start, parameter.size) and agrees(slot):
                    at = (number, start + parameter.size, new)
                    known = found.get(at, (0, None))[0]
                    found[at] = (known + ways, (path, slot))
        places = found
    final = len(buffer.buckets) - 1
    last = [held for (number, end, _), held in places.items() if number == final and buffer.buckets[-1].is_full(end)]
    if sum(ways for ways, _ in last) != 1:
        return None
    slots: list[Slot] = []
    path = last[0][1]
    while path is not None:
        path, slot = path
        slots.append(slot)
    return slots[::-1]
