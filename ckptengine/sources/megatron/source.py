"""Which of Megatron's formats lies in a folder."""

from __future__ import annotations

from ckptengine.sources.megatron.legacy import LegacySource, rank_folders
from ckptengine.sources.megatron.torch_dist import TorchDistSource, is_torch_dist
from ckptengine.sources.port import Format, Opening, Source


def _probe(opening: Opening) -> bool:
    if opening.entry is not None:
        return False
    return bool(rank_folders(opening.files)) or is_torch_dist(opening.files)


def _open(opening: Opening) -> Source:
    if is_torch_dist(opening.files):
        return TorchDistSource(opening)
    return LegacySource(opening)


FORMAT = Format("megatron", _probe, _open)
