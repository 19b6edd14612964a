"""A root: attempts, the current line of history, and which manifest of each step counts."""

from __future__ import annotations

import datetime
import os
import socket
import uuid
from pathlib import Path

from ckptengine.errors import Conflict, NotFound, StorageFailed, Superseded, UnreadableFormat
from ckptengine.store import manifest as manifests
from ckptengine.store import names
from ckptengine.store.envelope import seal
from ckptengine.store.files import FileOps, make_dirs, publish, read_file, storage_failed
from ckptengine.store.history import Attempt, CommitRef, History

_CLAIM_TRIES = 1000


class Root:
    """The directory in which a run's checkpoints rest, for reading and for claiming attempts; every call looks anew.

    ``shared``: all ranks must see one another's files here, because they stay here.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        ops: FileOps | None = None,
        mode: int | None = None,
        *,
        shared: bool = False,
    ) -> None:
        self.path = Path(path).absolute()
        self.shared = shared
        self.ops = ops or FileOps()
        self.mode = mode
        self.history = History(self)

    def entries(self, folder: str = "") -> list[str]:
        """Names beneath the root; see `RootFiles`."""
        try:
            with os.scandir(self.path / folder) as found:
                return sorted(entry.name + "/" * entry.is_dir(follow_symlinks=False) for entry in found)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_failed("list", self.path / folder, error) from error

    def size(self, path: str) -> int:
        try:
            return os.stat(self.path / path, follow_symlinks=False).st_size
        except FileNotFoundError:
            raise NotFound(f"no file {self.path / path}") from None
        except OSError as error:
            raise storage_failed("look at", self.path / path, error) from error

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        return read_file(self.path / path, manifests.MANIFEST_LIMIT_BYTES)[offset : offset + nbytes]

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
                f"{path}: says step {manifest.step}, attempt {manifest.attempt}, save {manifest.save}; "
                "the file was renamed"
            )
        return manifest

    # ---- writing

    def require_run(self, run: str | None) -> Attempt | None:
        """The newest attempt.  Raises `Conflict` where a ``run`` is given and that attempt is of another."""
        parent = self.history.newest_attempt()
        if parent is not None and run is not None and run != parent.run:
            raise Conflict(
                f"{self.path}: holds checkpoints of run {parent.run!r}, not of {run!r}; "
                "use another root or that run's id"
            )
        return parent

    def claim(self, run: str | None, *, upto: int | None = None, rests_at: str = "") -> Attempt:
        """Claim the next attempt and record what it builds on: the current line, up to step ``upto`` where given.

        ``rests_at``: the root that its checkpoints are carried on to, where it is another than this.

        The number is claimed by exclusive create *before* the commits are listed; a writer of an older attempt that
        publishes later finds the claim and does not acknowledge (`check_newest`).  Durable when it returns.
        """
        directory = self.path / names.ATTEMPTS
        make_dirs(self.ops, directory, self.mode)
        known = self.history.attempt_numbers()
        parent = self.require_run(run)
        number = self._claim_number(directory, (known[-1] if known else 0) + 1)
        inherited = frozenset(ref for ref in self.history.line().values() if upto is None or ref.step <= upto)
        attempt = Attempt(
            number=number,
            run=run or (parent.run if parent else uuid.uuid4().hex),
            parent=parent.number if parent else 0,
            inherited=inherited,
            root=rests_at,
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
        raise StorageFailed(
            f"{directory}: {_CLAIM_TRIES} attempts in a row were claimed by others; is a job restarting in a loop?"
        )

    def check_newest(self, attempt: int) -> None:
        """`Superseded` when a newer attempt has been claimed, or the claim of this one is not there any more."""
        claimed = self.history.attempt_numbers()
        if claimed and claimed[-1] > attempt:
            raise Superseded(
                f"{self.path}: attempt {claimed[-1]} took over from attempt {attempt}; this job may not commit any more"
            )
        if attempt not in claimed:
            raise Superseded(f"{self.path}: was removed or replaced during the save; nothing is committed there")

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
            **({"root": attempt.root} if attempt.root else {}),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "created": utc_now(),
        },
    )


def utc_now() -> str:
    """Wall-clock time for people to read; nothing is ordered by it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
