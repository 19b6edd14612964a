"""Several sources beneath one root as one: each part under a prefix of its own, values side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ckptengine.errors import Damaged, NotFound
from ckptengine.layout.tensor import Fragment, LogicalTensor
from ckptengine.sources.port import Files, HoldsZips, Source


@dataclass(frozen=True, slots=True)
class Part:
    """A source beneath ``folder`` of the root (``""``: the root itself).

    Of its names the first prefix in ``prefixes`` that fits is replaced by what is beside it; ``""`` fits every name.
    """

    source: Source
    folder: str = ""
    prefixes: Mapping[str, str] = field(default_factory=lambda: {"": ""})

    def renamed(self, name: str) -> str:
        for old, new in self.prefixes.items():
            if name.startswith(old):
                return new + name[len(old) :]
        return name


class JoinedSource:
    """The tensors of all parts.  Raises `Damaged` where two parts hold a tensor of one name."""

    metrics: Mapping[str, float] = {}

    def __init__(self, format: str, files: Files, parts: Sequence[Part], values: object, step: int | None) -> None:
        self.format = format
        self.step = step
        self.files: Files = RoutedFiles(files, {part.folder: part.source.files for part in parts if part.folder})
        self._values = values
        self._parts = parts
        self._held: dict[str, tuple[Part, str]] = {}
        self._aliases: dict[str, str] = {}
        for part in parts:
            for name in part.source.names():
                shown = part.renamed(name)
                if shown in self._held:
                    raise Damaged(f"tensor {shown!r} occurs twice in {files.root}")
                self._held[shown] = part, name
            self._aliases |= {part.renamed(a): part.renamed(b) for a, b in part.source.aliases().items()}

    def names(self) -> Sequence[str]:
        return list(self._held)

    def tensor(self, name: str) -> LogicalTensor:
        found = self._held.get(name)
        if found is None:
            raise NotFound(f"{self.files.root} has no tensor {name!r}")
        part, inner = found
        held = part.source.tensor(inner)
        before = f"{part.folder}/" if part.folder else ""
        fragments = [Fragment(each.box, before + each.file, each.offset, each.strides) for each in held.fragments]
        return LogicalTensor(name, held.dtype, held.shape, fragments, held.digest, held.meta)

    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def values(self) -> object:
        return self._values

    def zips(self) -> Iterator[tuple[str, int, int]]:
        """See `ckptengine.sources.port.HoldsZips`."""
        for part in self._parts:
            before = f"{part.folder}/" if part.folder else ""
            for path, offset, nbytes in part.source.zips() if isinstance(part.source, HoldsZips) else ():
                yield before + path, offset, nbytes


class RoutedFiles:
    """The files of a root, where what lies beneath some of its folders is read through other files."""

    def __init__(self, base: Files, folders: Mapping[str, Files]) -> None:
        self._base = base
        self._folders = folders

    def _route(self, path: str) -> tuple[Files, str]:
        folder, _, rest = path.partition("/")
        files = self._folders.get(folder)
        return (self._base, path) if files is None or not rest else (files, rest)

    @property
    def root(self) -> str:
        return self._base.root

    def size(self, path: str) -> int:
        files, rest = self._route(path)
        return files.size(rest)

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        files, rest = self._route(path)
        return files.read(rest, offset, nbytes)

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        files, rest = self._route(path)
        files.read_into(rest, offset, view)

    def exists(self, path: str) -> bool:
        files, rest = self._route(path)
        return files.exists(rest)

    def entries(self, folder: str = "") -> list[str]:
        return self._base.entries(folder)

    def sub(self, folder: str) -> Files:
        return self._base.sub(folder)

    def local_path(self, path: str) -> str | None:
        files, rest = self._route(path)
        return files.local_path(rest)

    def close(self) -> None:
        for files in (*self._folders.values(), self._base):
            files.close()
