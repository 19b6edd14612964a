"""What happens when a save comes while earlier ones are in flight.  Under several ranks rank 0 decides for all."""

from __future__ import annotations

from typing import Literal, get_args

from ckptengine.coordination.port import Coordinator, publish, receive
from ckptengine.errors import SaveFailed, UnusableRequest
from ckptengine.operations.save import Saver

OverlapPolicy = Literal["wait", "skip", "latest"]
IN_FLIGHT = 2
"""Saves at once under "wait": one streaming while the one before is being flushed."""


def check_policy(policy: str) -> None:
    """`UnusableRequest` for what is no overlap policy."""
    if policy not in get_args(OverlapPolicy):
        raise UnusableRequest(f'overlap={policy!r} is none of "wait", "skip" and "latest"')


class Overlap:
    """Decides, before a save is registered, whether it goes ahead."""

    def __init__(self, policy: OverlapPolicy, saver: Saver, port: Coordinator, timeout_s: float) -> None:
        self._policy, self._saver, self._port, self._timeout_s = policy, saver, port, timeout_s

    def admit(self, number: int) -> bool:
        """Make room for save ``number``.  False: it is to be skipped.  The same answer on every rank."""
        if self._policy == "wait":
            self._saver.wait_below(IN_FLIGHT)
            return True
        busy = bool(self._saver.in_flight())
        if self._port.world > 1:
            if self._port.rank == 0:
                publish(self._port, f"busy/{number}", busy)
            else:
                busy = bool(receive(self._port, f"busy/{number}", self._timeout_s))
        if busy and self._policy == "skip":
            return False
        if busy:
            self._saver.give_up(SaveFailed("a later save took its place (overlap='latest')"), superseded=True)
            self._saver.wait_below(1)
        return True
