"""CUDA: a capture comes after the work that was queued when `save` was called, and waits for nothing that came later.

Streams are current for one thread, so that the one that registers a save marks its own; what comes in the background is
put behind those marks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch

Marks = tuple[tuple[int, torch.cuda.Event], ...]
"""Devices, and an event on the stream of each that was current at registration."""


def cuda_devices(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """The CUDA devices on which any of ``tensors`` lies."""
    return tuple(sorted({tensor.device.index for tensor in tensors if tensor.is_cuda}))


def mark(devices: Iterable[int]) -> Marks:
    """Mark what is queued now on the calling thread's current stream of each device.  Synchronises nothing."""
    marks = []
    for device in devices:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        marks.append((device, event))
    return tuple(marks)


@contextlib.contextmanager
def behind(marks: Marks) -> Iterator[None]:
    """What this thread queues meanwhile comes after ``marks``, on streams that nobody trains on."""
    streams = [_side_stream(device) for device, _ in marks]
    for stream, (_, event) in zip(streams, marks, strict=True):
        stream.wait_event(event)
    with on(streams):
        yield


def current(tensors: Iterable[torch.Tensor]) -> tuple[torch.cuda.Stream, ...]:
    """The calling thread's current stream of each device on which any of ``tensors`` lies."""
    return tuple(torch.cuda.current_stream(device) for device in cuda_devices(tensors))


@contextlib.contextmanager
def on(streams: Iterable[torch.cuda.Stream]) -> Iterator[None]:
    """Make ``streams`` those of this thread for a while."""
    with contextlib.ExitStack() as entered:
        for stream in streams:
            entered.enter_context(torch.cuda.stream(stream))
        yield


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
