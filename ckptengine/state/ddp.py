"""DistributedDataParallel: the buffers that are its first rank's.

Before each forward it overwrites the buffers of every other rank with those of the first one.  What a rank has put into
them since (running statistics of BatchNorm) is no state of anybody, and need not be equal anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def is_led(part: nn.Module) -> bool:
    """Whether ``part`` is a DistributedDataParallel that takes its buffers from another rank.

    Not where a hook says what becomes of buffers, nor under the join context, which takes them from any rank.
    """
    if not isinstance(part, DistributedDataParallel) or not part.broadcast_buffers:
        return False
    if hasattr(part, "buffer_hook") or part._join_config.enable:
        return False
    return int(part.process_group.rank()) > 0


def led_buffers(parts: Iterable[nn.Module]) -> frozenset[int]:
    """``id`` of every buffer below ``parts`` that is to be overwritten with another rank's."""
    return frozenset(
        id(buffer)
        for part in parts
        if isinstance(part, DistributedDataParallel) and is_led(part)
        for name, buffer in part.module.named_buffers()
        if name not in part.parameters_to_ignore
    )
