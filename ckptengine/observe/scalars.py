"""Scalars of each save for TensorBoard, or for whatever takes ``add_scalar(tag, value, step)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

_SCALARS = (
    "blocked_ms",
    "fence_ms",
    "captured_s",
    "committed_s",
    "durable_s",
    "written_bytes",
    "copied_bytes",
    "peak_bytes",
)
_ENDS = ("failed", "skipped")


class Writer(Protocol):
    """``torch.utils.tensorboard.SummaryWriter`` and its like."""

    def add_scalar(self, tag: str, value: float, step: int) -> Any: ...


class Observed(Protocol):
    """What is needed of `ckptengine.Checkpointer`."""

    def on_end(self, call: Callable[[Any], object]) -> None: ...


def write_scalars(checkpointer: Observed, writer: Writer, prefix: str = "checkpoint/") -> None:
    """From now on give ``writer`` what each save took when it ends, at its step, on a background thread.

    Tags are those of `SaveHandle.progress`, and ``failed`` and ``skipped`` (0 or 1).
    """

    def ended(handle: Any) -> None:
        took = handle.progress
        for name in _SCALARS:
            if name in took:
                writer.add_scalar(prefix + name, took[name], handle.step)
        for end in _ENDS:
            writer.add_scalar(prefix + end, float(handle.stage == end), handle.step)

    checkpointer.on_end(ended)
