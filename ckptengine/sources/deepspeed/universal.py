"""DeepSpeed's universal checkpoints: one folder per parameter, one file per state.

Two dialects: a dictionary with the whole tensor (ZeRO-1 and -2), or a flat tensor without its shape (ZeRO-3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptengine.errors import Damaged, UnreadableFormat
from ckptengine.sources.deepspeed.folder import StepFolder
from ckptengine.sources.deepspeed.groups import MASTER, dealt_back
from ckptengine.sources.deepspeed.header import ModelStates, int_list, load_dict
from ckptengine.sources.files import InlineFiles
from ckptengine.sources.held import Chunk, Held, Whole, flat, number
from ckptengine.sources.stored import StoredTensor
from ckptengine.sources.torchzip import load_torch

_SUFFIX = ".pt"
_OPTIMIZER = "zero/optimizer_state.pt"


@dataclass(frozen=True, slots=True)
class Universal:
    """All states of a universal checkpoint, the optimizer's groups with parameter names, its other values."""

    entries: list[tuple[str, str, Held]]
    named_groups: list[dict[Any, Any]]
    rest: Mapping[Any, Any]


def read_universal(folder: StepFolder, model: ModelStates, inline: InlineFiles) -> Universal:
    """Read the headers of every state file beneath ``zero/``."""
    files = folder.files
    shapes = {name: shape for group in model.shapes or () for name, shape in group.items()}
    optimizer = load_dict(files, _OPTIMIZER) if files.exists(_OPTIMIZER) else {}
    others = {*model.module, *model.frozen_shapes, *model.shared}
    steps = _steps(optimizer, model, inline)
    found: list[tuple[str, str, Held]] = []
    for entry in files.entries("zero"):
        if not entry.endswith("/"):
            continue
        name = entry[:-1]
        stored = {state[: -len(_SUFFIX)] for state in files.entries(f"zero/{name}") if state.endswith(_SUFFIX)}
        if stored == {"fp32"} and shapes and name not in shapes and name in others:
            continue  # DeepSpeed puts a copy of what the optimizer does not know there: buffers, frozen and tied ones
        for state in sorted(stored):
            key = MASTER if state == "fp32" else state
            held = _atom(folder, f"zero/{name}/{state}{_SUFFIX}", shapes.get(name), inline)
            if held is not None:
                found.append((name, key, held))
        if stored:
            found += [(name, key, held) for key, held in steps.get(name, {}).items() if key not in stored]
    if not found:
        raise UnreadableFormat(f"{files.root}/zero has no parameters; the universal checkpoint is not complete")
    return Universal(found, _groups(optimizer, model), {k: v for k, v in optimizer.items() if k not in _TENSORS})


_TENSORS = {"optimizer_state_dict", "fp32_flat_groups", "param_groups", "base_optimizer_state"}


def _atom(folder: StepFolder, path: str, shape: tuple[int, ...] | None, inline: InlineFiles) -> Held | None:
    loaded = load_torch(folder.files, path)
    if isinstance(loaded, dict):
        loaded = loaded.get("param")
    if not isinstance(loaded, StoredTensor):
        return number(loaded, inline)
    if shape is None or loaded.shape == shape or not loaded.shape:
        return Whole(loaded)
    if len(loaded.shape) != 1:
        return Whole(loaded)  # put together of tensor-parallel ranks, whose model files know their own shapes
    if loaded.size != math.prod(shape):
        raise Damaged(f"{folder.files.root}/{path} holds {loaded.size} elements instead of {list(shape)}")
    return flat(path, shape, [Chunk(loaded, 0, 0, loaded.size)])


def _inner(optimizer: Mapping[Any, Any]) -> Mapping[Any, Any]:
    inner = optimizer.get("optimizer_state_dict")
    return inner if isinstance(inner, dict) else {}


def _steps(optimizer: Mapping[Any, Any], model: ModelStates, inline: InlineFiles) -> dict[str, dict[str, Held]]:
    """The counters, and other single numbers, of every parameter whose folder has none: those of its group."""
    states = _inner(optimizer).get("state")
    groups = optimizer.get("param_groups")
    found: dict[str, dict[str, Held]] = {}
    for g, names in enumerate(model.shapes or ()):
        state = states.get(g) if isinstance(states, dict) else None
        numbers = dict(_numbers(state, inline)) if isinstance(state, dict) else {}
        if "step" not in numbers and isinstance(groups, list) and g < len(groups) and isinstance(groups[g], dict):
            numbers |= dict(_numbers({"step": groups[g].get("step")}, inline))
        found |= dict.fromkeys(names, numbers)
    return found


def _numbers(state: Mapping[Any, Any], inline: InlineFiles) -> Iterator[tuple[str, Held]]:
    for key, value in state.items():
        if isinstance(value, StoredTensor) and value.size == 1 and (not value.shape or key == "step"):
            yield str(key), Whole(StoredTensor(value.storage, value.dtype, value.start, (), ()))
        elif key == "step" and (held := number(value, inline)) is not None:
            yield "step", held


def _groups(optimizer: Mapping[Any, Any], model: ModelStates) -> list[dict[Any, Any]]:
    groups = optimizer.get("param_groups", _inner(optimizer).get("param_groups"))
    shapes = [list(shapes) for shapes in model.shapes or ()]
    counts = int_list(optimizer.get("partition_count"))
    if model.round_robin and counts and "zero_stage" in optimizer:
        shapes = [dealt_back(names, count) for names, count in zip(shapes, counts, strict=False)]
    made: list[dict[Any, Any]] = []
    for position, group in enumerate(groups if isinstance(groups, list) else []):
        if not isinstance(group, dict):
            continue
        members = int_list(group.get("params"))
        held = members if members and max(members) < len(shapes) else [position]
        names = [name for g in held if g < len(shapes) for name in shapes[g]]
        made.append({**{key: value for key, value in group.items() if key != "params"}, "params": names})
    return made
