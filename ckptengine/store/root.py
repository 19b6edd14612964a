"""A root: attempts, the current line of history, and which manifest of each step counts."""

from __future__ import annotations

import datetime
import os
import socket
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ckptengine.errors import CheckpointError, Conflict, Damaged, NotFound, StorageFailed, Superseded, UnreadableFormat
from ckptengine.store import manifest as manifests
from ckptengine.store import names
from ckptengine.store.envelope import seal, unseal
from ckptengine.store.files import FileOps, make_dirs, publish, read_file, storage_failed

_ATTEMPT_LIMIT_BYTES = 1 << 28
_CLAIM_TRIES = 1000


@dataclass(frozen=True, slots=True, order=True)
class CommitRef:
    """One manifest: that of ``step`` by save number ``save`` of ``attempt``."""

    step: int
    attempt: int
    save: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What one opening for writing recorded: its number, the run, and the commits it builds on."""

    number: int
    run: str
    parent: int
    inherited: frozenset[CommitRef] = field(default_factory=frozenset)


class Root:
    """The directory in which a run's checkpoints rest, for reading and for claiming attempts.  Stateless: every call looks."""

    def __init__(self, path: str | os.PathLike[str], ops: FileOps | None = None, mode: int | None = None) -> None:
        self.path = Path(path).absolute()
        self.ops = ops or FileOps()
        self.mode = mode

    # ---- reading

    def exists(self) -> bool:
        return (self.path / names.ATTEMPTS).is_dir()

    def commits(self) -> list[CommitRef]:
        """Every manifest beneath the root, whichever line of history it belongs to, ordered."""
        found: list[CommitRef] = []
        for entry in _listdir(self.path):
            step = names.STEP_PATTERN.match(entry)
            if step is None:
                continue
            for name in _listdir(self.path / entry):
                match = names.MANIFEST_PATTERN.match(name)
                if match:
                    found.append(CommitRef(int(step[1]), int(match[1]), int(match[2])))
        return sorted(found)

    def attempt_numbers(self) -> list[int]:
        """Numbers that have been claimed, in order."""
        matches = (names.ATTEMPT_PATTERN.match(name) for name in _listdir(self.path / names.ATTEMPTS))
        return sorted({int(match[1]) for match in matches if match})

    def read_attempt(self, number: int) -> Attempt | None:
        """The record of an attempt, from whichever of its two copies is intact; None where it died before writing one.

        Raises `Damaged` when records exist and none of them is intact.
        """
        problems: list[CheckpointError] = []
        for copy in (0, 1):
            path = self.path / names.ATTEMPTS / names.attempt_record(number, copy)
            try:
                return _decode_attempt(read_file(path, _ATTEMPT_LIMIT_BYTES), number, str(path))
            except NotFound:
                continue
            except (Damaged, UnreadableFormat) as error:
                problems.append(error)
        if problems:
            raise problems[0]
        return None

    def newest_attempt(self) -> Attempt | None:
        """The newest attempt that has a record; it defines the current line of history."""
        for number in reversed(self.attempt_numbers()):
            attempt = self.read_attempt(number)
            if attempt is not None:
                return attempt
        return None

    def line(self) -> dict[int, CommitRef]:
        """The current line of history: for each step the commit that counts, oldest step first."""
        newest = self.newest_attempt()
        line: dict[int, CommitRef] = {}
        for ref in self.commits():
            if newest is None or ref.attempt == newest.number or ref in newest.inherited:
                line[ref.step] = ref  # in order: the highest (attempt, save) of a step is met last
        return line

    def manifest_path(self, ref: CommitRef) -> Path:
        return self.step_path(ref.step) / names.manifest(ref.attempt, ref.save)

    def step_path(self, step: int) -> Path:
        return self.path / names.step_dir(step)

    def manifest(self, ref: CommitRef) -> manifests.Manifest:
        """Read and check a manifest, also that it is the one its name says."""
        path = self.manifest_path(ref)
        manifest = manifests.decode(read_file(path, manifests.MANIFEST_LIMIT_BYTES), str(path))
        if (manifest.step, manifest.attempt, manifest.save) != (ref.step, ref.attempt, ref.save):
            raise UnreadableFormat(
                f"{path}: says step {manifest.step}, attempt {manifest.attempt}, save {manifest.save}; the file was renamed"
            )
        return manifest

    # ---- writing

    def claim(self, run: str | None, *, upto: int | None = None) -> Attempt:
        """Claim the next attempt and record what it builds on: the current line, up to step ``upto`` where given.

        The number is claimed by exclusive create *before* the commits are listed; a writer of an older attempt that
        publishes later finds the claim and does not acknowledge (`check_newest`).  Durable when it returns.
        """
        directory = self.path / names.ATTEMPTS
        make_dirs(self.ops, directory, self.mode)
        known = self.attempt_numbers()
        parent = self.newest_attempt()
        if parent is not None and run is not None and run != parent.run:
            raise Conflict(
                f"{self.path}: holds checkpoints of run {parent.run!r}, not of {run!r}; use another root or that run's id"
            )
        number = self._claim_number(directory, (known[-1] if known else 0) + 1)
        inherited = frozenset(ref for ref in self.line().values() if upto is None or ref.step <= upto)
        attempt = Attempt(
            number=number,
            run=run or (parent.run if parent else uuid.uuid4().hex),
            parent=parent.number if parent else 0,
            inherited=inherited,
        )
        data = _encode_attempt(attempt)
        for copy in (0, 1):
            publish(self.ops, directory / names.attempt_record(number, copy), data, mode=self.file_mode)
        return attempt

    @property
    def file_mode(self) -> int:
        return 0o666 if self.mode is None else self.mode & 0o666

    def _claim_number(self, directory: Path, first: int) -> int:
        for number in range(first, first + _CLAIM_TRIES):
            try:
                publish(self.ops, directory / names.attempt_claim(number), b"", mode=self.file_mode)
            except FileExistsError:
                continue
            return number
        raise StorageFailed(f"{directory}: {_CLAIM_TRIES} attempts in a row were claimed by others; is a job restarting in a loop?")

    def check_newest(self, attempt: int) -> None:
        """`Superseded` when a newer attempt has been claimed."""
        newest = self.attempt_numbers()[-1:]
        if newest and newest[0] > attempt:
            raise Superseded(
                f"{self.path}: attempt {newest[0]} took over from attempt {attempt}; this job may not commit any more"
            )

    def commit(self, manifest: manifests.Manifest) -> None:
        """Publish a manifest durably, then make sure that no newer attempt took over meanwhile.

        Returns only when the checkpoint survives a power cut.  Every rank file must be durable before.
        """
        self.check_newest(manifest.attempt)
        path = self.step_path(manifest.step) / manifest.file
        try:
            publish(self.ops, path, manifest.encode(), mode=self.file_mode)
        except FileExistsError:
            raise Superseded(f"{path} exists already: another process commits as this attempt") from None
        self.check_newest(manifest.attempt)


def _encode_attempt(attempt: Attempt) -> bytes:
    return seal(
        "attempt",
        {
            "number": attempt.number,
            "run": attempt.run,
            "parent": attempt.parent,
            "inherited": [[r.step, r.attempt, r.save] for r in sorted(attempt.inherited)],
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "created": utc_now(),
        },
    )


def _decode_attempt(data: bytes, number: int, where: str) -> Attempt:
    body = unseal("attempt", data, where)
    try:
        inherited = frozenset(CommitRef(int(s), int(a), int(n)) for s, a, n in body["inherited"])
        attempt = Attempt(
            number=int(body["number"]), run=str(body["run"]), parent=int(body["parent"]), inherited=inherited
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableFormat(f"{where}: not the record of an attempt ({error})") from None
    if attempt.number != number:
        raise UnreadableFormat(f"{where}: is the record of attempt {attempt.number}; the file was renamed")
    return attempt


def utc_now() -> str:
    """Wall-clock time for people to read; nothing is ordered by it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _listdir(path: Path) -> Iterable[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_failed("list", path, error) from error
