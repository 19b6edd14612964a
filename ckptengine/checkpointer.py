"""The facade: wires the parts together, holds no logic of its own."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from torch.distributed import ProcessGroup
from torch.optim.optimizer import Optimizer

from ckptengine.coordination.choose import choose
from ckptengine.errors import CheckpointError, RestoreIncomplete, UnusableRequest
from ckptengine.operations.attempts import Claims
from ckptengine.operations.handle import SaveHandle
from ckptengine.operations.overlap import Overlap, OverlapPolicy
from ckptengine.operations.restore import RestoreRequest, restore_from, restore_newest
from ckptengine.operations.rhythm import Rhythm
from ckptengine.operations.save import SaveJob, Saver, SaveSettings
from ckptengine.policy.failure import FailurePolicy, Raise, Trouble, failure_policy
from ckptengine.policy.interval import Interval
from ckptengine.policy.keep import Keep
from ckptengine.snapshot import fence
from ckptengine.snapshot.engines import engine_for
from ckptengine.snapshot.register import EagerPool, register
from ckptengine.sources.detect import open_source
from ckptengine.sources.files import open_files
from ckptengine.state.flatten import Walker
from ckptengine.store.files import FileOps
from ckptengine.store.root import Root
from ckptengine.tiers.spec import Tier

log = logging.getLogger("ckptengine")

CLOSE_AFTER_ERROR_S = 30.0
"""How long `close` waits for saves in flight when the training loop ended with an exception."""
CLOSE_AT_EXIT_S = 60.0
"""How long the interpreter's exit waits for saves of a checkpointer that nobody closed."""


class Checkpointer:
    """Saves a training state asynchronously under a root, and restores it onto whatever layout it finds itself in.

    Every rank constructs it with the same arguments and makes the same calls.  Use it as a context manager.

    Args:
        state: nested live state (modules, optimizers, schedulers, loaders, tensors, plain values).
        root: directory where durable checkpoints rest.
        interval: when `step` saves; None: only `save` does.
        keep: which checkpoints of the root are kept; None: all.
        tiers: faster tiers in front of the root, fastest first.
        on_failure: ``"raise"``, or `Tolerate`: what a failed save does to the training loop.
        overlap: when a save comes while the ones before are in flight: ``"wait"`` for room, ``"skip"`` this one, or
            ``"latest"``: give up the one in flight.
        process_group: the ranks that take part; default: all, where torch.distributed is initialised.
        run: the run's identity; default: that of the root, or a new one.
        start_from: a checkpoint, ours or foreign, to start from when the root is empty.
        random: whether the process's random streams are part of the checkpoint.
        mode: permissions of what is written; default: the umask.
        rank_timeout_s: how long ranks wait for one another in the background.
        stall_budget_s: how long one fence may block training before the save is given up; None: no limit.
        arena_bytes: host memory for copies; default: 64 MiB on CPU state.
        paranoid: digest everything again before the fence lets go, not samples.
        file_ops: file operations beneath the store (for fault injection).

    Raises:
        RootInUse: another live job holds the root.
    """

    def __init__(
        self,
        state: Any,
        root: str | os.PathLike[str],
        *,
        interval: Interval | None = None,
        keep: Keep | None = None,
        tiers: Sequence[Tier] = (),
        on_failure: Literal["raise"] | FailurePolicy = "raise",
        overlap: OverlapPolicy = "wait",
        process_group: ProcessGroup | None = None,
        run: str | None = None,
        start_from: str | os.PathLike[str] | None = None,
        random: bool = True,
        mode: int | None = None,
        rank_timeout_s: float = 300.0,
        stall_budget_s: float | None = None,
        arena_bytes: int | None = None,
        paranoid: bool = False,
        file_ops: FileOps | None = None,
        linear: bool = True,
    ) -> None:
        self._pid = os.getpid()
        self._closed = False
        self._broken: RestoreIncomplete | None = None
        self._state, self._start_from = state, start_from
        self._walker = Walker(state, random=random)
        self._random, self._timeout_s = random, rank_timeout_s
        self._failure = failure_policy(on_failure)
        self._root = Root(root, file_ops, mode)
        self._port = choose(process_group, rank_timeout_s)
        self._pool = EagerPool()
        self._saves = self._restores = 0
        self._pending: list[SaveHandle] = []
        self._durable_step: int | None = None
        self._durable_s = time.monotonic()
        self._rhythm = Rhythm(interval, self._port, rank_timeout_s)
        self._claims = Claims(self._root, run, linear=linear) if self._port.rank == 0 else None
        settings = SaveSettings(rank_timeout_s=rank_timeout_s, stall_budget_s=stall_budget_s, paranoid=paranoid)
        engine = engine_for(arena_bytes, file_ops)
        self._saver = Saver(self._root, self._port, engine, settings, self._claims)
        self._overlap = Overlap(overlap, self._saver, self._port, rank_timeout_s)
        fence.watch(self)
        self._finalizer = weakref.finalize(self, _shut, self._saver, self._claims, self._pid)
