"""Faults that tests inject into the system calls of the native library."""

from __future__ import annotations

from ckptengine.errors import UnusableRequest
from ckptengine.native.library import library

_CALLS = ("write", "read", "sync", "allocate")


def arm_fault(
    call: str,
    *,
    nth: int = 1,
    error: int = 0,
    sticky: bool = False,
    short_bytes: int = -1,
    kill: bool = False,
    delay_s: float = 0.0,
) -> None:
    """Make the ``nth`` next ``write``, ``read``, ``sync`` or ``allocate`` call of the native library misbehave.

    ``error`` is an errno; ``short_bytes`` cuts a transfer; ``kill`` sends SIGKILL to this process instead of calling;
    ``delay_s`` sleeps first.  ``sticky``: so do all later ones.  For tests.
    """
    if library is None:
        raise UnusableRequest("faults are injected into the native library, which is not available")
    library.arm_fault(
        call=_CALLS.index(call),
        nth=nth,
        error=error,
        sticky=sticky,
        short_bytes=short_bytes,
        kill=kill,
        delay_us=int(delay_s * 1e6),
    )


def disarm_faults() -> None:
    """Forget every armed fault."""
    if library is not None:
        library.disarm_faults()
