"""`flatten`: a nested live state as tensor leaves and encoded values."""

from __future__ import annotations

import hashlib

from ckptengine.errors import UnusableRequest
from ckptengine.layout.sharding import Layout
from ckptengine.state import random as streams
from ckptengine.state.collect import Collector, Found, Walk
from ckptengine.state.collection import no_collection
from ckptengine.state.encoding import Json
from ckptengine.state.leaves import FlatState, TensorLeaf


def flatten(state: object, *, random: bool) -> FlatState:
    """Every tensor of ``state`` under its canonical name, and the rest as encoded values.

    ``state`` is a dict (or a module, or any value) nested in any way.  ``random``: capture the process's random streams
    too.  Nothing is copied: the leaves alias live memory.  Raises `UnsupportedValue`, naming the place in the state,
    for whatever has no encoding.
    """
    with no_collection():
        return freeze(collect(state), random=random)


def collect(state: object, *, meta_ok: bool = False) -> Walk:
    """Walk ``state`` once; `UnusableRequest` for something that is no state."""
    if state is None or isinstance(state, str | bytes | int | float):
        raise UnusableRequest(f"a state is a dict of what to save, not a {type(state).__name__}")
    return Collector(meta_ok=meta_ok).run(state)


def freeze(walk: Walk, *, random: bool) -> FlatState:
    """The immutable result of a walk."""
    leaves = tuple(leaf_of(found) for found in walk.found.values())
    rank_values: dict[str, Json] = {"values": walk.per_rank}
    if random:
        rank_values["random"] = streams.capture()
    return FlatState(leaves, dict(walk.aliases), walk.values, rank_values, structure_key(leaves, walk.aliases))


def leaf_of(found: Found) -> TensorLeaf:
    described = found.described
    return TensorLeaf(
        found.name,
        described.tensor,
        described.dtype,
        described.global_shape,
        described.sharding,
        described.pieces,
        found.role,
        found.eager,
        found.owners,
        found.follows,
    )


def structure_key(leaves: tuple[TensorLeaf, ...], aliases: dict[str, str]) -> str:
    """A digest of names, dtypes, shapes, shardings, ties and who follows; equal everywhere for equal structures."""
    texts: dict[int, str] = {}

    def text(sharding: Layout | None) -> str:
        if id(sharding) not in texts:
            texts[id(sharding)] = repr(sharding)
        return texts[id(sharding)]

    lines = [f"{leaf.name}\0{leaf.dtype}\0{leaf.global_shape}\0{text(leaf.sharding)}" for leaf in leaves]
    lines += [f"{alias}\0{owner}" for alias, owner in aliases.items()]
    lines += [f"\0{leaf.name}" for leaf in leaves if leaf.follows]
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()
