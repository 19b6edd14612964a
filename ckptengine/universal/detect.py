"""The universal format among the formats that can be opened; zarr is imported when a hierarchy is."""

from __future__ import annotations

import importlib

from ckptengine.errors import UnusableRequest
from ckptengine.sources.port import Format, Opening, Source

_DOCUMENT = "zarr.json"


def _probe(opening: Opening) -> bool:
    if opening.entry is not None or not opening.files.exists(_DOCUMENT):
        return False
    head = opening.files.read(_DOCUMENT, 0, min(4096, opening.files.size(_DOCUMENT)))
    return b'"zarr_format"' in head and b'"node_type"' in head


def _open(opening: Opening) -> Source:
    try:
        module = importlib.import_module("ckptengine.universal.source")
    except ImportError as error:
        raise UnusableRequest(
            f"{opening.files.root} is a zarr hierarchy, which needs the package {error.name}; "
            "pip install 'ckptengine[zarr]'"
        ) from None
    source: Source = module.UniversalSource(opening.files, opening.step)
    return source


FORMAT = Format("zarr", _probe, _open)
"""For `ckptengine.sources.detect.open_source`."""
