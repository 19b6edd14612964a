"""Power cuts without a power switch: record every file operation, rebuild the tree as it may look after a cut.

What a file system owes after a cut is what was flushed: a file's bytes as of its last fsync, a directory's names as of
its last flush.  Everything else may be there or not.  `rebuild` makes the tree for a cut after any operation, with
everything unsynced dropped, everything kept (as after SIGKILL), names kept but bytes lost, or a random choice of each.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ckptengine.store.files import FileOps

Survivors = Literal["synced", "all", "names", "random"]


@dataclass(frozen=True, slots=True)
class Event:
    """One operation.  ``path`` (and ``target`` of link and rename) beneath the root; ``inode`` of a file."""

    name: str
    path: str = ""
    target: str = ""
    inode: int = 0
    offset: int = 0
    data: bytes = b""


@dataclass
class PowerLog(FileOps):
    """Does every operation and remembers it.  Everything must lie beneath ``root``, which is taken to be durable."""

    root: Path
    events: list[Event] = field(default_factory=list)
    _inodes: dict[int, int] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _made: int = 0

    def mark(self, name: str) -> None:
        """Add a note, such as an acknowledgement, between the operations."""
        with self._guard:
            self.events.append(Event(name))

    def _add(self, name: str, call: Callable[[], object], **facts: object) -> None:
        with self._guard:
            call()
            self.events.append(Event(name, **facts))  # type: ignore[arg-type]

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self.root)

    def create(self, path: Path, mode: int = 0o666) -> int:
        with self._guard:
            fd = super().create(path, mode)
            self._made += 1
            self._inodes[fd] = self._made
            self.events.append(Event("create", self._name(path), inode=self._made))
            return fd

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        with self._guard:
            done = super().pwrite(fd, data, offset)
            self.events.append(Event("pwrite", inode=self._inodes[fd], offset=offset, data=bytes(data[:done])))
            return done

    def preallocate(self, fd: int, nbytes: int) -> None:
        call = super().preallocate
        self._add("preallocate", lambda: call(fd, nbytes), inode=self._inodes[fd], offset=nbytes)

    def truncate(self, fd: int, nbytes: int) -> None:
        call = super().truncate
        self._add("truncate", lambda: call(fd, nbytes), inode=self._inodes[fd], offset=nbytes)

    def fsync(self, fd: int) -> None:
        call = super().fsync
        self._add("fsync", lambda: call(fd), inode=self._inodes[fd])

    def close(self, fd: int) -> None:
        with self._guard:
            super().close(fd)
            self.events.append(Event("close", inode=self._inodes.pop(fd)))

    def link(self, source: Path, target: Path) -> None:
        call = super().link
        self._add("link", lambda: call(source, target), path=self._name(source), target=self._name(target))

    def rename(self, source: Path, target: Path) -> None:
        call = super().rename
        self._add("rename", lambda: call(source, target), path=self._name(source), target=self._name(target))

    def unlink(self, path: Path) -> None:
        call = super().unlink
        self._add("unlink", lambda: call(path), path=self._name(path))

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        call = super().mkdir
        self._add("mkdir", lambda: call(path, mode), path=self._name(path))

    def rmdir(self, path: Path) -> None:
        call = super().rmdir
        self._add("rmdir", lambda: call(path), path=self._name(path))

    def fsync_dir(self, path: Path) -> None:
        call = super().fsync_dir
        self._add("fsync_dir", lambda: call(path), path=self._name(path))


@dataclass
class _File:
    live: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    unsynced: list[Event] = field(default_factory=list)


@dataclass
class _Folder:
    live: dict[str, _File | _Folder] = field(default_factory=dict)
    durable: dict[str, _File | _Folder] = field(default_factory=dict)


def rebuild(events: Sequence[Event], target: Path, survivors: Survivors, seed: int = 0) -> None:
    """Make the tree beneath ``target`` as a cut after ``events`` may leave it."""
    top = _Folder()
    files: dict[int, _File] = {}
    for event in events:
        _apply(top, files, event)
    _write(top, target, survivors, random.Random(seed))


def _folder(top: _Folder, path: str) -> _Folder:
    found = top
    for part in Path(path).parts:
        if part in ("..", "/"):
            return _Folder()  # above the root: durable already
        step = found.live[part]
        assert isinstance(step, _Folder)
        found = step
    return found


def _apply(top: _Folder, files: dict[int, _File], event: Event) -> None:
    parent, name = os.path.split(event.path)
    if event.name == "create":
        files[event.inode] = _folder(top, parent).live[name] = _File()
    elif event.name in ("pwrite", "preallocate", "truncate"):
        file = files[event.inode]
        _change(file.live, event)
        file.unsynced.append(event)
    elif event.name == "fsync":
        file = files[event.inode]
        file.durable, file.unsynced = bytes(file.live), []
    elif event.name in ("link", "rename"):
        to, new = os.path.split(event.target)
        _folder(top, to).live[new] = _folder(top, parent).live[name]
        if event.name == "rename":
            del _folder(top, parent).live[name]
    elif event.name in ("unlink", "rmdir"):
        del _folder(top, parent).live[name]
    elif event.name == "mkdir":
        _folder(top, parent).live[name] = _Folder()
    elif event.name == "fsync_dir":
        folder = _folder(top, event.path)
        folder.durable = dict(folder.live)


def _change(content: bytearray, event: Event) -> None:
    end = event.offset + len(event.data)
    if event.name == "truncate":
        del content[event.offset :]
    content.extend(bytes(max(0, end - len(content))))
    content[event.offset : end] = event.data


def _write(folder: _Folder, target: Path, survivors: Survivors, dice: random.Random) -> None:
    names = {"synced": folder.durable, "all": folder.live, "names": folder.live}.get(survivors)
    if names is None:
        names = dict(folder.durable)
        for name in sorted({*folder.live, *folder.durable}):
            if folder.live.get(name) is not folder.durable.get(name) and dice.random() < 0.5:
                names.pop(name, None)
                if name in folder.live:
                    names[name] = folder.live[name]
    target.mkdir(exist_ok=True)
    for name, node in names.items():
        if isinstance(node, _Folder):
            _write(node, target / name, survivors, dice)
        else:
            (target / name).write_bytes(_bytes_of(node, survivors, dice))


def _bytes_of(file: _File, survivors: Survivors, dice: random.Random) -> bytes:
    if survivors == "all":
        return bytes(file.live)
    if survivors == "names":  # the size is known, the bytes never arrived
        return file.durable + bytes(max(0, len(file.live) - len(file.durable)))
    content = bytearray(file.durable)
    if survivors == "random":
        for event in file.unsynced:
            if dice.random() < 0.5:
                cut = dice.randrange(len(event.data) + 1) if event.data and dice.random() < 0.3 else len(event.data)
                _change(content, Event(event.name, offset=event.offset, data=event.data[:cut]))
    return bytes(content)
