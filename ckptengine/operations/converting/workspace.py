"""The unfinished target of a conversion: its files, a record of every unit that is done, and how it becomes the target.

Local: everything lies in the hidden folder ``.<name>.convert`` beside the target and is renamed into place at the end.
Remote: files are written where they belong, which is no checkpoint until the last of them is there; records lie beside.
A later run of the same conversion goes on from the records.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ckptengine.errors import AlreadyExists, RootInUse, StorageFailed, UnusableRequest
from ckptengine.sources.files import is_url
from ckptengine.sources.target import LocalTarget, RemoteTarget
from ckptengine.sources.writer import Document, Target
from ckptengine.store.files import guarded

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Workspace(Protocol):
    """Where one conversion is under way."""

    @property
    def target(self) -> Target: ...

    def open(self, fingerprint: str, turn: str) -> None:
        """Begin, or go on with, the conversion of this fingerprint; ``turn`` names the part that this process does.

        Raises `AlreadyExists` where the target exists or another conversion to it was left unfinished, and `RootInUse`
        where another process is doing the same part.
        """
        ...

    def done(self) -> dict[str, Document]:
        """The records of finished units, by key: those of this machine since it started, and those that are settled."""
        ...

    def record(self, key: str, document: Document) -> None:
        """Remember that a unit is finished; machines that share the target hear of it when it is settled."""
        ...

    def settle(self, keys: Iterable[str]) -> None:
        """Make what this machine has written of these units durable, so that their records count everywhere."""
        ...

    def finishing(self) -> contextlib.AbstractContextManager[bool]:
        """Held by the one process that finishes; gives False where the target is there already."""
        ...

    def commit(self, single: str | None) -> None:
        """Make the target, or the ``single`` file of it, visible and durable; leaves nothing else behind."""
        ...

    def discard(self) -> None:
        """Remove everything that was written."""
        ...

    def close(self) -> None: ...


def open_workspace(target: str) -> Workspace:
    """The workspace of a target at a local path or a URL; nothing is made yet."""
    if is_url(target) and not target.startswith("file://"):
        return RemoteWorkspace(target)
    return LocalWorkspace(Path(target.removeprefix("file://")))


class LocalWorkspace:
    """See `Workspace`."""

    def __init__(self, path: Path) -> None:
        self._path = Path(os.path.abspath(path))
        if not self._path.name or "\0" in str(path):
            raise UnusableRequest(f"{path} cannot be a target; name a folder that does not exist yet")
        self._folder = self._path.parent / f".{self._path.name}.convert"
        self._tree = self._folder / "tree"
        self._units = self._folder / "units"
        self._settled = self._folder / "settled"
        self._boot = _boot()
        self._locks: list[int] = []
        self._target = LocalTarget(self._tree, str(self._path))

    @property
    def target(self) -> Target:
        return self._target

    def open(self, fingerprint: str, turn: str) -> None:
        if os.path.lexists(self._path):
            if self._folder.is_dir() and not self._tree.exists():  # killed right after its commit
                shutil.rmtree(self._folder, ignore_errors=True)
            raise AlreadyExists(f"{self._path} exists; choose another target, or move it away")
        fresh = not self._folder.exists()
        try:
            for folder in (self._tree, self._units, self._settled):
                guarded("create", folder, lambda f=folder: f.mkdir(parents=True, exist_ok=True))  # type: ignore[misc]
            self._lock(f"lock-{turn}", wait=False)
            found = _load(self._folder / "conversion.json")
            if found is None:
                _store(self._folder / "conversion.json", {"fingerprint": fingerprint})
        except StorageFailed:
            if fresh:
                self.discard()
            raise
        if found is not None and found.get("fingerprint") != fingerprint:
            raise AlreadyExists(
                f"{self._folder} holds an unfinished conversion of something else to {self._path}; "
                "finish that one, or delete the folder"
            )

    def _lock(self, name: str, *, wait: bool) -> int:
        path = self._folder / name
        fd = guarded("create", path, lambda: os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(fd)
            raise RootInUse(f"another process is converting to {self._path}; wait for it to end") from None
        self._locks.append(fd)
        return fd

    def done(self) -> dict[str, Document]:
        settled = self._settled_keys()
        found: dict[str, Document] = {}
        for entry in sorted(self._units.glob("*.json")):
            record = _load(entry)
            # What another machine wrote, or this one before it went down, may never have reached the disk.
            boot = None if record is None else record.get("boot")
            if record is None or not (boot == self._boot or (record["key"], boot) in settled):
                continue
            if all(os.path.exists(f"{self._tree}/{file}") for file in record.get("files", [])):
                found[record["key"]] = record
        return found

    def _settled_keys(self) -> set[tuple[str, str]]:
        notes = (_load(entry) for entry in self._settled.glob("*.json"))
        return {(key, note["boot"]) for note in notes if note is not None for key in note["keys"]}

    def record(self, key: str, document: Document) -> None:
        _store(self._units / f"{_digest(key)}.json", {**document, "key": key, "boot": self._boot})

    def settle(self, keys: Iterable[str]) -> None:
        self._target.sync()
        _store(self._settled / f"{uuid.uuid4().hex}.json", {"boot": self._boot, "keys": list(keys)})

    @contextlib.contextmanager
    def finishing(self) -> Iterator[bool]:
        try:
            self._lock("lock-finish", wait=True)
        except StorageFailed:
            if os.path.lexists(self._path):  # the process that finished took the folder away
                yield False
                return
            raise
        yield not os.path.lexists(self._path)

    def commit(self, single: str | None) -> None:
        self._target.sync()
        if os.path.lexists(self._path):
            raise AlreadyExists(f"{self._path} came into being during the conversion; move it away and run again")
        made = self._tree if single is None else self._tree / single
        guarded("rename", self._path, lambda: os.rename(made, self._path))
        parent = guarded("open", self._path.parent, lambda: os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY))
        try:
            guarded("sync", self._path.parent, lambda: os.fsync(parent))
        finally:
            os.close(parent)
        self.discard()

    def discard(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        while self._locks:
            os.close(self._locks.pop())


class RemoteWorkspace:
    """See `Workspace`.  Object stores have no locks: two runs of one conversion write the same bytes twice."""

    def __init__(self, url: str) -> None:
        self._target = RemoteTarget.from_url(url)
        self._system = self._target.system
        self._records = self._target.base + ".convert"

    @property
    def target(self) -> Target:
        return self._target

    def open(self, fingerprint: str, turn: str) -> None:
        with self._target.errors(""):
            found = self._load("conversion.json")
            if found is None and self._system.exists(self._target.base):
                raise AlreadyExists(f"{self._target.root} exists; choose another target, or move it away")
        if found is None:
            self._store("conversion.json", {"fingerprint": fingerprint})
        elif found.get("fingerprint") != fingerprint:
            raise AlreadyExists(
                f"{self._target.root}.convert holds an unfinished conversion of something else; finish that one, or "
                "delete both"
            )

    def _load(self, name: str) -> Document | None:
        path = f"{self._records}/{name}"
        if not self._system.exists(path):
            return None
        return _parse(self._system.cat_file(path))

    def _store(self, name: str, document: Document) -> None:
        with self._target.errors(""):
            self._system.makedirs(self._records, exist_ok=True)
            self._system.pipe_file(f"{self._records}/{name}", json.dumps(document).encode())

    def done(self) -> dict[str, Document]:
        found: dict[str, Document] = {}
        with self._target.errors(""):
            self._system.invalidate_cache()
            names = [str(path).rpartition("/")[2] for path in self._system.ls(self._records, detail=False)]
            for name in names:
                record = self._load(name) if name.startswith("unit-") else None
                if record is not None:
                    found[record["key"]] = record
        return found

    def record(self, key: str, document: Document) -> None:
        self._store(f"unit-{_digest(key)}.json", {**document, "key": key})

    def settle(self, keys: Iterable[str]) -> None:
        """An object is durable when it is there."""

    @contextlib.contextmanager
    def finishing(self) -> Iterator[bool]:
        with self._target.errors(""):
            self._system.invalidate_cache()
            under_way = self._load("conversion.json") is not None
        yield under_way

    def commit(self, single: str | None) -> None:
        if single is not None:
            raise UnusableRequest(f"{self._target.root} is written as a folder; name one that does not end in a suffix")
        with self._target.errors(""):
            self._system.rm(self._records, recursive=True)

    def discard(self) -> None:
        with contextlib.suppress(Exception):  # the error that led here is the one to report
            for path in (self._target.base, self._records):
                if self._system.exists(path):
                    self._system.rm(path, recursive=True)

    def close(self) -> None:
        """Nothing is held."""


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _boot() -> str:
    """Something that changes when the machine starts again; constant where that cannot be known."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _parse(data: bytes) -> Document | None:
    """A record, or None for one that was cut off while it was written."""
    try:
        document: Any = json.loads(data)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _load(path: Path) -> Document | None:
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return None


def _store(path: Path, document: Document) -> None:
    """Replace a small file whole."""
    fresh = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # other shards, on other machines too, may be at it
    guarded("write", path, lambda: fresh.write_text(json.dumps(document)))
    guarded("rename", path, lambda: os.replace(fresh, path))
