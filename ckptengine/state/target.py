"""What is to be filled: the local memory of pieces of a stored tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ckptengine.layout.piece import Piece


@dataclass(frozen=True, slots=True)
class Target:
    """Local memory to fill: the ``pieces`` of stored tensor ``name``, into ``tensor`` (any strides, writable).

    The elements of a piece are counted as if ``tensor`` were contiguous, as in `TensorLeaf`.
    """

    name: str
    tensor: torch.Tensor
    pieces: tuple[Piece, ...]
