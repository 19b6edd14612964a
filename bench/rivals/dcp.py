"""torch.distributed.checkpoint: `save`, and `async_save` with each of its stagers and executors."""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save, save

from ..engine import Engine, Wait, finished
from ..state import LiveState, TrainingState


def single_process_group() -> None:
    """A gloo group of this one process, where no launcher made one: some engines cannot do without."""
    if not dist.is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)


class DcpSave(Engine):
    """`dcp.save`, synchronous."""

    distributions: ClassVar[tuple[str, ...]] = ("torch",)
    configuration: ClassVar[str] = "dcp.save of get_state_dict(model, optimizer)"
    reshards: ClassVar[bool] = True

    def state_dict(self) -> dict[str, Any]:
        """The state as DCP's tutorial makes it: optimizer state by parameter name."""
        if isinstance(self.state, TrainingState):
            model, optim = get_state_dict(self.state.model, self.state.optimizer)
            return {"model": model, "optim": optim}
        return self.state.nested()

    def save(self, step: int) -> Wait:
        save(self.state_dict(), checkpoint_id=self.path(step))
        return finished

    def restore(self, step: int) -> None:
        loaded = self.state_dict()
        load(loaded, checkpoint_id=self.path(step))
        if isinstance(self.state, TrainingState):
            set_state_dict(
                self.state.model,
                self.state.optimizer,
                model_state_dict=loaded["model"],
                optim_state_dict=loaded["optim"],
            )


class DcpAsync(DcpSave):
    """`dcp.async_save` with its defaults: a blocking copy into fresh memory, then a thread."""

    configuration: ClassVar[str] = "dcp.async_save with defaults; the next save waits for the one before"
    executor: ClassVar[AsyncCheckpointerType] = AsyncCheckpointerType.THREAD

    def __init__(self, root: Path, state: LiveState) -> None:
        super().__init__(root, state)
        self._stager = self.make_stager()
        self._staged: Future[None] | None = None
        self._written: Future[Any] | None = None

    def make_stager(self) -> DefaultStager | None:
        """The stager that lives as long as the training does; none means the default one of every call."""
        return None

    def save(self, step: int) -> Wait:
        if self._written is not None:
            self._written.result()
        started = async_save(
            self.state_dict(),
            checkpoint_id=self.path(step),
            async_checkpointer_type=self.executor,
            async_stager=self._stager,
        )
        if isinstance(started, AsyncSaveResponse):
            self._staged, self._written = started.staging_completion, started.upload_completion
        else:
            self._written = started
        written = self._written

        def wait() -> None:
            written.result()

        return wait

    def before_update(self) -> None:
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def close(self) -> None:
        if self._written is not None:
            self._written.result()
        if self._stager is not None:
            self._stager.close()


class DcpAsyncStaging(DcpAsync):
    """`DefaultStager` that copies on a thread of its own; the update waits for it."""

    configuration: ClassVar[str] = "async_save, DefaultStager(async staging); staging is waited for before the update"

    def make_stager(self) -> DefaultStager:
        cuda = torch.cuda.is_available()
        return DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=cuda
            )
        )


class DcpAsyncSharedMemory(DcpAsync):
    """`DefaultStager` with kept buffers in shared memory, copied in the call."""

    configuration: ClassVar[str] = "async_save, DefaultStager(shared memory, kept buffers), thread"

    def make_stager(self) -> DefaultStager:
        cuda = torch.cuda.is_available()
        return DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )


class DcpAsyncProcess(DcpAsyncSharedMemory):
    """The shared-memory stager, and a process that writes."""

    configuration: ClassVar[str] = "async_save, DefaultStager(shared memory, kept buffers), process"
    executor: ClassVar[AsyncCheckpointerType] = AsyncCheckpointerType.PROCESS

    def __init__(self, root: Path, state: LiveState) -> None:
        single_process_group()
        super().__init__(root, state)
