"""What all ranks together hold: local descriptions merged into one numbered list of logical tensors.

Ranks describe themselves once; later saves only say that nothing changed.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ckptengine.coordination.port import Coordinator, gather, publish, receive
from ckptengine.coordination.relay import error_note, error_of
from ckptengine.errors import CheckpointError, LayoutError, RanksDisagree
from ckptengine.layout import layout_json
from ckptengine.layout.cover import prove_cover
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.irregular import Irregular
from ckptengine.layout.mesh import Mesh
from ckptengine.layout.piece import Piece
from ckptengine.layout.placement import Replicate
from ckptengine.layout.sharding import Layout, Sharding, replicated
from ckptengine.operations.saving.attempts import Claims
from ckptengine.plan.write import Planned, Writer, assign_writers, stored_pieces, writer_from_json, writer_to_json
from ckptengine.state.collection import no_collection
from ckptengine.state.leaves import FlatState, TensorLeaf
from ckptengine.store.envelope import canonical


class GlobalTensor(NamedTuple):  # a tuple: there is one per tensor
    """One row of the agreed structure."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: int
    writer: Writer

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Structure:
    """The agreed list of tensors, sorted by name; a tensor's place in it is its ordinal."""

    tensors: tuple[GlobalTensor, ...]
    layouts: tuple[Layout, ...]
    documents: tuple[Any, ...]
    _pieces: dict[tuple[int, Writer, tuple[int, ...], int], tuple[Piece, ...]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    _ordinals: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._ordinals.update((tensor.name, ordinal) for ordinal, tensor in enumerate(self.tensors))

    def ordinal(self, name: str) -> int:
        """The number of a tensor."""
        return self._ordinals[name]

    def stored(self, ordinal: int, rank: int) -> tuple[Piece, ...]:
        """The pieces of a tensor that ``rank`` writes."""
        tensor = self.tensors[ordinal]
        key = (tensor.layout, tensor.writer, tensor.shape, rank)
        pieces = self._pieces.get(key)
        if pieces is None:
            pieces = stored_pieces(self.layouts[tensor.layout], tensor.writer, tensor.shape, rank)
            self._pieces[key] = pieces
        return pieces

    def prove(self, world: int) -> None:
        """Prove that what all ranks write covers every tensor exactly; `LayoutError` names what does not."""
        proven: set[tuple[int, Writer, tuple[int, ...]]] = set()
        for ordinal, tensor in enumerate(self.tensors):
            key = (tensor.layout, tensor.writer, tensor.shape)
            if key in proven:
                continue
            holders = self.layouts[tensor.layout].holders()
            boxes = [piece.box for rank in holders if rank < world for piece in self.stored(ordinal, rank)]
            prove_cover(tensor.name, tensor.shape, boxes)
            proven.add(key)


_FOLLOWS = "follows"
"""In the place of a layout: what others hold of the tensor counts, or what the first rank does where all follow."""


def describe(flat: FlatState, members: Sequence[int] | None = None) -> list[Any]:
    """The local description of a rank's tensors, as JSON.

    ``members``: the world's ranks that take part, where they are not all, in the order of their numbers in the group;
    meshes then name ranks of the group.  `LayoutError` for a mesh that reaches beyond it.
    """
    with no_collection():
        return [_describe_leaf(leaf, members) for leaf in flat.tensors]


def _describe_leaf(leaf: TensorLeaf, members: Sequence[int] | None) -> list[Any]:
    layout = leaf.sharding
    if layout is not None and members is not None:
        layout = _within(leaf.name, layout, {rank: number for number, rank in enumerate(members)})
    document = _FOLLOWS if leaf.follows else None if layout is None else layout_json.to_json(layout)
    return [leaf.name, leaf.dtype, list(leaf.global_shape), document]


def _within(name: str, layout: Layout, numbers: Mapping[int, int]) -> Layout:
    """The layout with the ranks of the world under their numbers in the group."""
    outside = [rank for rank in layout.holders() if rank not in numbers]
    if outside:
        raise LayoutError(
            f"tensor {name!r} lies on ranks {outside[:8]} too, which are not in this Checkpointer's process group; "
            "give it a group that holds all of the tensor's mesh"
        )
    if isinstance(layout, Irregular):
        return Irregular(tuple(sorted((numbers[rank], pieces) for rank, pieces in layout.held)))
    mesh = layout.mesh
    ranks = tuple(numbers[rank] for rank in mesh.all_ranks().tolist())
    return Sharding(Mesh(mesh.shape, mesh.axis_names, ranks), layout.placements)


def merge(descriptions: Sequence[Sequence[Any]]) -> Structure:
    """One structure from the descriptions of ranks 0..n-1.

    A tensor without a layout of its own is a replica on every rank that has it, or on those of them that do not follow
    others (on the first, where all do).  Raises `RanksDisagree` or `LayoutError`.
    """
    found: dict[str, dict[int, Sequence[Any]]] = {}
    for rank, description in enumerate(descriptions):
        for row in description:
            found.setdefault(row[0], {})[rank] = row
    documents: list[Any] = []
    layouts: list[Layout] = []
    interned: dict[bytes, int] = {}
    known: dict[int, int] = {}
    kept: list[Layout] = []
    rows: list[tuple[str, str, tuple[int, ...], int]] = []
    for name in sorted(found):
        by_rank = found[name]
        dtype, shape = _common(name, by_rank)
        layout = _common_layout(name, shape, by_rank)
        number = known.get(id(layout))
        if number is None:
            document = layout_json.to_json(layout)
            number = interned.setdefault(canonical(document), len(layouts))
            if number == len(layouts):
                layouts.append(layout)
                documents.append(document)
            known[id(layout)] = number
            kept.append(layout)  # so that its id stays its own
        rows.append((name, dtype, shape, number))
    items = [Planned(name, dtype, shape, layouts[layout]) for name, dtype, shape, layout in rows]
    writers = assign_writers(items, world=len(descriptions))
    tensors = tuple(GlobalTensor(*row, writer) for row, writer in zip(rows, writers, strict=True))
    structure = Structure(tensors, tuple(layouts), tuple(documents))
    structure.prove(len(descriptions))
    return structure


def _common(name: str, by_rank: Mapping[int, Sequence[Any]]) -> tuple[str, tuple[int, ...]]:
    if len(by_rank) == 1:
        ((_, dtype, shape, _),) = by_rank.values()
        return dtype, tuple(shape)
    seen: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for rank, (_, dtype, shape, _) in by_rank.items():
        seen.setdefault((dtype, tuple(shape)), []).append(rank)
    if len(seen) > 1:
        told = "; ".join(f"{dtype}{list(shape)} on ranks {ranks[:8]}" for (dtype, shape), ranks in seen.items())
        raise RanksDisagree(
            f"tensor {name!r} differs between ranks: {told}. Wrap shards in ckptengine.Sharded (their place in the "
            "whole) or what belongs to each rank alone in ckptengine.PerRank"
        )
    return next(iter(seen))


@functools.lru_cache(maxsize=1024)
def _replicated(ranks: tuple[int, ...]) -> Sharding:
    return replicated(ranks)


def _common_layout(name: str, shape: tuple[int, ...], by_rank: Mapping[int, Sequence[Any]]) -> Layout:
    leading = {rank: row for rank, row in by_rank.items() if row[3] != _FOLLOWS}
    if not leading:
        return _replicated((min(by_rank),))
    by_rank = leading
    if all(row[3] is None for row in by_rank.values()):
        return _replicated(tuple(sorted(by_rank)))
    documents = {rank: row[3] for rank, row in by_rank.items()}
    if any(document is None for document in documents.values()):
        plain = [rank for rank, document in documents.items() if document is None]
        raise RanksDisagree(f"tensor {name!r} is sharded on some ranks and plain on ranks {plain[:8]}")
    layouts = {rank: layout_json.from_json(document) for rank, document in documents.items()}
    first = next(iter(layouts.values()))
    if all(isinstance(layout, Irregular) for layout in layouts.values()):
        return Irregular.joined(one for layout in layouts.values() for one in layout.held)  # type: ignore[union-attr]
    differing = [rank for rank, layout in layouts.items() if layout != first]
    if differing:
        joined = _side_by_side(layouts)
        if joined is None:
            raise RanksDisagree(
                f"tensor {name!r}: rank {differing[0]} says another sharding than rank {next(iter(layouts))}"
            )
        first = joined
    absent = [rank for rank in first.holders() if rank not in layouts]
    missing = [rank for rank in absent if rank in _holding(first, shape)]
    if missing:
        raise LayoutError(f"tensor {name!r}: its mesh names ranks {missing[:8]}, which do not have it")
    return first


@functools.lru_cache(maxsize=64)
def _holding(layout: Layout, shape: tuple[int, ...]) -> frozenset[int]:
    """The ranks that hold elements; others need not have a tensor (FSDP1: state of parameters that are elsewhere)."""
    if isinstance(layout, Irregular):
        return frozenset(layout.holders())
    return frozenset(layout.mesh.all_ranks()[layout.local_sizes(shape).reshape(-1) > 0].tolist())


def _side_by_side(layouts: Mapping[int, Layout]) -> Sharding | None:
    """One layout of ranks that say the same sharding over separate meshes, which then hold replicas of one another.

    So it is under FSDP beside tensor parallelism for what tensor parallelism leaves alone: each tensor-parallel rank
    has a data-parallel mesh of its own.  None where the layouts do not differ just so.
    """
    found = list(dict.fromkeys(layouts.values()))
    alike = [one for one in found if isinstance(one, Sharding)]
    if len(alike) != len(found) or len({(one.placements, one.mesh.shape) for one in alike}) != 1:
        return None
    ranks = [rank for one in alike for rank in one.mesh.all_ranks().tolist()]
    homes = {rank: one for one in alike for rank in one.mesh.all_ranks().tolist()}
    if len(homes) != len(ranks) or any(homes.get(rank) != layout for rank, layout in layouts.items()):
        return None
    mesh = alike[0].mesh
    axis = next(name for name in ("replica", *map(str, range(len(mesh.shape) + 1))) if name not in mesh.axis_names)
    joined = Mesh((len(alike), *mesh.shape), (axis, *mesh.axis_names), tuple(ranks))
    return Sharding(joined, (Replicate(), *alike[0].placements))


_REFUSED = "this save was not registered on every rank: "


@dataclass(frozen=True, slots=True)
class Refusal:
    """A save that this rank could not register: its number, and why, for the other ranks."""

    number: int
    error: BaseException


class Agreement:
    """The structure as last agreed.  One per checkpointer; used from one background thread."""

    def __init__(self, port: Coordinator, timeout_s: float, claims: Claims | None) -> None:
        self._port, self._timeout_s, self._claims = port, timeout_s, claims
        self.run, self.attempt = "", 0
        self._key: str | None = None
        self._structure: Structure | None = None
        self._descriptions: list[list[Any]] = []
        self._refused: CheckpointError | None = None
        self._read: list[str] = []
        """Keys that nobody needs any more once every rank has answered to a later one."""

    def settle(self, number: int, step: int, flat: FlatState) -> Structure:
        """Agree with all ranks on the structure for save ``number`` of ``step``."""
        changed = flat.structure_key != self._key
        self._key, self._refused = None, None  # whatever fails from here on, the next save describes itself again
        note = {"step": step, "tensors": describe(flat, self._port.members) if changed else None}
        key = f"structure/{number}"
        gathered = gather(self._port, key, note, self._timeout_s)
        if gathered is not None:
            answer = self._decide(gathered)
            publish(self._port, f"{key}/out", answer)
            for old in self._read:
                self._port.delete(old)
            self._read = [f"{key}/out"]
        else:
            answer = receive(self._port, f"{key}/out", self._timeout_s)
        if "error" in answer:
            raise self._refused or error_of(answer)
        self.run, self.attempt = answer["run"], answer["attempt"]
        if self._port.rank != 0 and answer["structure"] is not None:
            self._structure = structure_from_json(answer["structure"])
        self._key = flat.structure_key
        assert self._structure is not None
        return self._structure

    def refuse(self, refusal: Refusal) -> None:
        """Tell the ranks that wait for this one that the save is not to be; waits for nobody."""
        self._key = None
        note, key = error_note(refusal.error, self._port.rank), f"structure/{refusal.number}"
        if self._port.rank == 0:
            publish(self._port, f"{key}/out", {**note, "error": f"{_REFUSED}{note['error']}"})
            self._read += [f"{key}/out", *(f"{key}/{rank}" for rank in range(1, self._port.world))]
        else:
            self._port.put(f"{key}/{self._port.rank}", json.dumps(note).encode())

    def _decide(self, notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        refused = [note for note in notes if "error" in note]
        if refused:
            told = "; ".join(note["error"] for note in refused[:4])
            return {"error": f"{_REFUSED}{told}", "code": refused[0]["code"]}
        steps = {note["step"] for note in notes}
        if len(steps) > 1:
            told = ", ".join(f"rank {rank}: {note['step']}" for rank, note in enumerate(notes[:8]))
            error = f"ranks save different steps ({told}); every rank must make the same calls"
            return {"error": error, "code": RanksDisagree.code}
        try:
            attempt = self._claims.current(notes[0]["step"]) if self._claims else None
        except CheckpointError as error:
            self._refused = error
            return {"error": str(error), "code": error.code}
        answer = {"run": attempt.run if attempt else "", "attempt": attempt.number if attempt else 0}
        if all(note["tensors"] is None for note in notes) and self._structure is not None:
            return {"structure": None, **answer}
        known = self._descriptions or [[] for _ in notes]
        self._descriptions = [
            note["tensors"] if note["tensors"] is not None else known[rank] for rank, note in enumerate(notes)
        ]
        try:
            with no_collection():  # a few objects per tensor, and they stay
                self._structure = merge(self._descriptions)
        except CheckpointError as error:
            self._structure, self._refused = None, error
            return {"error": str(error), "code": error.code}
        except Exception as error:  # the other ranks must hear of it, whatever it is
            self._structure = None
            told = f"the descriptions of the ranks cannot be merged: {type(error).__name__}: {error}"
            return {"error": told, "code": RanksDisagree.code}
        return {"structure": structure_to_json(self._structure) if self._port.world > 1 else None, **answer}


def structure_to_json(structure: Structure) -> dict[str, Any]:
    return {
        "layouts": list(structure.documents),
        "tensors": [[t.name, t.dtype, list(t.shape), t.layout, writer_to_json(t.writer)] for t in structure.tensors],
    }


def structure_from_json(document: Mapping[str, Any]) -> Structure:
    tensors = tuple(
        GlobalTensor(n, d, tuple(s), layout, writer_from_json(w)) for n, d, s, layout, w in document["tensors"]
    )
    layouts = tuple(layout_json.from_json(layout) for layout in document["layouts"])
    return Structure(tensors, layouts, tuple(document["layouts"]))
