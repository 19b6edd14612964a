"""The port of every checkpoint format: read-only files beneath a root, and a source of logical tensors.

A format is a `Format`: a name, a cheap probe and an opener.  The formats that this package knows are listed in
`ckptengine.sources.detect`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ckptengine.layout.tensor import LogicalTensor


class Files(Protocol):
    """Read-only bytes beneath a root.  Paths are relative, with ``/`` between their parts; ``""`` is the root itself.

    A path that would leave the root (absolute, ``..``, a link that leads out) raises `UnreadableFormat`; a file that
    does not exist raises `NotFound`.  Methods may be called from several threads.
    """

    @property
    def root(self) -> str:
        """The root as shown to people: a path or a URL without credentials."""
        ...

    def size(self, path: str) -> int:
        """Bytes in the file."""
        ...

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        """Exactly ``nbytes`` bytes from ``offset``; `Truncated` when the file ends before."""
        ...

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        """Fill ``view`` (contiguous bytes) from ``offset``; `Truncated` when the file ends before."""
        ...

    def exists(self, path: str) -> bool:
        """True for a file, and for a folder."""
        ...

    def entries(self, folder: str = "") -> list[str]:
        """Names directly inside ``folder``, sorted, those of folders with a trailing ``/``; empty if there is none."""
        ...

    def sub(self, folder: str) -> Files:
        """The files beneath ``folder``, which becomes the root."""
        ...

    def local_path(self, path: str) -> str | None:
        """A path that the operating system opens, or None when the bytes are not in a local file of their own."""
        ...

    def close(self) -> None:
        """Let go of open files; a later read opens them again."""
        ...


class Source(Protocol):
    """A checkpoint read as logical tensors: nothing of it changes, and no tensor byte is read to open it."""

    @property
    def format(self) -> str:
        """``"native"``, ``"dcp"``, ``"safetensors"``, ``"torch"``, ``"deepspeed"``, ..."""
        ...

    @property
    def step(self) -> int | None:
        """The training step, where the checkpoint or its folder says so."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]: ...

    @property
    def files(self) -> Files:
        """Where the files named in fragments are."""
        ...

    def names(self) -> Sequence[str]:
        """Canonical names of all logical tensors, aliases included.  Builds no tensor."""
        ...

    def tensor(self, name: str) -> LogicalTensor:
        """The tensor under a canonical name; `NotFound` for a name that is not in `names`."""
        ...

    def aliases(self) -> Mapping[str, str]:
        """Alias -> the name that it shares its bytes with."""
        ...

    def values(self) -> object:
        """Everything that is not a tensor, nested as it was, as plain values (see `ckptengine.sources.plain`)."""
        ...


@runtime_checkable
class Verifying(Protocol):
    """The optional ability of a source whose files carry checksums."""

    def read_verified(self, path: str, offset: int, view: memoryview) -> None:
        """Like `Files.read_into`, but raises `DigestMismatch` when the bytes are not those that were written."""
        ...


@runtime_checkable
class HoldsEncodedValues(Protocol):
    """The optional ability of a source that keeps the typed encoding of a live state's values."""

    def encoded_values(self) -> object:
        """The encoding; None where the checkpoint was made from another format, and holds no live state's."""
        ...


@runtime_checkable
class KnowsPaths(Protocol):
    """The optional ability of a source that knows how tensors were nested, which names alone do not say."""

    def path(self, name: str) -> tuple[object, ...] | None:
        """The keys (strings) and list positions (ints) that lead to a tensor; None where they are not known."""
        ...


@runtime_checkable
class KeepsOrder(Protocol):
    """The optional ability of a source whose names come in the order in which the model's ``state_dict`` had them."""

    keeps_order: bool


@runtime_checkable
class Checksummed(Protocol):
    """The optional ability of a source that records checksums of whole files."""

    def checksums(self) -> Mapping[str, str]:
        """The SHA-256 of each file in hexadecimal, by its path; empty where none were recorded."""
        ...


@runtime_checkable
class HoldsZips(Protocol):
    """The optional ability of a source that has files of torch.save inside of larger files."""

    def zips(self) -> Iterable[tuple[str, int, int]]:
        """The file, the offset and the size of each."""
        ...


@dataclass(frozen=True, slots=True)
class Opening:
    """What an opener is given.

    ``entry`` is the file that the user named, or None when a folder was named.  ``step`` is the wanted step (None: the
    newest) for a format whose root holds several, and the step told by the folder's name for the others.  ``rules`` is
    a rule file's path or a preset's name.
    """

    files: Files
    entry: str | None = None
    step: int | None = None
    rules: str | os.PathLike[str] | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """One readable format.  ``probe`` looks at names and a few bytes only and never raises for a strange folder.

    ``picks_step``: its root holds several steps, of which it opens the wanted one.
    """

    name: str
    probe: Callable[[Opening], bool]
    open: Callable[[Opening], Source]
    picks_step: bool = False
