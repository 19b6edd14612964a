"""Shardings as JSON documents.

A sharding is ``{"mesh": <mesh or its number in a table>, "placements": [...]}`` with placements ``"R"`` (replicate),
``"P"`` (partial), ``["S", dim]``, ``["SS", dim, split factor]`` and ``["F", {...}]``; an irregular one is
``{"held": [[rank, [[offsets, shape], ...]], ...]}``, where a piece that does not lie packed behind the one before also
gives its start and strides.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box
from ckptengine.layout.documents import integer, integers, items, member
from ckptengine.layout.irregular import Irregular
from ckptengine.layout.mesh import Mesh
from ckptengine.layout.piece import Piece
from ckptengine.layout.placement import Flat, Partial, Placement, Replicate, Shard, StridedShard
from ckptengine.layout.sharding import Layout, Sharding

_FLAT = ("offset", "part", "padded", "aligned", "in_place")


class MeshTable:
    """Meshes numbered in the order in which they were first met, so that each is stored once."""

    def __init__(self) -> None:
        self._numbers: dict[Mesh, int] = {}

    def number(self, mesh: Mesh) -> int:
        """The number of ``mesh``, a new one where it has none yet."""
        return self._numbers.setdefault(mesh, len(self._numbers))

    def to_json(self) -> list[dict[str, object]]:
        """The meshes in the order of their numbers."""
        return [mesh.to_json() for mesh in self._numbers]


def meshes_from_json(document: object) -> tuple[Mesh, ...]:
    """The meshes of a table; `LayoutError` for anything malformed."""
    return tuple(Mesh.from_json(item) for item in items(document, "meshes"))


def to_json(layout: Layout, meshes: MeshTable | None = None) -> dict[str, object]:
    """The document of a sharding; with a table its mesh is stored there and referred to by number."""
    if isinstance(layout, Irregular):
        return {"held": [[rank, _pieces_to_json(pieces)] for rank, pieces in layout.held]}
    mesh: object = layout.mesh.to_json() if meshes is None else meshes.number(layout.mesh)
    return {"mesh": mesh, "placements": [_placement_to_json(placement) for placement in layout.placements]}


def from_json(document: object, meshes: Sequence[Mesh] = ()) -> Layout:
    """The sharding of a document; ``meshes`` is the table that mesh numbers refer to.

    `LayoutError`, naming the field, for anything malformed, out of range or contradictory.
    """
    if isinstance(document, dict) and "held" in document:
        return Irregular(tuple(_held_from_json(item) for item in items(document["held"], "held")))
    reference = member(document, "mesh", "sharding")
    if isinstance(reference, dict):
        mesh = Mesh.from_json(reference)
    else:
        mesh = meshes[integer(reference, "mesh number", most=len(meshes) - 1)]
    placements = items(member(document, "placements", "sharding"), "placements")
    return Sharding(mesh, tuple(_placement_from_json(item) for item in placements))


def _placement_to_json(placement: Placement) -> object:
    match placement:
        case Replicate():
            return "R"
        case Partial():
            return "P"
        case Shard(dim):
            return ["S", dim]
        case StridedShard(dim, split_factor):
            return ["SS", dim, split_factor]
        case Flat():
            return ["F", {key: getattr(placement, key) for key in _FLAT if getattr(placement, key) not in (0, None)}]


def _placement_from_json(document: object) -> Placement:
    match document:
        case "R":
            return Replicate()
        case "P":
            return Partial()
        case ["S", dim]:
            return Shard(integer(dim, "shard dimension", most=63))
        case ["SS", dim, factor]:
            return StridedShard(integer(dim, "shard dimension", most=63), integer(factor, "split factor", least=1))
        case ["F", dict() as fields] if fields.keys() <= set(_FLAT):
            part = fields.get("part")
            return Flat(
                integer(fields.get("offset", 0), "flat offset"),
                None if part is None else integer(part, "flat part", least=1),
                _flag(fields.get("padded", False), "flat padded"),
                _flag(fields.get("aligned", False), "flat aligned"),
                _flag(fields.get("in_place", False), "flat in_place"),
            )
    raise LayoutError(f"not a placement: {document!r:.80}")


def _flag(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise LayoutError(f"{what}: expected true or false, found {value!r:.60}")
    return value


def _pieces_to_json(pieces: Sequence[Piece]) -> list[object]:
    documents: list[object] = []
    start = 0
    for piece in pieces:
        document: list[object] = [list(piece.box.offsets), list(piece.box.shape)]
        if piece != Piece.packed(piece.box, start):
            document += [piece.start, list(piece.strides)]
        documents.append(document)
        start += piece.size
    return documents


def _held_from_json(document: object) -> tuple[int, tuple[Piece, ...]]:
    pair = items(document, "held")
    if len(pair) != 2:
        raise LayoutError(f"held: expected a rank and its pieces, found {document!r:.80}")
    pieces: list[Piece] = []
    start = 0
    for item in items(pair[1], "pieces"):
        fields = items(item, "piece")
        if len(fields) not in (2, 4):
            raise LayoutError(f"piece: expected offsets, shape and perhaps start and strides, found {item!r:.80}")
        box = Box(integers(fields[0], "piece offsets"), integers(fields[1], "piece shape"))
        piece = Piece.packed(box, start)
        if len(fields) == 4:
            piece = Piece(box, integer(fields[2], "piece start"), integers(fields[3], "piece strides"))
            if len(piece.strides) != box.ndim:
                raise LayoutError(f"piece {box}: {len(piece.strides)} strides for {box.ndim} dimensions")
        pieces.append(piece)
        start += piece.size
    return integer(pair[0], "rank", most=(1 << 31) - 1), tuple(pieces)
