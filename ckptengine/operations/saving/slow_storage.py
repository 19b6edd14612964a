"""A hint for those whose training waits for storage, with what can be done about it."""

from __future__ import annotations

import logging

from ckptengine.snapshot.port import Progress

log = logging.getLogger("ckptengine")

LONG_S = 0.5
"""A fence that blocks longer is worth a word."""


class SlowStorage:
    """Warns once, the first time that an update has waited long for a full arena to be written."""

    def __init__(self) -> None:
        self._told = False

    def look(self, step: int, progress: Progress, blocked_s: float) -> None:
        """An update has waited ``blocked_s`` for the save of ``step``."""
        if self._told or blocked_s < LONG_S or not progress.starved:
            return
        self._told = True
        log.warning(
            "the save of step %d made the optimizer wait %.1f s: storage is slower than training, and the engine's "
            "buffers were full (%d MiB of a state of %d MiB). A larger arena_bytes holds more of it, a tier in host "
            "memory (ckptengine.Tier(\"shm://...\")) takes all of it, less frequent saves cost less; this is said once",
            step, blocked_s, progress.peak_bytes >> 20, progress.total_bytes >> 20,
            extra={"ckptengine": {"step": step, "fence_s": blocked_s, "bytes": progress.total_bytes}},
        )  # fmt: skip
