"""Which of Megatron's formats lies in a folder."""

from __future__ import annotations

from ckptengine.sources.megatron.legacy import LegacySource, rank_folders
from ckptengine.sources.megatron.torch_dist import TorchDistSource, read_manifest
from ckptengine.sources.port import Format, Opening, Source


def _probe(opening: Opening) -> bool:
    if opening.entry is not None:
        return False
    return bool(rank_folders(opening.files)) or read_manifest(opening.files) is not None


def _open(opening: Opening) -> Source:
    if read_manifest(opening.files) is not None:
        return TorchDistSource(opening)
    return LegacySource(opening)


FORMAT = Format("megatron", _probe, _open)
