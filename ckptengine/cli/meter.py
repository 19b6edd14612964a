"""A progress bar on standard error: only on a terminal, and only for what takes more than a second."""

from __future__ import annotations

import sys
import threading
import time

from ckptengine.cli.text import size_text

_WIDTH = 30
_EVERY_S = 0.1
_PATIENCE_S = 1.0


class Meter:
    """Draws ``progress(bytes done, bytes in all)``; silent where standard error is not a terminal."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._stream = sys.stderr
        self._on = self._stream.isatty()
        self._start_s = time.monotonic()
        self._next_s = self._start_s + _PATIENCE_S
        self._drawn = False
        self._lock = threading.Lock()

    def progress(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if not self._on or now_s < self._next_s:
            return
        with self._lock:
            self._next_s = now_s + _EVERY_S
            part = min(1.0, done / total) if total else 1.0
            bar = "#" * round(part * _WIDTH)
            rate = done / max(1e-9, now_s - self._start_s)
            self._stream.write(
                f"\r{self._what} [{bar:<{_WIDTH}}] {part:4.0%} {size_text(done)} of {size_text(total)}, "
                f"{size_text(rate)}/s   "
            )
            self._stream.flush()
            self._drawn = True

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
