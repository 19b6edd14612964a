"""Few threads: these runs are about what is reported, and share the machine with other tests."""

from __future__ import annotations

from tests.compute_threads import one_compute_thread

__all__ = ["one_compute_thread"]
