"""Whether the optimizer that was saved and the live one are one algorithm, as far as their classes tell.

State and hyper-parameters of another algorithm mean other things: Adam's moments in SGD are ignored in silence.  The
recorded class is a name, from which nothing is imported; fused, renamed, derived and wrapped optimizers must pass.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable

from torch.optim import Optimizer

log = logging.getLogger("ckptengine")

_TORCHS = "torch.optim."
_GENERAL = frozenset({"lr", "initial_lr", "weight_decay", "eps", "maximize", "differentiable", "params", "param_names"})
"""Hyper-parameters that many algorithms have; the others tell one from another."""
_HOW = frozenset({"foreach", "fused", "capturable"})

DEFINES_CLASS = "decoupled_weight_decay"
"""What makes an AdamW of an Adam: it belongs to the class, and is not carried from one class to another."""


def is_same_class(optimizer: Optimizer, recorded: str) -> bool:
    """Whether the live class, or that of the optimizer which it wraps, has the recorded name (``module:name``)."""
    name = recorded.rpartition(":")[2]
    return any(kind.__qualname__ == name for kind in _kinds(optimizer))


def another_algorithm(
    optimizer: Optimizer, name: str, recorded: str, saved: Iterable[Collection[object]]
) -> str | None:
    """What to tell where the recorded class was of another algorithm than ``optimizer``; None where it passes.

    It passes with the same name, where one derives from the other, or (unless both are torch's own) where they have
    distinctive hyper-parameters in common: ``saved`` are the keys of the saved groups.  Where only some are common the
    log says so.
    """
    if is_same_class(optimizer, recorded) or _is_related(optimizer, recorded):
        return None
    live = _kinds(optimizer)[-1]
    theirs = {key for group in saved for key in group} - _GENERAL - _HOW
    ours = {key for group in optimizer.param_groups for key in group} - _GENERAL - _HOW
    both_torchs = recorded.startswith(_TORCHS) and live.__module__.startswith(_TORCHS)
    if not both_torchs and theirs == ours:
        return None
    told = f"saved by {recorded.replace(':', '.')}, and {live.__module__}.{live.__qualname__} live"
    if not both_torchs and theirs & ours:
        log.warning("%s: %s; taken for the same algorithm, state goes by its names", name, told)
        return None
    return (
        f"{name}: {told}, which is another algorithm; build the optimizer that was saved, leave it out with names=, or "
        f"pass strict=False to take what fits by its name, as torch does"
    )


def _kinds(optimizer: Optimizer) -> list[type]:
    """The live class, and that of what it wraps (Accelerate's wrapper keeps it in ``optimizer``)."""
    inner = getattr(optimizer, "optimizer", None)
    return [type(optimizer), type(inner)] if isinstance(inner, Optimizer) else [type(optimizer)]


def _is_related(optimizer: Optimizer, recorded: str) -> bool:
    module, _, name = recorded.rpartition(":")
    kinds = _kinds(optimizer)
    if any(name == base.__qualname__ for kind in kinds for base in _ancestors(kind)):
        return True
    found = getattr(sys.modules.get(module), name, None)  # only what is loaded already
    return isinstance(found, type) and any(kind in _ancestors(found) for kind in kinds)


def _ancestors(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if issubclass(base, Optimizer) and base is not Optimizer]
