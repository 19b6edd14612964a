"""The parts of DeepSpeed's pickled dictionaries that the reader needs, checked and named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptengine.errors import UnreadableFormat
from ckptengine.sources.plain import walk_tensors
from ckptengine.sources.port import Files
from ckptengine.sources.stored import StoredTensor
from ckptengine.sources.torchzip import load_torch
from ckptengine.sources.unpickle import Placeholder

Shapes = dict[str, tuple[int, ...]]
TENSOR_KEYS = ("module", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params")


@dataclass(frozen=True, slots=True)
class ModelStates:
    """One ``*_model_states.pt``.

    ``shapes`` has one dictionary per flat group (ZeRO-3: per sub-group), in flat order; None without ZeRO.
    """

    path: str
    module: Mapping[str, StoredTensor]
    optimizer: Mapping[Any, Any] | None
    shapes: list[Shapes] | None
    frozen_shapes: Shapes
    frozen: Mapping[str, StoredTensor]
    shared: Mapping[str, str]
    buffers: frozenset[str]
    rest: Mapping[Any, Any]

    @property
    def dp_world_size(self) -> int | None:
        value = self.rest.get("dp_world_size")
        return value if type(value) is int and value > 0 else None

    @property
    def round_robin(self) -> bool:
        """Whether flat groups have another order than the optimizer's groups, which the slice mappings ignore."""
        config = self.rest.get("ds_config")
        zero = config.get("zero_optimization") if isinstance(config, dict) else None
        return isinstance(zero, dict) and zero.get("round_robin_gradients") is True


def load_dict(files: Files, path: str) -> dict[Any, Any]:
    """The dictionary of a torch file; `UnreadableFormat` when it holds something else."""
    loaded = load_torch(files, path)
    if not isinstance(loaded, dict):
        raise UnreadableFormat(f"{files.root}/{path} does not hold a dictionary")
    return loaded


def read_model_states(files: Files, path: str) -> ModelStates:
    """Read the header of a model file."""
    loaded = load_dict(files, path)
    where = f"{files.root}/{path}"
    shapes = loaded.get("param_shapes")
    if isinstance(shapes, dict):
        shapes = [shapes]
    if shapes is not None and not isinstance(shapes, list):
        raise UnreadableFormat(f"{where}: param_shapes is neither a list nor a dictionary")
    optimizer = loaded.get("optimizer")
    return ModelStates(
        path=path,
        module=tensors_of(loaded.get("module")),
        optimizer=optimizer if isinstance(optimizer, dict) else None,
        shapes=[_shapes(group, where) for group in shapes] if shapes is not None else None,
        frozen_shapes=_shapes(loaded.get("frozen_param_shapes") or {}, where),
        frozen=tensors_of(loaded.get("frozen_param_fragments")),
        shared=_aliases(loaded.get("shared_params")),
        buffers=frozenset(name for name in loaded.get("buffer_names") or () if isinstance(name, str)),
        rest={key: value for key, value in loaded.items() if key not in TENSOR_KEYS},
    )


def tensors_of(value: object) -> dict[str, StoredTensor]:
    """The tensors of a (nested) state dictionary by dotted name."""
    return {".".join(str(key) for key in path): tensor for path, tensor in walk_tensors(value)}


def tensor_list(value: object, where: str) -> list[StoredTensor]:
    """A list of tensors."""
    if not isinstance(value, list | tuple) or not all(isinstance(item, StoredTensor) for item in value):
        raise UnreadableFormat(f"{where} is not a list of tensors")
    return list(value)


def int_list(value: object) -> list[int] | None:
    """A list of whole numbers, or None."""
    if isinstance(value, list | tuple) and all(type(item) is int for item in value):
        return list(value)
    return None


def stage_of(value: object) -> int | None:
    """The ZeRO stage, which is stored as a number or as an enumeration member."""
    if isinstance(value, Placeholder) and value.args and type(value.args[0]) is int:
        return value.args[0]
    return value if type(value) is int else None


def _shapes(group: object, where: str) -> Shapes:
    made: Shapes = {}
    if not isinstance(group, dict):
        raise UnreadableFormat(f"{where}: the shapes of a parameter group are not a dictionary")
    for name, shape in group.items():
        dims = int_list(shape)
        if not isinstance(name, str) or dims is None or any(dim < 0 for dim in dims):
            raise UnreadableFormat(f"{where}: parameter {name!r} has the shape {shape!r}")
        made[name] = tuple(dims)
    return made


def _aliases(shared: object) -> dict[str, str]:
    if isinstance(shared, list):  # older versions keep pairs
        shared = {pair[0]: pair[1] for pair in shared if isinstance(pair, list | tuple) and len(pair) == 2}
    if not isinstance(shared, dict):
        return {}
    return {alias: name for alias, name in shared.items() if isinstance(alias, str) and isinstance(name, str)}
