"""What pieces of tensors mean beyond plain slices, each as a `Rearrangement`.

The re-arrangements lead from logical tensors to another arrangement of them (a rank's local tensors, another
framework's names); their inverses lead back.  Composed, they lead from any arrangement to any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box
from ckptengine.layout.links import Link, Place, Rearrangement, Shape
from ckptengine.layout.segments import Arranged


def renamed(tensors: Mapping[str, Shape], names: Mapping[str, str], *, is_copy: bool = False) -> Rearrangement:
    """Whole tensors under other names (pipeline stages, other roots); a tensor without an entry keeps its name."""
    links: list[Link] = []
    targets: dict[str, Shape] = {}
    for name, shape in tensors.items():
        new = names.get(name, name)
        if new in targets:
            raise LayoutError(f"two tensors would be named {new!r}, one of them {name!r}")
        targets[new] = shape
        links.append(Link(name, Box.whole(shape), new, Box.whole(shape), tuple(range(len(shape))), is_copy))
    return Rearrangement(dict(tensors), targets, tuple(links))


def tied(name: str, shape: Shape, names: Sequence[str]) -> Rearrangement:
    """One tensor under several names; the first is the original, the others are copies."""
    whole, axes = Box.whole(shape), tuple(range(len(shape)))
    links = tuple(Link(name, whole, new, whole, axes, i > 0) for i, new in enumerate(names))
    return Rearrangement({name: shape}, dict.fromkeys(names, shape), links)


def averaged(names: Sequence[str], shape: Shape, name: str) -> Rearrangement:
    """The mean of several tensors (parameters that every rank trained by itself).  Leads *to* the logical tensor."""
    whole, axes = Box.whole(shape), tuple(range(len(shape)))
    links = tuple(Link(source, whole, name, whole, axes, term=i) for i, source in enumerate(names))
    return Rearrangement(dict.fromkeys(names, shape), {name: shape}, links)


def arranged(name: str, shape: Shape, target: str, dims: Mapping[int, Arranged]) -> Rearrangement:
    """A tensor with some dimensions re-arranged; what no segment fills is zero.

    Source indices that no segment takes are simply not part of this re-arrangement: put those of all ranks
    `together` before proving that nothing is lost.
    """
    extents = tuple(dims[d].extent if d in dims else n for d, n in enumerate(shape))
    boxes: list[tuple[Box, Box, bool]] = [(Box.whole(shape), Box.whole(extents), False)]
    for d, arrangement in dims.items():
        if not 0 <= d < len(shape):
            raise LayoutError(f"tensor {name!r} of shape {shape} has no dimension {d} to re-arrange")
        boxes = [
            (
                _sliced(source, d, segment.source, segment.length),
                _sliced(made, d, segment.target, segment.length),
                is_copy or segment.is_copy,
            )
            for source, made, is_copy in boxes
            for segment in arrangement.segments
        ]
    axes = tuple(range(len(shape)))
    links = tuple(Link(name, source, target, made, axes, is_copy) for source, made, is_copy in boxes)
    rest = [Box.whole(extents)] if 0 not in extents else []
    for _, made, _ in boxes:
        rest = [part for box in rest for part in box.subtract(made)]
    return Rearrangement({name: shape}, {target: extents}, links, tuple((target, box) for box in rest))


def transposed(name: str, shape: Shape, target: str, order: Sequence[int]) -> Rearrangement:
    """Dimension ``d`` of the target is dimension ``order[d]`` of the tensor."""
    if sorted(order) != list(range(len(shape))):
        raise LayoutError(f"{list(order)} is no order of the dimensions of {name!r} of shape {shape}")
    made = tuple(shape[d] for d in order)
    link = Link(name, Box.whole(shape), target, Box.whole(made), tuple(order))
    return Rearrangement({name: shape}, {target: made}, (link,))


def stacked(names: Sequence[str], shape: Shape, target: str, *, dim: int = 0) -> Rearrangement:
    """Tensors of one shape (layers, experts) on a new dimension of one tensor, in order.  Unstacking is the inverse."""
    if not 0 <= dim <= len(shape):
        raise LayoutError(f"cannot stack tensors of shape {shape} on a new dimension {dim}")
    made = (*shape[:dim], len(names), *shape[dim:])
    axes = (*range(dim), None, *range(dim, len(shape)))
    links = tuple(
        Link(name, Box.whole(shape), target, _sliced(Box.whole(made), dim, i, 1), axes) for i, name in enumerate(names)
    )
    if len(set(names)) != len(names):
        raise LayoutError(f"a tensor occurs twice in the stack {target!r}")
    return Rearrangement(dict.fromkeys(names, shape), {target: made}, links)


def concatenated(tensors: Sequence[tuple[str, Shape]], target: str, *, dim: int = 0) -> Rearrangement:
    """Tensors one after another along ``dim`` (fusing separate weights).  Splitting is the inverse."""
    first = tensors[0][1]
    links: list[Link] = []
    start = 0
    total = sum(shape[dim] for _, shape in tensors)
    made = (*first[:dim], total, *first[dim + 1 :])
    for name, shape in tensors:
        if (*shape[:dim], *shape[dim + 1 :]) != (*first[:dim], *first[dim + 1 :]):
            raise LayoutError(f"{name!r} of shape {shape} does not fit behind {tensors[0][0]!r} of {first}")
        box = _sliced(Box.whole(made), dim, start, shape[dim])
        links.append(Link(name, Box.whole(shape), target, box, tuple(range(len(shape)))))
        start += shape[dim]
    return Rearrangement(dict(tensors), {target: made}, tuple(links))


def together(parts: Sequence[Rearrangement]) -> Rearrangement:
    """Re-arrangements of different targets as one; a source may occur in several, with one shape."""
    sources: dict[str, Shape] = {}
    targets: dict[str, Shape] = {}
    links: list[Link] = []
    zeros: list[Place] = []
    padding: list[Place] = []
    spares: list[Place] = []
    for part in parts:
        for name, shape in part.sources.items():
            if sources.setdefault(name, shape) != shape:
                raise LayoutError(f"tensor {name!r} is used with shapes {sources[name]} and {shape}")
        clash = targets.keys() & part.targets.keys()
        if clash:
            raise LayoutError(f"two re-arrangements make {sorted(clash)[:5]}")
        targets.update(part.targets)
        links += part.links
        zeros += part.zeros
        padding += part.padding
        spares += part.spares
    return Rearrangement(sources, targets, tuple(links), tuple(zeros), tuple(padding), tuple(spares))


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where a pipeline puts a layer: stage, virtual chunk of the stage, and its number within that chunk."""

    stage: int
    chunk: int
    index: int


def pipeline_places(layers: int, stages: int, chunks: int = 1, counts: Sequence[int] | None = None) -> list[LayerPlace]:
    """The place of every layer under (interleaved) pipelining.

    Chunk ``c`` of stage ``s`` is the ``c * stages + s``-th run of layers; ``counts`` gives the runs' lengths, by
    default equal ones (`LayoutError` where they do not divide).
    """
    runs = stages * chunks
    if counts is None:
        if runs < 1 or layers % runs:
            raise LayoutError(f"{layers} layers do not divide over {stages} stages of {chunks} chunks; give the counts")
        counts = [layers // runs] * runs
    if len(counts) != runs or sum(counts) != layers or min(counts, default=0) < 0:
        raise LayoutError(f"layer counts {list(counts)} do not place {layers} layers on {stages} stages x {chunks}")
    return [LayerPlace(run % stages, run // stages, i) for run, count in enumerate(counts) for i in range(count)]


def _sliced(box: Box, dim: int, start: int, length: int) -> Box:
    offset = box.offsets[dim] + start
    return Box((*box.offsets[:dim], offset, *box.offsets[dim + 1 :]), (*box.shape[:dim], length, *box.shape[dim + 1 :]))
