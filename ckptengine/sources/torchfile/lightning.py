"""Lightning's checkpoints: files of torch.save with names of their own for what everybody has."""

from __future__ import annotations

from typing import Any

_VERSION = "pytorch-lightning_version"
_WEIGHTS, _OPTIMIZERS, _STEP = "state_dict", "optimizer_states", "global_step"


def _is_lightning(root: Any) -> bool:
    return isinstance(root, dict) and _VERSION in root and isinstance(root.get(_WEIGHTS), dict)


def lightning_step(root: Any) -> int | None:
    """The training step of a Lightning checkpoint; None for every other file."""
    step = root.get(_STEP) if _is_lightning(root) else None
    return step if type(step) is int else None


def rearranged(root: Any) -> Any:
    """The same with the weights under ``model`` and optimizers under ``optim``, ``optim_1``...; others unchanged."""
    if not _is_lightning(root):
        return root
    optimizers = root.get(_OPTIMIZERS)
    listed = optimizers if isinstance(optimizers, list) else []
    named = {f"optim_{at}" if at else "optim": optimizer for at, optimizer in enumerate(listed)}
    taken = {"model", *named} & root.keys()
    if taken or not all(isinstance(optimizer, dict) for optimizer in listed):
        return root
    rest = {key: value for key, value in root.items() if key != _WEIGHTS and (key != _OPTIMIZERS or not named)}
    return {"model": root[_WEIGHTS], **named, **rest}
