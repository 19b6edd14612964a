"""What one rank's files hold of a tensor: all of it, ranges of its flattened elements, or a number."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckptengine.errors import Damaged, UnreadableFormat
from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.flat import flat_boxes
from ckptengine.layout.tensor import Fragment
from ckptengine.sources.files import InlineFiles
from ckptengine.sources.rules.algebra import Placed, concatenate, stack
from ckptengine.sources.stored import StoredTensor


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor stored as it is."""

    tensor: StoredTensor

    @property
    def size(self) -> int:
        return self.tensor.size

    def placed(self) -> Placed:
        return Placed(self.tensor.dtype, self.tensor.shape, (self.tensor.fragment(),))


@dataclass(frozen=True, slots=True)
class Chunk:
    """``count`` elements from element ``at`` of a flat buffer: elements ``first`` and on of the flattened tensor."""

    buffer: StoredTensor
    at: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Flat:
    """A tensor whose flattened elements lie in ranges of flat buffers, in order and without gaps."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def placed(self) -> Placed:
        width = itemsize(self.dtype)
        found: list[Fragment] = []
        for chunk in self.chunks:
            file, offset = chunk.buffer.at(chunk.at)
            for box in flat_boxes(self.shape, chunk.first, chunk.first + chunk.count):
                found.append(Fragment(box, file, offset))
                offset += box.size * width
        return Placed(self.dtype, self.shape, tuple(found))


@dataclass(frozen=True, slots=True)
class Number:
    """A number that a pickle holds by value, as a 0-d tensor."""

    dtype: str
    path: str

    @property
    def size(self) -> int:
        return 1

    def placed(self) -> Placed:
        return Placed(self.dtype, (), (Fragment(Box((), ()), self.path, 0),))


@dataclass(frozen=True, slots=True)
class Joined:
    """Tensors one after another along dimension 0, or (``stacked``) on a new dimension 0."""

    parts: tuple[Held, ...]
    stacked: bool

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def placed(self) -> Placed:
        """Raises `UnreadableFormat` where the parts do not fit together."""
        placed = [part.placed() for part in self.parts]
        shapes = {each.shape if self.stacked else each.shape[1:] for each in placed}
        if len(shapes) > 1 or len({each.dtype for each in placed}) > 1:
            raise UnreadableFormat("the ranks' parts of a tensor differ in shape or element type")
        return stack(placed) if self.stacked else concatenate(placed, 0)


Held = Whole | Flat | Number | Joined


def number(value: object, inline: InlineFiles) -> Number | None:
    """A Python number as a 0-d tensor of the type that torch would give it; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
        return Number("int64", inline.add(struct.pack("<q", value)))
    if isinstance(value, float):
        return Number("float32", inline.add(struct.pack("<f", value)))
    return None


def flat(name: str, shape: tuple[int, ...], chunks: Iterable[Chunk]) -> Flat:
    """A `Flat` whose chunks are checked: they cover the tensor, and lie inside of their 1-D buffers."""
    made = tuple(chunk for chunk in chunks if chunk.count)
    position = 0
    for chunk in made:
        buffer = chunk.buffer
        if chunk.first != position or len(buffer.shape) != 1 or not buffer.is_contiguous:
            raise UnreadableFormat(f"the pieces of {name} in the flat partitions do not follow one another")
        if chunk.at < 0 or chunk.at + chunk.count > buffer.size:
            raise Damaged(f"{name} should lie at {chunk.at}:{chunk.at + chunk.count} of a partition of {buffer.size}")
        position += chunk.count
    if position != math.prod(shape):
        raise Damaged(f"the flat partitions hold {position} of the {math.prod(shape)} elements of {name}")
    dtypes = {chunk.buffer.dtype for chunk in made}
    if len(dtypes) > 1:
        raise UnreadableFormat(f"the partitions of {name} have several element types: {', '.join(sorted(dtypes))}")
    return Flat(dtypes.pop() if dtypes else "float32", shape, made)


def cut_evenly(position: int, size: int, partition: int, buffers: Sequence[StoredTensor]) -> list[Chunk]:
    """Elements ``position`` and on of a flat group that is cut into partitions of ``partition`` elements."""
    chunks: list[Chunk] = []
    first = 0
    while first < size and partition > 0:
        rank, at = divmod(position + first, partition)
        if rank >= len(buffers):
            break
        count = min(size - first, partition - at)
        chunks.append(Chunk(buffers[rank], at, first, count))
        first += count
    return chunks
