"""The history of a root as it lies there: attempts, commits, and the current line.  Reading only, local or remote."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Protocol

from ckptengine.errors import CheckpointError, Damaged, NotFound, UnreadableFormat
from ckptengine.store import names
from ckptengine.store.envelope import unseal


@dataclass(frozen=True, slots=True, order=True)
class CommitRef:
    """One manifest: that of ``step`` by save number ``save`` of ``attempt``."""

    step: int
    attempt: int
    save: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What one opening for writing recorded: its number, the run, and the commits it builds on.

    ``root``: where its checkpoints come to rest, where tiers lie in front of that; ``digest``: that of the record.
    """

    number: int
    run: str
    parent: int
    inherited: frozenset[CommitRef] = field(default_factory=frozenset)
    root: str = ""
    digest: str = field(default="", compare=False)


class RootFiles(Protocol):
    """Read-only names and bytes beneath a root; ``entries`` marks folders with a trailing ``/``, none for no folder."""

    def entries(self, folder: str = "") -> list[str]: ...
    def size(self, path: str) -> int: ...
    def read(self, path: str, offset: int, nbytes: int) -> bytes: ...


class History:
    """What lies beneath a root.  Stateless: every call looks."""

    def __init__(self, files: RootFiles) -> None:
        self._files = files

    def commits(self) -> list[CommitRef]:
        """Every manifest beneath the root, whichever line of history it belongs to, ordered."""
        found: list[CommitRef] = []
        for entry in self._files.entries():
            step = names.STEP_PATTERN.match(entry.rstrip("/"))
            if step is None or not entry.endswith("/"):  # a file or a link is no step of ours
                continue
            try:
                inside = self._files.entries(entry.rstrip("/"))
            except UnreadableFormat:  # a link that leads out
                continue
            for name in inside:
                match = names.MANIFEST_PATTERN.match(name)
                if match:
                    found.append(CommitRef(int(step[1]), int(match[1]), int(match[2])))
        return sorted(found)

    def attempt_numbers(self) -> list[int]:
        """Numbers that have been claimed, in order."""
        matches = (names.ATTEMPT_PATTERN.match(name) for name in self._files.entries(names.ATTEMPTS))
        return sorted({int(match[1]) for match in matches if match})

    def read_attempt(self, number: int) -> Attempt | None:
        """The record of an attempt, from whichever of its two copies is intact; None where it died before writing one.

        Raises `Damaged` when records exist and none of them is intact.
        """
        problems: list[CheckpointError] = []
        for copy in (0, 1):
            path = f"{names.ATTEMPTS}/{names.attempt_record(number, copy)}"
            try:
                return decode_attempt(self._files.read(path, 0, self._files.size(path)), number, path)
            except NotFound:
                continue
            except (Damaged, UnreadableFormat) as error:
                problems.append(error)
        if problems:
            raise problems[0]
        return None

    def damaged_records(self) -> list[CheckpointError]:
        """What is wrong with any copy of any attempt's record."""
        problems: list[CheckpointError] = []
        for number in self.attempt_numbers():
            for copy in (0, 1):
                path = f"{names.ATTEMPTS}/{names.attempt_record(number, copy)}"
                try:
                    decode_attempt(self._files.read(path, 0, self._files.size(path)), number, path)
                except NotFound:
                    continue  # an attempt that died before it recorded anything
                except (Damaged, UnreadableFormat) as error:
                    problems.append(error)
        return problems

    def newest_attempt(self) -> Attempt | None:
        """The newest attempt that has a record; it defines the current line of history."""
        for number in reversed(self.attempt_numbers()):
            attempt = self.read_attempt(number)
            if attempt is not None:
                return attempt
        return None

    def visible(self) -> list[CommitRef]:
        """Every commit of the current line of history in order, replaced ones of a step included."""
        newest = self.newest_attempt()
        return [
            ref for ref in self.commits() if newest is None or ref.attempt == newest.number or ref in newest.inherited
        ]

    def line(self) -> dict[int, CommitRef]:
        """The current line of history: for each step the commit that counts, oldest step first."""
        return {ref.step: ref for ref in self.visible()}  # in order: the highest (attempt, save) of a step is met last


def decode_attempt(data: bytes, number: int, where: str) -> Attempt:
    """The record of attempt ``number`` from its bytes.  Raises `Damaged` or `UnreadableFormat`."""
    body = unseal("attempt", data, where)
    try:
        inherited = frozenset(CommitRef(int(s), int(a), int(n)) for s, a, n in body["inherited"])
        attempt = Attempt(
            number=int(body["number"]),
            run=str(body["run"]),
            parent=int(body["parent"]),
            inherited=inherited,
            root=str(body.get("root", "")),
            digest=hashlib.sha256(data).hexdigest(),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableFormat(f"{where}: not the record of an attempt ({error})") from None
    if attempt.number != number:
        raise UnreadableFormat(f"{where}: is the record of attempt {attempt.number}; the file was renamed")
    return attempt
