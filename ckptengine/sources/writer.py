"""The port of every target format: a conversion is a set of independent units, each of which writes some files.

A writer never sees a model.  It is given a `Job` (headers of all tensors, plain values, a budget of memory) and cuts it
into `Unit`s; it writes one unit at a time, reading boxes of tensors through ``Job.read`` and appending bytes to files
of the `Target`; and when every unit is done it writes what names them all (an index, a manifest, consolidated
metadata).  Units are what runs in parallel, on several machines, and what is not done again after a kill.

What a writer must keep to:

- ``units`` depends on the job alone, so that every machine of a job array and every later run finds the same ones.
- ``write`` asks for each element of each tensor once (the digests of what is read are compared with the source's), in
  boxes of at most ``Job.chunk_bytes`` where the format allows, and writes each byte of the target once.
- what ``write`` returns is all that ``finish`` knows of a unit; it is JSON, since it is kept in a journal.
- ``finish`` writes small files only, the one that makes the target a checkpoint last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ckptengine.errors import UnusableRequest
from ckptengine.layout.box import Box
from ckptengine.layout.tensor import LogicalTensor

Document = dict[str, Any]
"""Anything that JSON holds, under string keys."""

Wanted = tuple[str, Box, memoryview]
"""A box of a tensor and the contiguous buffer that it is to fill."""

AXES = ("dp", "tp", "pp", "vpp", "ep", "etp", "cp")
DEFAULT_ORDER = "tp-cp-ep-dp-pp"

MAX_PATH = 100
"""A nesting that is deeper is not kept."""


class Sink(Protocol):
    """One file of the target that is being written, from its first byte to its last."""

    @property
    def position(self) -> int:
        """Bytes appended so far."""
        ...

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append; `StorageFailed` naming the file when the storage refuses."""
        ...


class Target(Protocol):
    """Where files of the target are made.  Paths are relative with ``/``, as in `Files`."""

    @property
    def root(self) -> str:
        """The target as shown to people, without credentials."""
        ...

    def create(self, path: str) -> AbstractContextManager[Sink]:
        """A new file, replacing what an earlier try left there; durable when the block ends without an error."""
        ...

    def put(self, path: str, data: bytes | bytearray | memoryview) -> None:
        """A whole file at once: `create` for what is small."""
        ...

    def local_path(self, path: str) -> str | None:
        """Where the file will be for the operating system, or None on remote storage."""
        ...


@dataclass(frozen=True, slots=True)
class Layout:
    """The parallel layout of a target: degrees of each axis (1 where not given), ZeRO stage and order of ranks.

    ``zero`` is None where no stage was given, which is not stage 0; ``ep`` where nothing was said of experts; ``etp``
    where they are cut like all else.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int | None = None
    etp: int | None = None
    cp: int = 1
    zero: int | None = None
    order: str = DEFAULT_ORDER

    @classmethod
    def parse(cls, text: str) -> Layout:
        """``dp=4,tp=2,pp=2,zero=1,order=tp-cp-ep-dp-pp``; `UnusableRequest` for anything else."""
        found: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            key, _, value = item.partition("=")
            if key in found:
                raise UnusableRequest(f"layout {text!r}: {key} is given twice")
            if key == "order":
                axes = value.split("-")
                if len(set(axes)) != len(axes) or not set(axes) <= set(AXES):
                    raise UnusableRequest(f"layout {text!r}: {value!r} is no order; write it like {DEFAULT_ORDER}")
                found[key] = value
                continue
            if key not in (*AXES, "zero"):
                raise UnusableRequest(f"layout {text!r}: no axis {key!r}; axes are {', '.join(AXES)}, zero and order")
            least, most = (0, 3) if key == "zero" else (1, 1 << 20)
            if not value.isascii() or not value.isdigit() or not least <= int(value) <= most:
                raise UnusableRequest(f"layout {text!r}: {key} must be a number from {least} to {most}")
            found[key] = int(value)
        return cls(**found)


@dataclass(frozen=True, slots=True)
class Unit:
    """Work that is done whole or not at all: one or a few files.

    ``key`` names it, the same in every run of the same job.  ``tensors`` are the names it reads.  ``memory_bytes`` is
    what it needs at most while it runs, beside small things.
    """

    key: str
    tensors: tuple[str, ...]
    read_bytes: int
    write_bytes: int
    memory_bytes: int
    files: tuple[str, ...]


def no_path(name: str) -> tuple[object, ...] | None:
    """`ckptengine.sources.port.KnowsPaths.path` of a source that knows none."""
    return None


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a writer may know about what it writes.

    ``tensor(name)`` gives a header whose shape and dtype are the target's; ``read(name, box, out)`` fills a writable
    contiguous buffer or an array of the box's shape; ``read_many(wanted)`` does so for many small boxes at once, which
    is several times as fast where they lie near each other.  All may be called from several threads.  ``values`` are
    plain values; ``encoded_values`` their typed encoding where the source holds that, which loses nothing, else None.
    ``target_name`` is the last part of the target's path, for formats in which it says file or folder.
    ``path(name)`` is `ckptengine.sources.port.KnowsPaths.path` of the source.
    """

    names: Sequence[str]
    tensor: Callable[[str], LogicalTensor]
    read: Callable[[str, Box, Any], None]
    read_many: Callable[[Sequence[Wanted]], None]
    values: object
    encoded_values: object
    aliases: Mapping[str, str]
    step: int | None
    metrics: Mapping[str, float]
    layout: Layout
    chunk_bytes: int
    options: Mapping[str, object] = field(default_factory=dict)
    provenance: Mapping[str, object] = field(default_factory=dict)
    rules: str | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    target_name: str = ""
    path: Callable[[str], tuple[object, ...] | None] = no_path

    def flag(self, option: str) -> bool:
        """An option that is true or false; false where it is not given."""
        value = self.options.get(option, False)
        if not isinstance(value, bool):
            raise UnusableRequest(f"option {option} = {value!r} is neither true nor false")
        return value

    def place(self, name: str) -> tuple[object, ...]:
        """The keys and list positions of a tensor in a nested state: as it was nested where that is known.

        Elsewhere the first part of its name is a dict, as a module's state dict is one, and the rest the key in it.
        """
        path = self.path(name)
        if path and len(path) <= MAX_PATH and ".".join(map(str, path)) == name:
            return path
        first, dot, rest = name.partition(".")
        return (first, rest) if dot else (name,)


class Writer(Protocol):
    """One target format."""

    @property
    def format(self) -> str: ...

    @property
    def options(self) -> tuple[str, ...]:
        """The names of all options that it knows."""
        ...

    @property
    def ranked(self) -> bool:
        """Whether it writes for a parallel layout."""
        ...

    def units(self, job: Job) -> Sequence[Unit]:
        """Cut the job; raises `UnusableRequest` or `RuleError` for what this format cannot hold.  Writes nothing."""
        ...

    def write(self, job: Job, unit: Unit, target: Target) -> Document:
        """Write the files of one unit; returns what ``finish`` needs to know of it."""
        ...

    def finish(self, job: Job, results: Mapping[str, Document], target: Target) -> None:
        """Write what names all units; ``results`` has what ``write`` returned, by key, for each of ``units(job)``.

        ``job.digests`` now holds the digest of every tensor whose elements were all read.
        """
        ...


@runtime_checkable
class WritesFile(Protocol):
    """The optional ability of a writer whose target may be one file (``model.pt``) instead of a folder."""

    def file(self, target_name: str) -> str | None:
        """The path, among those that it writes, of the file that becomes a target of this name; None for a folder."""
        ...
