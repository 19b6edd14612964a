"""The fence by itself: torch's global optimizer hooks, shared by every live checkpointer of the process.

They fire for every optimizer's ``step`` (fused, foreach, capturable, compiled).  An update that no torch optimizer
makes (a CUDA graph replay, an EMA, another library) needs `Checkpointer.fence()` by hand.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

T = TypeVar("T")


class Fenced(Protocol):
    """Something that has captures in flight."""

    def before_update(self, optimizer: Optimizer | None) -> None:
        """Block until what ``optimizer`` (None: anybody) overwrites is captured."""

    def after_update(self, optimizer: Optimizer) -> None:
        """``optimizer`` has overwritten its parameters and states: one epoch has passed for them."""


_watched: tuple[weakref.ref[Fenced], ...] = ()
"""Replaced as a whole, never changed: an update looks through it while another thread watches something new."""
_under_way: dict[int, tuple[int, weakref.ref[Optimizer]]] = {}
"""By ``id``, the optimizers that are in their step, and on which thread; one whose step raised, until its next step."""
_guard = threading.Lock()
_handles: list[Any] = []
_pid = os.getpid()


def watch(target: Fenced) -> None:
    """Fence ``target`` before every optimizer step from now on, for as long as it lives."""
    global _pid, _watched
    with _guard:
        _watched = (*map(weakref.ref, _live()), weakref.ref(target))
        if not _handles or _pid != os.getpid():
            _handles[:] = [register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after)]
            _pid = os.getpid()
            _under_way.clear()  # of steps that ended unwatched, or that are another process's


def unwatch(target: Fenced) -> None:
    """Stop fencing ``target``; the hooks go with the last one."""
    global _watched
    with _guard:
        _watched = tuple(weakref.ref(known) for known in _live() if known is not target)
        if not _watched:
            for handle in _handles:
                handle.remove()
            _handles.clear()


def _live() -> list[Fenced]:
    return [target for known in _watched if (target := known()) is not None]


def before_any_update() -> None:
    """Fence every live checkpointer of the process: what anybody is still capturing may change when this returns."""
    for target in _live():
        target.before_update(None)


def under_way_elsewhere() -> list[Optimizer]:
    """Optimizers that other threads are in the middle of an update of."""
    mine = threading.get_ident()
    stepping = [known() for thread, known in list(_under_way.values()) if thread != mine]
    return [optimizer for optimizer in stepping if optimizer is not None]


def _not_traced(hook: T) -> T:
    """Have torch.compile call the hook as it is, as `torch.compiler.disable` does, without importing the compiler."""
    for mark, value in (("", True), ("_recursive", True), ("_msg", "waits for captures in flight")):
        setattr(hook, f"_torchdynamo_disable{mark}", value)
    return hook


def _before_all(optimizer: Optimizer) -> None:
    for target in _live():
        target.before_update(optimizer)
    _under_way[id(optimizer)] = threading.get_ident(), weakref.ref(optimizer)


def _after_all(optimizer: Optimizer) -> None:
    for target in _live():
        target.after_update(optimizer)
    _under_way.pop(id(optimizer), None)  # afterwards: whoever registers a save sees one or the other


@functools.cache
def _uncompiled(run: Callable[[Optimizer], None]) -> Callable[[Optimizer], None]:
    """``run`` with the compiler off for all that it calls, too; the mark above keeps only the hook itself from it."""
    disabled: Callable[[Optimizer], None] = torch.compiler.disable(run)  # type: ignore[no-untyped-call]
    return disabled


def _call(run: Callable[[Optimizer], None], optimizer: Optimizer) -> None:
    # Only where the compiler is loaded can it be at work; loading it takes seconds.
    (_uncompiled(run) if "torch._dynamo" in sys.modules else run)(optimizer)


@_not_traced
def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _call(_before_all, optimizer)


@_not_traced
def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _call(_after_all, optimizer)
