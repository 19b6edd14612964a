"""Objects that the state holds beside modules and optimizers: anything with ``state_dict`` and ``load_state_dict``."""

from __future__ import annotations

from typing import Protocol, cast

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

PHASES = ("modules", "optimizers", "schedulers", "others", "loaders")
"""The order in which loaded objects take their state; random streams come after all of them."""


class Stateful(Protocol):
    def state_dict(self) -> object: ...

    def load_state_dict(self, state: object, /) -> object: ...


def as_stateful(value: object) -> Stateful | None:
    """``value`` if it has a ``state_dict`` and a ``load_state_dict`` to call; classes do not count."""
    if isinstance(value, type | nn.Module | Optimizer):
        return None
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
        return cast(Stateful, value)
    return None


def phase_of(value: object) -> str:
    """When ``value`` takes its state: one of `PHASES`."""
    if isinstance(value, nn.Module):
        return "modules"
    if isinstance(value, Optimizer):
        return "optimizers"
    if isinstance(value, LRScheduler | ReduceLROnPlateau):
        return "schedulers"
    return "loaders" if hasattr(value, "__iter__") else "others"


def class_name(value: object) -> str:
    """The class as recorded beside the saved state, for messages only; nothing is imported from it."""
    return f"{type(value).__module__}:{type(value).__qualname__}"
