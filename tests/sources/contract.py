"""What every source must keep to.  A test class of a format subclasses this and adds the fixture ``source``."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ckptengine.errors import NotFound
from ckptengine.layout.cover import prove_cover
from ckptengine.layout.dtypes import itemsize
from ckptengine.sources.files import INLINE
from ckptengine.sources.port import Files, Source

PLAIN = (type(None), bool, int, float, complex, str, bytes, np.ndarray)


def plain_or_fail(value: object, where: str = "values") -> None:
    """Only the types that `ckptengine.sources.plain` names."""
    if isinstance(value, dict):
        for key, item in value.items():
            hash(key)
            plain_or_fail(item, f"{where}.{key}")
    elif isinstance(value, list | tuple | set):
        for number, item in enumerate(value):
            plain_or_fail(item, f"{where}[{number}]")
    else:
        assert type(value) in PLAIN, f"{where} is a {type(value).__name__}"


class SourceContract:
    """The contract of `ckptengine.sources.port.Source`."""

    def test_names_are_unique_and_each_is_a_tensor(self, source: Source) -> None:
        names = list(source.names())
        assert names
        assert len(set(names)) == len(names)
        for name in names:
            tensor = source.tensor(name)
            assert tensor.name in (name, source.aliases().get(name)), name
            assert itemsize(tensor.dtype) > 0
            assert all(type(extent) is int and extent >= 0 for extent in tensor.shape)
            assert tensor.nbytes == math.prod(tensor.shape) * itemsize(tensor.dtype)

    def test_fragments_tile_each_tensor_inside_of_the_files(self, source: Source) -> None:
        sizes: dict[str, int] = {}
        for name in source.names():
            tensor = source.tensor(name)
            prove_cover(name, tensor.shape, [fragment.box for fragment in tensor.fragments])
            for fragment in tensor.fragments:
                if fragment.box.size:
                    size = sizes.setdefault(fragment.file, source.files.size(fragment.file))
                    end = fragment.offset + fragment.span_elements() * itemsize(tensor.dtype)
                    assert 0 <= fragment.offset <= end <= size, name

    def test_aliases_read_the_same_bytes(self, source: Source) -> None:
        names = set(source.names())
        for alias, name in source.aliases().items():
            assert {alias, name} <= names
            assert name not in source.aliases()
            one, other = source.tensor(alias), source.tensor(name)
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert list(one.fragments) == list(other.fragments)

    def test_values_are_plain(self, source: Source) -> None:
        plain_or_fail(source.values())
        assert source.step is None or type(source.step) is int
        assert all(isinstance(value, float | int) for value in source.metrics.values())

    def test_unknown_names(self, source: Source) -> None:
        with pytest.raises(NotFound, match="no-such-tensor"):
            source.tensor("no-such-tensor")

    def test_nothing_is_written(self, source: Source) -> None:
        root = Path(source.files.root)
        before = _listing(root)
        for name in source.names():
            source.tensor(name)
        source.values()
        assert _listing(root) == before

    def test_files_are_let_go(self, source: Source) -> None:
        files: Files = source.files
        name = next(name for name in source.names() if source.tensor(name).nbytes)
        fragment = source.tensor(name).fragments[0]
        first = files.read(fragment.file, fragment.offset, 1)
        files.close()
        assert files.read(fragment.file, fragment.offset, 1) == first
        assert fragment.file.startswith(INLINE) or files.local_path(fragment.file) is not None


def _listing(root: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*"))
