"""Safetensors as a source: which files belong together, and the names and boxes of what is in them.

Weights are presented as ``model.<name as stored>``.  A file of ours whose metadata has ``ckptengine`` holds canonical
names already, and a ``ckptengine.json`` beside it what is no tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ckptengine.errors import Damaged, NotFound, UnreadableFormat
from ckptengine.layout.box import Box
from ckptengine.layout.tensor import Fragment, LogicalTensor
from ckptengine.sources.jsonvalues import from_json
from ckptengine.sources.port import Files, Format, Opening, Source
from ckptengine.sources.safetensors.header import Entry, Header, read_header

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
SHARDING_KEY = "DCP_SHARDING_INFO"
OWN_KEY = "ckptengine"
OWN_FILE = "ckptengine.json"
MAX_INDEX_BYTES = 1 << 30
MAX_VALUES_BYTES = 64 << 20
_NUMBERED = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.safetensors")
_SHARD = re.compile(r"shard-(\d+)-")
_VALUES = ("config.json", "generation_config.json", "adapter_config.json")


Piece = tuple[str, Entry, tuple[int, ...] | None]
"""A file, an entry of it, and the offsets of its box (None: it is the whole tensor)."""


class SafetensorsSource:
    """All tensors of a set of safetensors files."""

    format = "safetensors"

    def __init__(
        self, files: Files, headers: Mapping[str, Header], step: int | None = None, own: Mapping[str, Any] | None = None
    ) -> None:
        self.files = files
        self._own = own or {}
        self.step: int | None = self._own.get("step", step)
        self.metrics: Mapping[str, float] = self._own.get("metrics", {})
        self._pieces = _collect(files, headers)
        self._aliases = {
            alias: name for alias, name in self._own.get("aliases", {}).items() if name in self._pieces
        }  # ties that our writer recorded

    def names(self) -> Sequence[str]:
        """Canonical names, in the order of the files."""
        return [*self._pieces, *self._aliases]

    def tensor(self, name: str) -> LogicalTensor:
        """The tensor under a canonical name; `Damaged` when its pieces cannot be one tensor."""
        pieces = self._pieces.get(self._aliases.get(name, name))
        if pieces is None:
            raise NotFound(f"{self.files.root} has no tensor {name!r}")
        first = pieces[0][1]
        shape = [0] * len(first.shape)
        fragments = []
        for path, entry, corner in pieces:
            offsets = (0,) * len(entry.shape) if corner is None else corner
            if entry.dtype != first.dtype or len(entry.shape) != len(shape):
                raise Damaged(f"the pieces of {name!r} in {self.files.root} have different element types or ranks")
            shape = [max(n, o + m) for n, o, m in zip(shape, offsets, entry.shape, strict=True)]
            fragments.append(Fragment(Box(offsets, entry.shape), path, entry.offset))
        whole = tuple(shape)
        if len(fragments) > 1:
            fragments = [fragment for fragment in fragments if fragment.box.size]
        return LogicalTensor(name, first.dtype, whole, fragments)

    def aliases(self) -> Mapping[str, str]:
        """Those that our own writer recorded; the format itself keeps every name's bytes apart."""
        return self._aliases

    def values(self) -> object:
        """The model's configuration files, by name without ``.json``; of our own files, the values saved with them."""
        if "values" in self._own:
            return from_json(self._own["values"])
        found = ((name.removesuffix(".json"), json_of(self.files, name)) for name in _VALUES)
        return {name: value for name, value in found if value is not None}


def _own_record(files: Files) -> Mapping[str, Any]:
    """What our own writer left beside the tensors; empty where it did not write them."""
    own: Any = json_of(files, OWN_FILE)
    if own is None:
        return {}
    shown = f"{files.root.rstrip('/')}/{OWN_FILE}"
    try:
        if own["version"] != 1:
            raise UnreadableFormat(f"{shown} is of version {own['version']!r}; update ckptengine to read it")
        state, step = own["state"], own["step"]
        proper = isinstance(own["aliases"], dict) and isinstance(own["metrics"], dict) and isinstance(state, list)
        proper = proper and all(isinstance(path, str) for path in state) and (step is None or type(step) is int)
    except (TypeError, KeyError):
        proper = False
    if not proper:
        raise Damaged(f"{shown} is not what this package writes; restore or remove it")
    return dict(own)


def json_of(files: Files, path: str) -> object:
    """A small JSON file beside the tensors; None when it is not there."""
    try:
        return json.loads(files.read(path, 0, min(files.size(path), MAX_VALUES_BYTES)))
    except NotFound:
        return None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{files.root.rstrip('/')}/{path} is not the JSON that it should be: {error}") from None


