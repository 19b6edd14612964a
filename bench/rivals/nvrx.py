"""NVIDIA's resiliency extension: asynchronous DCP, written by forked processes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from ..engine import Engine, Wait, require
from ..state import LiveState
from .dcp import single_process_group

WRITERS = 2
"""Writing processes, as its example has."""


class Nvrx(Engine):
    """`FileSystemWriterAsync` with an `AsyncCallsQueue`, as its example does; finished when the loop polls it.

    On CPU the writing process is forked from the training process (`persistent=False`), since the persistent one
    would be handed live memory; the calls that synchronise a CUDA device do nothing where there is none.
    """

    distributions: ClassVar[tuple[str, ...]] = ("nvidia-resiliency-ext",)
    configuration: ClassVar[str] = "FileSystemWriterAsync (2 writers), AsyncCallsQueue(persistent=False): a fork on CPU"

    def __init__(self, root: Path, state: LiveState) -> None:
        super().__init__(root, state)
        prefix = "nvidia_resiliency_ext.checkpointing.async_ckpt"
        self._core = require(f"{prefix}.core", "nvidia-resiliency-ext")
        self._filesystem = require(f"{prefix}.filesystem_async", "nvidia-resiliency-ext")
        self._saver = require(f"{prefix}.state_dict_saver", "nvidia-resiliency-ext")
        if not torch.cuda.is_available():
            torch.cuda.synchronize = _nothing  # type: ignore[assignment]
            torch.cuda.current_device = _cpu  # type: ignore[assignment]
        single_process_group()
        self._queue = self._core.AsyncCallsQueue(persistent=torch.cuda.is_available())
        self._saver.init_checkpoint_metadata_cache()
        self._finished: list[threading.Event] = []

    def save(self, step: int) -> Wait:
        self.drain()
        writer = self._filesystem.FileSystemWriterAsync(str(self.path(step)), thread_count=WRITERS)
        self.path(step).mkdir(parents=True, exist_ok=True)
        planned = self._saver.save_state_dict_async_plan(
            self.state.nested(), writer, None, 0, planner=DefaultSavePlanner(), enable_cache=True
        )
        save_function, preload_function, arguments = writer.get_save_function_and_args()
        finished = threading.Event()

        def finalize() -> None:
            self._saver.save_state_dict_async_finalize(*planned)
            finished.set()

        self._finished.append(finished)
        request = self._core.AsyncRequest(save_function, arguments, [finalize], preload_fn=preload_function)
        self._queue.schedule_async_request(request)

        def wait() -> None:
            finished.wait()

        return wait

    def poll(self) -> None:
        self._queue.maybe_finalize_async_calls(blocking=False, no_dist=True)

    def drain(self) -> None:
        self._queue.maybe_finalize_async_calls(blocking=True, no_dist=True)

    def restore(self, step: int) -> None:
        nested = self.state.nested()
        load(nested, storage_reader=FileSystemReader(str(self.path(step))))
        self.state.fill(nested)

    def close(self) -> None:
        self.drain()
        self._queue.close()


def _nothing(*_: Any) -> None:
    """Stands for synchronising a device that is not there."""


def _cpu() -> str:
    return "cpu"
