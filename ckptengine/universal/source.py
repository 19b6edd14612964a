"""A zarr v3 hierarchy as a source: ours, with its values and names, or anybody's, with its arrays by path.

Chunks of plain bytes are byte ranges of files; any others are decoded by zarr-python, chunk by chunk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptengine.errors import NotFound, UnreadableFormat
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources import jsonvalues
from ckptengine.sources.port import Files
from ckptengine.universal.datatypes import true_type
from ckptengine.universal.decoding import DecodingFiles
from ckptengine.universal.metadata import ATTRIBUTE, VERSION
from ckptengine.universal.stored import StoredArray, StoredChunks

_MAX_DEPTH = 64
_DOCUMENT = "zarr.json"


class UniversalSource:
    """See `ckptengine.sources.port.Source`."""

    format = "zarr"

    def __init__(self, files: Files, step: int | None = None) -> None:
        self.files: Files = DecodingFiles(files)
        root = _load(files, _DOCUMENT)
        ours = _mapping(_mapping(root.get("attributes"), "attributes").get(ATTRIBUTE), ATTRIBUTE)
        version = ours.get("version", 0)
        if type(version) is not int or version > VERSION:
            raise UnreadableFormat(
                f"{files.root} was written by a newer version (universal format {version!r}, this one reads up to "
                f"{VERSION}); upgrade ckptengine"
            )
        self._ours = ours
        self._nodes = dict(_arrays(files, root))
        self._paths = {self._name(path, node): path for path, node in self._nodes.items()}
        if len(self._paths) != len(self._nodes):
            raise UnreadableFormat(f"{files.root}: several arrays have the same canonical name")
        aliases = _mapping(ours.get("aliases"), "aliases")
        self._aliases = {alias: name for alias, name in aliases.items() if isinstance(name, str)}
        missing = [name for name in self._aliases.values() if name not in self._paths]
        if missing or len(self._aliases) != len(aliases):
            raise UnreadableFormat(f"{files.root}: an alias names no array of the hierarchy ({missing[:3]})")
        stored_step = ours.get("step")
        self.step = stored_step if type(stored_step) is int else step

    def _name(self, path: str, node: Mapping[str, Any]) -> str:
        ours = _attribute(node)
        name = ours.get("name")
        return name if isinstance(name, str) else path.replace("/", ".")

    @property
    def metrics(self) -> Mapping[str, float]:
        found = jsonvalues.from_json(self._ours.get("metrics", {}))
        return {key: float(value) for key, value in found.items()} if isinstance(found, dict) else {}

    @property
    def provenance(self) -> Mapping[str, object]:
        """What the writer recorded of where this came from."""
        return _mapping(self._ours.get("provenance"), "provenance")

    def names(self) -> Sequence[str]:
        return [*self._paths, *self._aliases]

    def tensor(self, name: str) -> LogicalTensor:
        owner = self._aliases.get(name, name)
        path = self._paths.get(owner)
        if path is None:
            raise NotFound(f"{self.files.root} has no tensor {name!r}")
        node = self._nodes[path]
        where = f"{self.files.root}/{path}"
        ours = _attribute(node)
        array = StoredArray.parse(path, node, where)
        dtype = true_type(array.data_type, ours.get("dtype"), where)
        digest = ours.get("digest")
        fragments = StoredChunks(self.files, array, itemsize(dtype), where, fills=not ours)
        return LogicalTensor(
            name, dtype, array.shape, fragments, digest if isinstance(digest, str) else None, {"path": path}
        )

    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def encoded_values(self) -> object:
        """The typed encoding of a live state's values, where the checkpoint was made from one of ours; else None."""
        return self._ours.get("live_values")

    def values(self) -> object:
        return jsonvalues.from_json(self._ours.get("values", {}))


def _attribute(node: Mapping[str, Any]) -> Mapping[str, Any]:
    attributes = node.get("attributes")
    ours = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
    return ours if isinstance(ours, dict) else {}


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UnreadableFormat(f"zarr metadata: {what} is no object")
    return value


def _load(files: Files, path: str) -> dict[str, Any]:
    data = files.read(path, 0, files.size(path))
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnreadableFormat(f"{files.root}/{path} is not JSON: {error}; take another copy") from None
    if not isinstance(document, dict) or document.get("zarr_format") != 3:
        raise UnreadableFormat(f"{files.root}/{path} is no zarr v3 metadata; convert the hierarchy to zarr format 3")
    return document


def _arrays(files: Files, root: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, metadata) of every array: from the consolidated metadata, else folder by folder."""
    if root.get("node_type") == "array":
        yield "", root
        return
    inline = root.get("consolidated_metadata")
    if isinstance(inline, dict) and isinstance(inline.get("metadata"), dict):
        for path, node in inline["metadata"].items():
            if isinstance(node, dict) and node.get("node_type") == "array":
                yield path, node
        return
    yield from _walk(files, "", 0)


def _walk(files: Files, folder: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if depth > _MAX_DEPTH:
        raise UnreadableFormat(f"{files.root}/{folder}: groups nested deeper than {_MAX_DEPTH} levels")
    for entry in files.entries(folder):
        path = f"{folder}/{entry[:-1]}" if folder else entry[:-1]
        if not entry.endswith("/") or not files.exists(f"{path}/{_DOCUMENT}"):
            continue
        node = _load(files, f"{path}/{_DOCUMENT}")
        if node.get("node_type") == "array":
            yield path, node
        else:
            yield from _walk(files, path, depth + 1)