def _collect(files: Files, headers: Mapping[str, Header]) -> dict[str, list[Piece]]:
    """The pieces of each canonical name."""
    found: dict[str, list[Piece]] = {}
    for path, header in headers.items():
        prefix = "" if OWN_KEY in header.metadata else "model."
        offsets = _offsets(header.metadata.get(SHARDING_KEY), f"{files.root.rstrip('/')}/{path}")
        for stored, entry in header.entries.items():
            corner = None
            if offsets is not None:
                corner = offsets.get(stored)
                if corner is None or len(corner) != len(entry.shape):
                    raise Damaged(f"{files.root}/{path}: {SHARDING_KEY} does not say where {stored!r} belongs")
            pieces = found.setdefault(prefix + stored, [])
            if pieces and (corner is None or pieces[0][2] is None):
                raise Damaged(f"tensor {stored!r} is in both {pieces[0][0]} and {path} of {files.root}")
            pieces.append((path, entry, corner))
    return found


def _offsets(text: str | None, shown: str) -> dict[str, tuple[int, ...]] | None:
    """Where each tensor of a torch DCP shard belongs; None for an ordinary file."""
    if text is None:
        return None
    try:
        made = {name: tuple(fields["saved_offsets"]) for name, fields in json.loads(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Damaged(f"{shown}: {SHARDING_KEY} in its metadata is not what torch writes") from None
    if any(type(number) is not int or number < 0 for corner in made.values() for number in corner):
        raise Damaged(f"{shown}: {SHARDING_KEY} in its metadata has offsets that are no numbers")
    return made


def members(files: Files, entry: str | None, state: Sequence[str] = ()) -> dict[str, Header]:
    """The headers of the files that make one checkpoint; `UnreadableFormat` where that cannot be told."""
    if entry is not None:
        return _of_index(files, entry) if entry.endswith(INDEX_SUFFIX) else {entry: read_header(files, entry)}
    if state:
        beside = {path: read_header(files, path) for path in state}
        weights = any(name.endswith(SUFFIX) and name not in beside for name in files.entries())
        return (_of_folder(files, beside) if weights else {}) | beside
    return _of_folder(files, {})


def _of_folder(files: Files, beside: Mapping[str, Header]) -> dict[str, Header]:
    present = [name for name in files.entries() if name not in beside]
    indexes = [name for name in present if name.endswith(INDEX_SUFFIX)]
    if len(indexes) > 1 and "model" + INDEX_SUFFIX in indexes:
        indexes = ["model" + INDEX_SUFFIX]
    if len(indexes) > 1:
        raise UnreadableFormat(f"{files.root} has several indexes ({', '.join(indexes)}); open one of them by name")
    if indexes:
        return _of_index(files, indexes[0])
    found = [name for name in present if name.endswith(SUFFIX)]
    if "model" + SUFFIX in found:
        found = ["model" + SUFFIX]
    headers = {name: read_header(files, name) for name in found}
    sharded = [SHARDING_KEY in header.metadata for header in headers.values()]
    if sharded and all(sharded):
        _check_numbers(files, {int(match[1]) for name in found if (match := _SHARD.match(name))})
    elif not _is_complete_set(files, found) and len(found) > 1:
        raise UnreadableFormat(f"{files.root} has {len(found)} safetensors files, no index; open one of them by name")
    return headers


def _is_complete_set(files: Files, found: Sequence[str]) -> bool:
    """Whether the files are model-00001-of-0000N and so on; `Damaged` when one of such a row is missing."""
    numbered = [match for match in map(_NUMBERED.fullmatch, found) if match]
    groups = {(match[1], match[3]) for match in numbered}
    if len(numbered) != len(found) or len(groups) != 1:
        return False
    count = int(numbered[0][3])
    if len(found) != count:
        _check_numbers(files, {int(match[2]) for match in numbered} | {count + 1})
    return True


def _check_numbers(files: Files, numbers: set[int]) -> None:
    missing = set(range(1, max(numbers, default=0))) - numbers
    if missing:
        raise Damaged(f"{files.root} lacks shard number {min(missing)}; fetch the missing file")


def _of_index(files: Files, path: str) -> dict[str, Header]:
    shown = f"{files.root.rstrip('/')}/{path}"
    if files.size(path) > MAX_INDEX_BYTES:
        raise UnreadableFormat(f"{shown} has {files.size(path)} bytes, too many for an index")
    document = json_of(files, path)
    index = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise Damaged(f"{shown} has no weight_map of names to files")
    headers: dict[str, Header] = {}
    for member in sorted(set(index.values())):
        if not files.exists(member):
            raise NotFound(f"{shown} names {member!r}, which does not exist; fetch the missing shard")
        headers[member] = read_header(files, member)
    for name, file in index.items():
        if name not in headers[file].entries:
            raise Damaged(f"{shown} says that {name!r} is in {file!r}, which does not hold it")
    return headers


def _probe(opening: Opening) -> bool:
    if opening.entry is not None:
        return opening.entry.endswith((SUFFIX, INDEX_SUFFIX))
    names = opening.files.entries()
    return OWN_FILE in names or any(name.endswith((SUFFIX, INDEX_SUFFIX)) for name in names)


def _open(opening: Opening) -> Source:
    own = _own_record(opening.files) if opening.entry is None else {}
    headers = members(opening.files, opening.entry, own.get("state", ()))
    return SafetensorsSource(opening.files, headers, opening.step, own)


FORMAT = Format("safetensors", _probe, _open)
