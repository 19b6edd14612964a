"""What a pickle held, as plain values: the form in which every source gives what is not a tensor.

None, bool, int, float, complex, str, bytes, list, tuple, set, dict and numpy arrays.  A torch dtype becomes
``"torch.float32"``, a size a tuple, a namespace a dict of its attributes, an object of any other class a dict with its
class under ``"__class__"``.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ckptengine.errors import CheckpointError, UnreadableFormat
from ckptengine.sources.stored import Dtype, StoredArray, StoredTensor
from ckptengine.sources.unpickle import NumpyArray, Placeholder

MAX_DEPTH = 200
MAX_VISITS_AGAIN = 1 << 20
TENSOR_CLASSES = (
    "torch._utils._rebuild_",
    "torch.Tensor ",
    "torch.distributed.tensor.DTensor",
    "torch.distributed._tensor",
    "torch.distributed._shard",
)
"""What the names of classes begin with whose objects are tensors."""
NAMESPACES = {"argparse.Namespace", "types.SimpleNamespace"}
__all__ = ["DROPPED", "array_of", "plain", "walk_leaves", "walk_tensors"]

DROPPED = object()
"""What ``on_tensor`` returns for a tensor that is to leave no trace (None in its place inside a list)."""


def plain(value: object, on_tensor: Callable[[StoredTensor], object] = lambda tensor: DROPPED) -> object:
    """``value`` as plain values.  An object that occurs twice is converted once and shared.

    A dict that loses all of its entries because they were dropped tensors is dropped too.
    """
    made = _Plain(on_tensor).convert(value, 0)
    return None if made is DROPPED else made


def array_of(value: object) -> StoredArray | None:
    """The numpy array that a pickle holds by value; None for anything else and for arrays of objects."""
    if not isinstance(value, NumpyArray):
        return None
    try:
        return value.array()
    except CheckpointError:
        return None


def walk_tensors(value: object) -> Iterator[tuple[tuple[object, ...], StoredTensor]]:
    """The tensors of nested dicts, lists, tuples and modules whose bytes are known."""
    for path, leaf in _walk(value, (), _Visits(objects=False)):
        if isinstance(leaf, StoredTensor):
            yield path, leaf


def walk_leaves(
    value: object, path: tuple[object, ...] = ()
) -> Iterator[tuple[tuple[object, ...], StoredTensor | Placeholder]]:
    """The tensors of nested dicts, lists and tuples with their paths (keys and positions), depth first.

    Modules that were pickled whole are walked as their state dict would be, objects of other classes by their
    attributes, items and arguments, each at the first place where it occurs.  A `Placeholder` is a tensor whose
    elements are not simply bytes of the file: sharded, sparse, quantized, a lazy view, of a subclass.
    Raises `UnreadableFormat` where the nesting is deeper than `MAX_DEPTH`, or where the same containers occur in each
    other so often that there is no end to it.
    """
    return _walk(value, path, _Visits(objects=True))


class _Visits:
    """Containers that were walked: a few of them inside each other are enough for more paths than can be walked.

    ``objects``: objects of unknown classes are walked too, once each, since they may well refer to each other.
    """

    def __init__(self, *, objects: bool) -> None:
        self.objects = objects
        self._seen: set[int] = set()
        self._again = 0

    def first(self, value: object) -> bool:
        """Whether this is the first time."""
        if id(value) in self._seen:
            return False
        self._seen.add(id(value))
        return True

    def add(self, value: object) -> None:
        if self.first(value):
            return
        self._again += 1
        if self._again > MAX_VISITS_AGAIN:
            raise UnreadableFormat(f"values that hold the same containers more than {MAX_VISITS_AGAIN} times")


def _walk(
    value: object, path: tuple[object, ...], visits: _Visits
) -> Iterator[tuple[tuple[object, ...], StoredTensor | Placeholder]]:
    if len(path) > MAX_DEPTH:
        raise UnreadableFormat(f"values nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, StoredTensor):
        yield path, value
    elif isinstance(value, dict):
        visits.add(value)
        for key, item in value.items():
            yield from _walk(item, (*path, key), visits)
    elif isinstance(value, list | tuple):
        visits.add(value)
        for index, item in enumerate(value):
            yield from _walk(item, (*path, index), visits)
    elif isinstance(value, Placeholder):
        yield from _walk_object(value, path, visits)


def _walk_object(
    value: Placeholder, path: tuple[object, ...], visits: _Visits
) -> Iterator[tuple[tuple[object, ...], Any]]:
    if value.class_name in NAMESPACES:
        yield from _walk(value.state, path, visits)
    elif value.class_name.startswith(TENSOR_CLASSES):
        local = value.get("_local_tensor")
        made_of = _sequence(value.args[1]) if len(value.args) > 1 else ()  # class, dtype, shape, ...
        shape = made_of[2] if len(made_of) > 2 else None
        yield path, local if isinstance(local, StoredTensor) and local.shape == shape else value
    elif is_module(value):
        gone = value.get("_non_persistent_buffers_set") or ()
        buffers = value.get("_buffers")
        kept = {name: item for name, item in buffers.items() if name not in gone} if isinstance(buffers, dict) else {}
        for part in (value.get("_parameters"), kept, value.get("_modules")):
            yield from _walk(part, path, visits)
    elif visits.objects and visits.first(value):
        for key, part in _parts(value):
            yield from _walk(part, (*path, key), visits)


def is_module(value: object) -> bool:
    """Whether it is a module that was pickled whole."""
    return isinstance(value, Placeholder) and all(
        isinstance(value.get(name), dict) for name in ("_parameters", "_modules")
    )


def _parts(value: Placeholder) -> Iterator[tuple[object, object]]:
    """What an object holds, under keys that differ: attributes, keys and positions; what comes later gives way."""
    parts = value.state if isinstance(value.state, tuple) else (value.state,)
    plainly = all(isinstance(part, dict) for part in parts if part is not None)  # its __dict__, or that and its slots
    state = [pair for part in parts if part for pair in part.items()] if plainly else list(enumerate(parts))
    groups: dict[str, list[tuple[Any, Any]]] = {
        "pairs": value.pairs or [],
        "items": list(enumerate(value.items or [])),
        "state": state,
        "kwargs": list(value.kwargs.items()),
        "args": list(enumerate(value.args)),
    }
    taken: set[str] = set()
    for group, pairs in groups.items():
        for key, part in pairs:
            told = key if str(key) not in taken else f"{group}.{key}"
            taken.add(str(told))
            yield told, part


def _sequence(value: object) -> list[Any] | tuple[Any, ...]:
    return value if isinstance(value, list | tuple) else ()


class _Plain:
    def __init__(self, on_tensor: Callable[[StoredTensor], object]) -> None:
        self._on_tensor = on_tensor
        self._done: dict[int, object] = {}
        self._keep: list[object] = []  # ids stay valid while their objects live

    def convert(self, value: object, depth: int) -> object:
        kind = type(value)
        if value is None or kind in (bool, int, float, complex, str, bytes, np.ndarray):
            return value
        if kind is Dtype:
            return f"torch.{value}"
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, StoredTensor):
            return self._on_tensor(value)
        if isinstance(value, pathlib.PurePath):
            return str(value)
        if depth > MAX_DEPTH:
            raise UnreadableFormat(f"values nested deeper than {MAX_DEPTH} levels")
        if id(value) not in self._done:
            self._keep.append(value)
            self._done[id(value)] = None  # a value that contains itself ends here
            self._done[id(value)] = self._compound(value, depth + 1)
        return self._done[id(value)]

    def _compound(self, value: object, depth: int) -> object:
        if isinstance(value, dict):
            made = {}
            for key, item in value.items():
                new = self.convert(item, depth)
                if new is not DROPPED:
                    made[self._key(key, depth)] = new
            return DROPPED if value and not made else made
        if isinstance(value, list):
            return self._items(value, depth)
        if isinstance(value, tuple):
            return tuple(self._items(value, depth))
        if isinstance(value, set | frozenset):
            return {self._key(item, depth) for item in value}
        if isinstance(value, NumpyArray):
            array = array_of(value)
            return {"__class__": "numpy.ndarray of objects"} if array is None else array.to_numpy()
        if isinstance(value, Placeholder):
            return self._placeholder(value, depth)
        return str(getattr(value, "class_name", None) or type(value).__name__)

    def _items(self, value: list[object] | tuple[object, ...], depth: int) -> list[object]:
        made = [self.convert(item, depth) for item in value]
        return [None if item is DROPPED else item for item in made]

    def _key(self, key: object, depth: int) -> object:
        made = self.convert(key, depth)
        try:
            hash(made)
        except TypeError:
            return str(made)
        return made

    def _placeholder(self, value: Placeholder, depth: int) -> object:
        if value.class_name.startswith(TENSOR_CLASSES):
            return DROPPED
        if value.class_name in NAMESPACES and isinstance(value.state, dict):
            return self.convert(value.state, depth)
        made: dict[str, object] = {"__class__": value.class_name}
        parts = {
            "args": list(value.args),
            "kwargs": value.kwargs,
            "state": value.state,
            "items": value.items,
            "pairs": value.pairs,
        }
        for name, part in parts.items():
            if part:
                new = self.convert(part, depth)
                if new is not DROPPED:
                    made[name] = new
        return made
