"""Megatron's keys as canonical names."""

from __future__ import annotations

import re
from collections.abc import Iterable

MASTERS = ("fp32_param", "param")
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)")
_FLAT_BUFFER = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\..*")
_WRAPPER = "module."


def wrapper_prefix(keys: Iterable[str]) -> str:
    """What wrappers of the model put before every weight's key: ``module.``, several times, or nothing."""
    weights = [key for key in keys if _STATE.fullmatch(key) is None and _FLAT_BUFFER.fullmatch(key) is None]
    prefix = ""
    while weights and all(key.startswith(prefix + _WRAPPER) for key in weights):
        prefix += _WRAPPER
    return prefix


def canonical_names(keys: Iterable[str]) -> dict[str, str]:
    """Canonical name -> key, in the order of the keys.

    ``optimizer.state.<state>.<parameter>`` is a state of the parameter, every other key a weight.  Buffers of the
    distributed optimizer, whose parameters the checkpoint does not name, are left out.
    """
    keys = [key for key in keys if _FLAT_BUFFER.fullmatch(key) is None]
    prefix = wrapper_prefix(keys)
    names: dict[str, str] = {}
    for key in keys:
        match = _STATE.fullmatch(key)
        if match is None:
            names[f"model.{key[len(prefix) :]}"] = key
        else:
            state = "master" if match[1] in MASTERS else match[1]
            names[f"optim.{match[2].removeprefix(prefix)}.{state}"] = key
    return names
