"""Which ranks share a machine: one of them sees to what their machine has for itself."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Node:
    """The machine of one rank.  ``ranks``: those on it, None where that is not known; ``leads``: this is its first."""

    leads: bool
    ranks: Collection[int] | None = None


def node_of(rank: int, world: int) -> Node:
    """As the launcher tells (``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``); rank 0 leads its own where it does not."""
    told = _told()
    if world == 1 or told is None:
        return Node(rank == 0)
    local, count = told
    return Node(rank == 0 or local == 0, range(rank - local, rank - local + count))


def host() -> str | None:
    """What a rank tells the others of its machine, where the launcher does not say who shares it; else None."""
    return None if _told() is not None else socket.gethostname()


def among(rank: int, hosts: Sequence[str | None]) -> Node:
    """The node of ``rank`` from what every rank has told of its `host`, in rank order."""
    if len(hosts) == 1 or None in hosts:
        return node_of(rank, len(hosts))
    here = [other for other, name in enumerate(hosts) if name == hosts[rank]]
    return Node(here[0] == rank, here)


def _told() -> tuple[int, int] | None:
    try:
        return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
