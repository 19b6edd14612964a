"""Buffers that each rank has of its own and of which one rank's are kept.

DistributedDataParallel overwrites the buffers of every other rank with those of its first one before each forward: what
a rank has put into them since is no state of anybody.  Running statistics of a normalization are each rank's estimate
from its own part of the batches; without that broadcast those of the first rank that has them stand for all, as they do
in whatever is saved by one rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel


def is_led(part: nn.Module) -> bool:
    """Whether ``part`` is a DistributedDataParallel that takes its buffers from another rank."""
    return _broadcasts(part) and part.process_group.rank() > 0


def led_buffers(parts: Sequence[nn.Module]) -> frozenset[int]:
    """``id`` of every buffer of ``parts`` that counts only where no rank leads, and there on the first rank only."""
    leads: set[int] = set()
    led: set[int] = set()
    for part in parts:
        if _broadcasts(part):
            (led if is_led(part) else leads).update(map(id, _broadcast_by(part)))
    return frozenset(led | ({id(buffer) for buffer in _statistics(parts)} - leads))


def _broadcasts(part: nn.Module) -> TypeGuard[DistributedDataParallel]:
    """Not where a hook says what becomes of buffers, nor under the join context, which takes them from any rank."""
    if not isinstance(part, DistributedDataParallel) or not part.broadcast_buffers:
        return False
    return not (hasattr(part, "buffer_hook") or part._join_config.enable)


def _broadcast_by(part: DistributedDataParallel) -> Iterator[torch.Tensor]:
    ignored = part.parameters_to_ignore
    return (buffer for name, buffer in part.module.named_buffers() if name not in ignored)


def _statistics(parts: Iterable[nn.Module]) -> Iterator[torch.Tensor]:
    for part in parts:
        if isinstance(part, _NormBase):
            yield from part.buffers(recurse=False)
