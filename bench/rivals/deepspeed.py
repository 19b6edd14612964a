"""DeepSpeed's fast checkpoint engine: torch.save through pinned double buffers and asynchronous direct I/O."""

from __future__ import annotations

import types
from pathlib import Path
from typing import ClassVar

import torch

from ..engine import Engine, Unavailable, Wait, finished, require
from ..state import LiveState


class DeepSpeedFast(Engine):
    """`FastCheckpointEngine`, with the writer's defaults of its documentation."""

    distributions: ClassVar[tuple[str, ...]] = ("deepspeed",)
    configuration: ClassVar[str] = "FastCheckpointEngine, FAST writer, 64 MiB double buffer"

    def __init__(self, root: Path, state: LiveState) -> None:
        super().__init__(root, state)
        package = "deepspeed.runtime.checkpoint_engine.fast_checkpoint_engine"
        engine = require(package, "deepspeed")
        constants = require("deepspeed.runtime.model_checkpointing.constants", "deepspeed")
        swap = require("deepspeed.runtime.swap_tensor.constants", "deepspeed")
        writer = {
            constants.CHECKPOINT_WRITER_TYPE: constants.CheckpointWriterType.FAST,
            constants.CHECKPOINT_IO_BUFFER_SIZE: constants.CHECKPOINT_IO_BUFFER_SIZE_DEFAULT,
            constants.CHECKPOINT_IO_BUFFER_DOUBLE: constants.CHECKPOINT_IO_BUFFER_DOUBLE_DEFAULT,
            constants.CHECKPOINT_IO_STATISTICS: False,
            constants.CHECKPOINT_IO_MULTIPLIER: 1,
        }
        config = types.SimpleNamespace(
            checkpoint_config={constants.CHECKPOINT_SERIALIZATION: True, constants.CHECKPOINT_WRITER: writer},
            aio_config={
                swap.AIO_BLOCK_SIZE: swap.AIO_BLOCK_SIZE_DEFAULT,
                swap.AIO_QUEUE_DEPTH: swap.AIO_QUEUE_DEPTH_DEFAULT,
                swap.AIO_INTRA_OP_PARALLELISM: swap.AIO_INTRA_OP_PARALLELISM_DEFAULT,
                swap.AIO_SINGLE_SUBMIT: swap.AIO_SINGLE_SUBMIT_DEFAULT,
                swap.AIO_OVERLAP_EVENTS: swap.AIO_OVERLAP_EVENTS_DEFAULT,
                swap.AIO_USE_GDS: False,
            },
        )
        ranks = types.SimpleNamespace(world_size=1, rank=0, global_rank=0, local_rank=0)
        try:
            self._engine = engine.FastCheckpointEngine(config, ranks, False)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Unavailable(f"its asynchronous I/O does not start here: {reason}") from error

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:09d}.pt"

    def save(self, step: int) -> Wait:
        self._engine.save(self.state.nested(), str(self.path(step)))
        return finished

    def restore(self, step: int) -> None:
        self.state.fill(torch.load(self.path(step), map_location="cpu", weights_only=True))
