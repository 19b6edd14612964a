"""The manifest: the record that makes a checkpoint exist.  Size grows with the layout, not with the fragments."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ckptengine.errors import LayoutError, UnreadableFormat
from ckptengine.layout.digest import GRANULE_BYTES, format_digest
from ckptengine.layout.dtypes import ITEMSIZE, itemsize
from ckptengine.plan.write import ASSIGNMENT_VERSION, Writer, writer_from_json, writer_to_json
from ckptengine.store import names
from ckptengine.store.envelope import seal, unseal
from ckptengine.store.rankfile import FOOTER_BYTES, HEADER_BYTES, FileIdentity

KIND = "manifest"
MANIFEST_LIMIT_BYTES = 1 << 30
_HEX16 = re.compile(r"[0-9a-f]{16}\Z")


class TensorRecord(NamedTuple):  # a tuple: there is one per tensor
    """One logical tensor: ``layout`` indexes `Manifest.layouts`; ``writer`` says which replica stored which part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: int
    writer: Writer
    crc: int

    @property
    def digest(self) -> str:
        return format_digest(self.crc)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A rank file: its size and the standard CRC of its tail (index to end of file)."""

    nbytes: int
    tail_crc: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A committed checkpoint.  ``files[rank]`` is that rank's file; ``tensors`` are in ordinal order: by name."""

    run: str
    attempt: int
    save: int
    step: int
    world: int
    created: str
    writer: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    layouts: Sequence[Any] = ()
    tensors: Sequence[TensorRecord] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    values: Any = None
    files: Sequence[FileRecord] = ()
    _encoded: list[bytes] = field(default_factory=list, init=False, repr=False, compare=False)

    def identity(self, rank: int) -> FileIdentity:
        return FileIdentity(
            run=self.run, attempt=self.attempt, save=self.save, step=self.step, rank=rank, world=self.world
        )

    def file_name(self, rank: int) -> str:
        return names.rank_file(rank, self.attempt, self.save)

    @property
    def file(self) -> str:
        return names.manifest(self.attempt, self.save)

    @property
    def nbytes(self) -> int:
        """Bytes of all rank files."""
        return sum(record.nbytes for record in self.files)

    def encode(self) -> bytes:
        """The sealed document, made once: it is half a second of work for a hundred thousand tensors."""
        if not self._encoded:
            self._encoded.append(self._sealed())
        return self._encoded[0]

    def _sealed(self) -> bytes:
        return seal(
            KIND,
            {
                "run": self.run,
                "attempt": self.attempt,
                "save": self.save,
                "step": self.step,
                "world": self.world,
                "created": self.created,
                "writer": self.writer,
                "granule": GRANULE_BYTES,
                "metrics": dict(self.metrics),
                "layouts": list(self.layouts),
                "assignment": ASSIGNMENT_VERSION,
                "tensors": [_row(t) for t in self.tensors],
                "aliases": dict(self.aliases),
                "values": self.values,
                "files": [[f.nbytes, f"{f.tail_crc:016x}"] for f in self.files],
            },
        )


def decode(data: bytes, where: str) -> Manifest:
    """Parse a manifest; `UnreadableFormat` or `Damaged` naming ``where`` for anything that does not hold together."""
    body = unseal(KIND, data, where)
    try:
        if body["granule"] != GRANULE_BYTES:
            raise UnreadableFormat(f"{where}: granules of {body['granule']} bytes; this version reads {GRANULE_BYTES}")
        if _count(body["assignment"]) > ASSIGNMENT_VERSION:
            raise UnreadableFormat(f"{where}: replicas were assigned by a newer rule; upgrade ckptengine")
        manifest = Manifest(
            run=_text(body["run"]),
            attempt=_count(body["attempt"]),
            save=_count(body["save"]),
            step=_count(body["step"]),
            world=_count(body["world"]),
            created=_text(body["created"]),
            writer=_text(body["writer"]),
            metrics=body["metrics"],
            layouts=body["layouts"],
            tensors=_tensors(body["tensors"], len(body["layouts"])),
            aliases={_text(alias): _text(owner) for alias, owner in body["aliases"].items()},
            values=body["values"],
            files=[FileRecord(_count(nbytes), _crc(crc)) for nbytes, crc in body["files"]],
        )
    except LayoutError as error:
        raise UnreadableFormat(f"{where}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableFormat(f"{where}: not a manifest of version 1 ({type(error).__name__}: {error})") from None
    _check(manifest, where)
    return manifest


def _check(manifest: Manifest, where: str) -> None:
    if len(manifest.files) != manifest.world or manifest.world < 1:
        raise UnreadableFormat(f"{where}: {len(manifest.files)} rank files for {manifest.world} ranks")
    if any(record.nbytes < HEADER_BYTES + FOOTER_BYTES for record in manifest.files):
        raise UnreadableFormat(f"{where}: a rank file is said to be smaller than its header and footer")
    known = {t.name for t in manifest.tensors}
    if len(known) != len(manifest.tensors):
        raise UnreadableFormat(f"{where}: two tensors have one name")
    for alias, owner in manifest.aliases.items():
        if owner not in known or alias in known:
            raise UnreadableFormat(f"{where}: alias {alias!r} of {owner!r} does not hold")


def _tensors(rows: Sequence[Sequence[Any]], layouts: int) -> list[TensorRecord]:
    records = []
    for name, dtype, shape, layout, writer, crc in rows:
        if dtype not in ITEMSIZE or not isinstance(name, str):
            raise UnreadableFormat(f"tensor {name!r} has the unknown element type {dtype!r}; upgrade ckptengine")
        if type(layout) is not int or not 0 <= layout < layouts:
            raise ValueError(f"tensor {name!r} names a layout that is not there")
        extents = tuple(shape)
        if any(type(extent) is not int or extent < 0 for extent in extents):
            raise ValueError(f"tensor {name!r} has the impossible shape {shape}")
        records.append(TensorRecord(name, dtype, extents, layout, _writer(writer), _crc(crc)))
    return records


def _row(tensor: TensorRecord) -> list[Any]:
    writer = writer_to_json(tensor.writer)
    return [tensor.name, tensor.dtype, list(tensor.shape), tensor.layout, writer, f"{tensor.crc:016x}"]


@functools.cache
def _writer(document: object) -> Writer:
    return writer_from_json(document)


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is not a count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def _crc(value: object) -> int:
    if not isinstance(value, str) or not _HEX16.match(value):
        raise ValueError(f"{value!r} is not a digest")
    return int(value, 16)
