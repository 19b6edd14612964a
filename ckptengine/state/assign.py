"""Putting restored plain values into live containers so that the containers stay the same objects."""

from __future__ import annotations

import dataclasses
import io
import random
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import torch

from ckptengine.state.decoding import set_fields
from ckptengine.state.scalars import set_numpy_generator

_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)


def assign(live: Any, new: Any) -> Any:
    """``live`` made equal to ``new`` where it is a mutable object of the same type, else ``new`` itself.

    Applies to the parts of containers too: a dict inside a list inside a dict keeps its identity.
    """
    if live is new or type(live) is not type(new):
        return new
    kind = type(new)
    if kind in _MAPPINGS:
        return _assign_mapping(live, new)
    if kind is list:
        live[:] = _parts(live, new)
    elif kind is deque:
        if live.maxlen != new.maxlen:
            return new
        parts = _parts(live, new)
        live.clear()
        live.extend(parts)
    elif kind is set:
        live.clear()
        live.update(new)
    elif kind is bytearray:
        live[:] = new
    elif kind is np.ndarray:
        if live.shape != new.shape or live.dtype != new.dtype or not live.flags.writeable:
            return new
        live[...] = new
    elif dataclasses.is_dataclass(kind) and not _is_frozen(kind):
        fields = {f.name: getattr(new, f.name) for f in dataclasses.fields(kind) if hasattr(new, f.name)}
        set_fields(live, {k: assign(getattr(live, k, None), v) for k, v in fields.items()}, kind.__qualname__)
    else:
        return _assign_stream(live, new)
    return live


def _assign_mapping(live: Any, new: Any) -> Any:
    merged = [(key, assign(live[key], part) if key in live else part) for key, part in new.items()]
    live.clear()
    for key, part in merged:
        live[key] = part
    if isinstance(live, defaultdict):
        live.default_factory = new.default_factory
    if hasattr(new, "_metadata"):
        live._metadata = new._metadata
    return live


def _parts(live: Any, new: Any) -> list[Any]:
    old = list(live)
    return [assign(old[index], part) if index < len(old) else part for index, part in enumerate(new)]


def _is_frozen(kind: type) -> bool:
    return bool(kind.__dataclass_params__.frozen)  # type: ignore[attr-defined]


def _assign_stream(live: Any, new: Any) -> Any:
    """Random generators and byte streams: their state moves, the object stays."""
    kind = type(new)
    if kind is random.Random:
        live.setstate(new.getstate())
    elif kind is torch.Generator and live.device == new.device:
        live.set_state(new.get_state())
    elif kind is np.random.RandomState:
        set_numpy_generator(live, new.get_state(legacy=False))
    elif kind is np.random.Generator and type(live.bit_generator) is type(new.bit_generator):
        set_numpy_generator(live, new.bit_generator.state)
    elif kind is io.BytesIO:
        live.seek(0)
        live.truncate()
        live.write(new.getvalue())
        live.seek(0)
    else:
        return new
    return live
