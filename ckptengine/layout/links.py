"""Mappings between sets of named tensors that move every element as it is: what all re-arrangements are made of.

A `Link` says that a box of one tensor *is* a box of another, dimensions perhaps permuted, dropped or added.  Slices,
fused parts, interleavings, transposes, stacks, padding, renames, replicas and expert placement are sets of links, so
they compose, invert and are proven with one piece of code, before any byte moves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box
from ckptengine.layout.cover import prove_cover
from ckptengine.layout.fragment_index import FragmentIndex
from ckptengine.layout.piece import Piece
from ckptengine.layout.tensor import Fragment

Shape = tuple[int, ...]
Place = tuple[str, Box]
"""A box of a named tensor."""


@dataclass(frozen=True, slots=True)
class Link:
    """``target_box`` of ``target`` holds what ``source_box`` of ``source`` does.

    Dimension ``d`` of the target runs along dimension ``axes[d]`` of the source; None is a new dimension of extent 1,
    and source dimensions that do not occur have extent 1.  ``is_copy`` marks elements that another link delivers too
    (replicas).  A target with several ``term`` numbers is the mean of what each term delivers.
    """

    source: str
    source_box: Box
    target: str
    target_box: Box
    axes: tuple[int | None, ...]
    is_copy: bool = False
    term: int = 0

    def __post_init__(self) -> None:
        used = [axis for axis in self.axes if axis is not None]
        extents = [1 if axis is None else self.source_box.shape[axis] for axis in self.axes]
        dropped = [n for axis, n in enumerate(self.source_box.shape) if axis not in used]
        if tuple(extents) != self.target_box.shape or len(set(used)) != len(used) or any(n != 1 for n in dropped):
            raise LayoutError(
                f"{self.source} {self.source_box} cannot be {self.target} {self.target_box} along axes {self.axes}"
            )

    def inverse(self) -> Link:
        """The same correspondence in the other direction."""
        axes = tuple(self.axes.index(axis) if axis in self.axes else None for axis in range(self.source_box.ndim))
        return Link(self.target, self.target_box, self.source, self.source_box, axes)

    def to_target(self, box: Box) -> Box:
        """What a box inside ``source_box`` is in the target."""
        inner = box.relative_to(self.source_box)
        offsets = [0 if axis is None else inner.offsets[axis] for axis in self.axes]
        shape = [1 if axis is None else inner.shape[axis] for axis in self.axes]
        return Box(tuple(offsets), tuple(shape)).shift(self.target_box.offsets)

    def to_source(self, box: Box) -> Box:
        """What a box inside ``target_box`` is in the source."""
        return self.inverse().to_target(box)


@dataclass(frozen=True, slots=True)
class Rearrangement:
    """Links from ``sources`` to ``targets`` (name -> shape), and what they leave out.

    ``zeros``: target boxes that are filled with zeros; ``padding``: source boxes that are zero and taken nowhere;
    ``spares``: source boxes that repeat what is taken elsewhere.
    """

    sources: Mapping[str, Shape]
    targets: Mapping[str, Shape]
    links: tuple[Link, ...]
    zeros: tuple[Place, ...] = ()
    padding: tuple[Place, ...] = ()
    spares: tuple[Place, ...] = ()

    def inverse(self) -> Rearrangement:
        """Targets to sources; copies become spares.  `LayoutError` for what cannot be undone: means and spares."""
        if self.spares or any(link.term for link in self.links):
            raise LayoutError("a re-arrangement that averages or drops replicas has no inverse")
        links = tuple(link.inverse() for link in self.links if not link.is_copy)
        spares = tuple((link.target, link.target_box) for link in self.links if link.is_copy)
        return Rearrangement(self.targets, self.sources, links, self.padding, self.zeros, spares)

    def then(self, following: Rearrangement) -> Rearrangement:
        """This re-arrangement followed by another one of its targets; `LayoutError` where their tensors differ."""
        for name, shape in following.sources.items():
            if self.targets.get(name) != shape:
                raise LayoutError(f"tensor {name!r} of shape {shape} is wanted, but {self.targets.get(name)} is made")
        onward = _by_name((link.source, link) for link in following.links)
        backward = _by_name((link.target, link) for link in self.links)
        links = tuple(
            joined for first in self.links for second in onward[first.target] if (joined := _joined(first, second))
        )
        zeros = tuple(_images(self.zeros, onward, Link.to_target))
        unpadded = tuple(_images(following.padding, backward, Link.to_source))
        spares = tuple(_images(following.spares, backward, Link.to_source))
        return Rearrangement(
            self.sources,
            following.targets,
            links,
            following.zeros + zeros,
            self.padding + unpadded,
            self.spares + spares,
        )

    def prove_complete(self) -> None:
        """Raise `LayoutError` unless every target element has exactly one source (per term) or is a declared zero."""
        made: dict[str, dict[int, list[Box]]] = {name: {0: []} for name in self.targets}
        for link in self.links:
            _known(made, link.target, "target").setdefault(link.term, []).append(link.target_box)
        zeros = _by_name(self.zeros)
        for name, terms in made.items():
            for boxes in terms.values():
                prove_cover(name, self.targets[name], boxes + zeros[name])

    def prove_bijection(self) -> None:
        """Raise `LayoutError` unless, beside declared padding and replicas, elements correspond one to one.

        Every target element has exactly one source, and every source element is taken by exactly one link that is not
        a copy.  Names the tensor and the box that are doubly or not accounted for.
        """
        if any(link.term for link in self.links):
            raise LayoutError("a mean of several tensors is no bijection")
        self.prove_complete()
        taken: dict[str, list[Box]] = {name: [] for name in self.sources}
        for link in self.links:
            boxes = _known(taken, link.source, "source")
            if not link.is_copy:
                boxes.append(link.source_box)
            elif not Box.whole(self.sources[link.source]).contains(link.source_box):
                raise LayoutError(f"tensor {link.source!r}: copied box {link.source_box} is out of bounds")
        left = _by_name(self.padding + self.spares)
        for name, boxes in taken.items():
            prove_cover(name, self.sources[name], boxes + left[name])

    def pieces(self, target: str, held: Sequence[Piece] | None = None) -> Iterator[tuple[str, Piece]]:
        """(source, piece of it) of what a rank's local tensor holds of ``target``.

        ``held`` says which boxes of ``target`` the local tensor has and where (a flat cut of it, say); by default the
        local tensor is all of ``target``, row-major.
        """
        if held is None:
            held = (Piece.packed(Box.whole(self.targets[target])),)
        for link in self.links:
            if link.target != target:
                continue
            for piece in held:
                common = piece.box.intersect(link.target_box)
                if common is not None:
                    part = piece.part(common)
                    along = {axis: part.strides[d] for d, axis in enumerate(link.axes)}
                    strides = tuple(along.get(axis, 1) for axis in range(link.source_box.ndim))
                    yield link.source, Piece(link.to_source(common), part.start, strides)

    def fragments(self, target: str, stored: Callable[[str], Sequence[Fragment]], item_bytes: int) -> list[Fragment]:
        """The fragments of ``target`` from those of its sources: the same bytes, read with other strides."""
        found: list[Fragment] = []
        for link in self.links:
            if link.target != target:
                continue
            for fragment, common in FragmentIndex(stored(link.source)).overlapping(link.source_box):
                part = fragment.part(common, item_bytes)
                assert part.strides is not None
                strides = tuple(0 if axis is None else part.strides[axis] for axis in link.axes)
                box = link.to_target(common)
                plain = Fragment(box, part.file, part.offset)
                strided = replace(plain, strides=strides)
                found.append(plain if strided.is_contiguous else strided)
        return found


def _joined(first: Link, second: Link) -> Link | None:
    common = first.target_box.intersect(second.source_box)
    if common is None:
        return None
    if first.term and second.term:
        raise LayoutError(f"tensor {second.target!r} would be a mean of means")
    axes = tuple(None if axis is None else first.axes[axis] for axis in second.axes)
    return Link(
        first.source,
        first.to_source(common),
        second.target,
        second.to_target(common),
        axes,
        first.is_copy or second.is_copy,
        first.term or second.term,
    )


def _images(
    places: Iterable[Place], links: Mapping[str, Sequence[Link]], carry: Callable[[Link, Box], Box]
) -> Iterator[Place]:
    """Where boxes of the tensors between two re-arrangements end up."""
    forward = carry is Link.to_target
    for name, box in places:
        for link in links[name]:
            common = box.intersect(link.source_box if forward else link.target_box)
            if common is not None:
                yield link.target if forward else link.source, carry(link, common)


_T = TypeVar("_T")


def _by_name(pairs: Iterable[tuple[str, _T]]) -> defaultdict[str, list[_T]]:
    found: defaultdict[str, list[_T]] = defaultdict(list)
    for name, value in pairs:
        found[name].append(value)
    return found


def _known(table: dict[str, _T], name: str, what: str) -> _T:
    if name not in table:
        raise LayoutError(f"a link names {name!r}, which is no {what} of the re-arrangement")
    return table[name]
