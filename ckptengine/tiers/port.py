"""The one port of a place where checkpoints rest.

A tier holds immutable objects under relative names (``step-000000100/rank-00000-a000001-n0001.bin``).  Its methods are
coroutines: the drain runs many at once on one loop, everything else goes through `ckptengine.tiers.loop.BlockingTier`.
Every method raises only errors of `ckptengine.errors`; none of their messages holds a credential.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ckptengine.errors import UnusableRequest

Bytes = bytes | bytearray | memoryview

_NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@,-]{0,199}")
PARTIAL = ".partial-"
"""How the names of what is not yet published begin, on tiers where such things have names.  A name that begins with a
dot is never an object, so never listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What a tier can do, declared or probed when it is opened.

    ``atomic_rename``: an object appears whole under its name by a rename.  ``conditional_put``: of two writers that
    create one name, one gets `AlreadyExists`, whatever the timing.  ``append``: an object can grow.  ``ranged_read``: a
    range is read without reading the rest.  ``resumable_parts``: parts of an upload go in parallel, in any order, and
    survive the death of the sender.  ``survives_process`` and ``survives_power_cut``: what an acknowledged object
    outlives; only a tier with the latter may ever call a checkpoint committed.
    """

    atomic_rename: bool
    conditional_put: bool
    append: bool
    ranged_read: bool
    resumable_parts: bool
    survives_process: bool
    survives_power_cut: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """One object: its name and its size in bytes."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the tier said about one part.

    ``tag``: what `Upload.finish` needs to know of it, across processes.  ``proven``: the tier itself confirmed the
    content by a checksum of its own, so that reading the part back would prove nothing more.
    """

    tag: str = ""
    proven: bool = False


Spare = Callable[[str], bool]


def nothing(name: str) -> bool:
    """Spares nothing."""
    del name
    return False


class Upload(Protocol):
    """An object on its way in, part by part; it does not exist before `finish`."""

    @property
    def token(self) -> str:
        """What a later process passes to `TierPort.upload` to go on; empty where that is not possible."""
        ...

    async def put(self, part: int, data: Bytes) -> Receipt:
        """Send part number ``part``: ``data`` lies at ``part * part_bytes``.  Sending a part again replaces it."""
        ...

    async def finish(self, receipts: Mapping[int, Receipt]) -> None:
        """Publish atomically and durably, once every part is in; `AlreadyExists` where the name is taken."""
        ...

    async def release(self) -> None:
        """Let go of local resources and leave what has arrived for a later process."""
        ...

    async def abort(self) -> None:
        """Remove what has arrived."""
        ...


class TierPort(Protocol):
    """Where checkpoints rest."""

    @property
    def label(self) -> str:
        """The place in words, fit for messages: no credentials."""
        ...

    @property
    def abilities(self) -> Abilities: ...

    async def entries(self, prefix: str = "") -> list[Entry]:
        """Published objects whose name starts with ``prefix``, by name; empty where nothing is there."""
        ...

    async def stat(self, name: str) -> Entry | None:
        """The object, or None where there is none."""
        ...

    async def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        """Exactly these bytes; `NotFound` without the object, `Truncated` where it ends before them."""
        ...

    async def read_into(self, name: str, offset: int, view: memoryview) -> None:
        """The same, straight into writable memory."""
        ...

    async def create(self, name: str, data: Bytes) -> None:
        """Publish a small object atomically and durably, or raise `AlreadyExists` and leave the one there as it is."""
        ...

    async def upload(self, name: str, size_bytes: int, part_bytes: int, token: str | None = None) -> Upload:
        """Begin an object of ``size_bytes``, or go on with the one of ``token``; `NotFound` where that one is gone."""
        ...

    async def delete(self, name: str) -> None:
        """Remove an object; nothing happens where there is none."""
        ...

    async def sweep(self, prefix: str, spare: Spare = nothing) -> list[str]:
        """Remove unfinished uploads under ``prefix``, and directories left empty; what was removed.

        ``spare``: says of the name that an upload is for whether it must stay, as somebody may still be sending it.
        """
        ...

    async def close(self) -> None:
        """Give back connections and file descriptors."""
        ...


def check_name(name: str) -> str:
    """``name``, if it is a plain relative path of safe characters; `UnusableRequest` otherwise."""
    parts = name.split("/")
    if len(parts) > 8 or not all(_NAME_PART.fullmatch(part) for part in parts):
        raise UnusableRequest(
            f"object name {name!r} is not a relative path of letters, digits and '._+=@,-', "
            f"each part beginning with a letter or digit"
        )
    return name


def check_range(name: str, offset: int, size_bytes: int) -> None:
    """Refuse a negative range."""
    if offset < 0 or size_bytes < 0:
        raise UnusableRequest(f"cannot read {size_bytes} bytes at {offset} of {name}: negative range")
