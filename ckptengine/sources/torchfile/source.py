"""Files of torch.save as checkpoints: nested state, a state dict, or Hugging Face's ``pytorch_model.bin`` shards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ckptengine.errors import Damaged, NotFound, UnreadableFormat
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.files import InlineFiles
from ckptengine.sources.held import Number, number
from ckptengine.sources.optimizers import FLAT_STATE, is_flat
from ckptengine.sources.plain import DROPPED, is_module, plain, walk_leaves
from ckptengine.sources.port import Files, Format, Opening, Source
from ckptengine.sources.smalltensors import as_plain
from ckptengine.sources.stored import StoredTensor
from ckptengine.sources.torchfile.lightning import lightning_step, rearranged
from ckptengine.sources.torchzip import is_torch_file, load_torch, own_record
from ckptengine.sources.unpickle import Placeholder

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEX = "pytorch_model.bin.index.json"
INDEX_SUFFIX = ".bin.index.json"
_NUMBERED = re.compile(r"-\d{5,}-of-(\d{5,})\.")
MAX_INDEX_BYTES = 1 << 28
MAX_OPTIMIZER_DEPTH = 20
OWN_RECORD = "ckptengine"


class TorchSource:
    """The tensors of one or more torch.save files.

    Names are paths joined with dots; a file whose tensors all lie at its top is a state dict and is presented under
    ``model.``.  An optimizer's ``<key>.state.<parameter>.<state>`` beside ``<key>.param_groups`` is presented as
    ``<key>.<parameter>.<state>``, where the parameter is its name if the optimizer was given names, else its number.
    A ``step`` that torch kept as a plain number is a 0-d tensor.  Lightning's ``state_dict`` is ``model`` and its
    ``optimizer_states`` are ``optim``, ``optim_1`` and so on.  ``places`` has the key under which all of a file goes.
    """

    format = "torch"

    def __init__(
        self,
        files: Files,
        paths: Sequence[str],
        step: int | None = None,
        places: Mapping[str, str] | None = None,
    ) -> None:
        inline = files if isinstance(files, InlineFiles) else InlineFiles(files)
        self.files: Files = inline
        own = _own(files, paths)
        self.metrics: Mapping[str, float] = {}
        self._roots = [load_torch(files, path) for path in paths]
        self.keeps_order = own is None  # a conversion has its source's order
        if own is None:
            step = next((found for root in self._roots if (found := lightning_step(root)) is not None), step)
            self._roots = [rearranged(root) for root in self._roots]
        else:
            step = own.get("step", step)
        self.step = step
        if places is not None:
            self._roots = [{places[path]: root} for path, root in zip(paths, self._roots, strict=True)]
        self._numbers: dict[str, Number] = {}
        self._tensors: dict[str, StoredTensor | Placeholder] = {}
        self._paths: dict[str, tuple[object, ...]] = {}
        self._aliases: dict[str, str] = {}
        self._logical = None if own is None else own.get("tensors")
        first: dict[tuple[object, ...], str] = {}
        for root in self._roots:
            if own is None:
                self._numbers |= _counters(root, (), inline)
            for name, path, tensor in _named(root, own is not None):
                if self._is_value(tensor):
                    continue
                if name in self._tensors:
                    raise Damaged(f"tensor {name!r} occurs twice in {files.root}")
                self._tensors[name] = tensor
                if _is_told(root, path):
                    self._paths[name] = path
                if isinstance(tensor, StoredTensor) and tensor.size and first.setdefault(tensor.identity, name) != name:
                    self._aliases[name] = first[tensor.identity]

    def names(self) -> Sequence[str]:
        """Canonical names, in the order of the file."""
        return [*self._tensors, *(name for name in self._numbers if name not in self._tensors)]

    def tensor(self, name: str) -> LogicalTensor:
        """The tensor under a canonical name: one fragment, strided where it was saved so."""
        stored = self._tensors.get(name)
        if stored is None and name in self._numbers:
            placed = self._numbers[name].placed()
            return LogicalTensor(name, placed.dtype, placed.shape, placed.fragments)
        if stored is None:
            raise NotFound(f"{self.files.root} has no tensor {name!r}")
        if isinstance(stored, Placeholder):
            raise UnreadableFormat(
                f"{name!r} in {self.files.root} is a {stored.class_name}, whose elements are not simply bytes of the "
                "file (sharded, sparse, quantized or a lazy view); save it with torch.distributed.checkpoint if it is "
                "sharded, else dense, and a lazy view by resolve_conj() or resolve_neg()"
            )
        try:
            fragments = [stored.fragment()] if stored.size else []
        except UnreadableFormat as error:
            raise UnreadableFormat(f"{name!r} in {self.files.root}: {error}") from None
        return LogicalTensor(name, stored.dtype, stored.shape, fragments)

    def aliases(self) -> Mapping[str, str]:
        """Names of the same elements of the same storage."""
        return self._aliases

    def path(self, name: str) -> tuple[object, ...] | None:
        """See `ckptengine.sources.port.KnowsPaths`."""
        return self._paths.get(name)

    def values(self) -> object:
        """What is no tensor, nested as it was; of several files, the dicts merged.

        The groups of an optimizer that was given names list their ``params`` by name.
        """
        made = [_with_names(plain(root, self._value), 0, bare=bool(self._numbers)) for root in self._roots]
        if len(made) == 1:
            return {} if made[0] is None else made[0]
        return {key: value for part in made if isinstance(part, dict) for key, value in part.items()}

    def _is_value(self, tensor: StoredTensor | Placeholder) -> bool:
        """Whether a tensor of a file that we wrote was among the values of what it was made of."""
        if self._logical is None or not isinstance(tensor, StoredTensor):
            return False
        return tensor.storage.key.isdigit() and int(tensor.storage.key) >= self._logical

    def _value(self, tensor: StoredTensor) -> object:
        return as_plain(tensor, self.files) if self._is_value(tensor) else DROPPED


def _own(files: Files, paths: Sequence[str]) -> dict[str, Any] | None:
    """What our own writer adds to its file, whose names are canonical as they are; None for files of others."""
    data = own_record(files, paths[0], OWN_RECORD) if len(paths) == 1 else None
    if data is None:
        return None
    try:
        own = json.loads(data)
        if own["version"] != 1 or not (own["step"] is None or type(own["step"]) is int):
            raise ValueError
        if type(own.get("tensors", 0)) is not int:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UnreadableFormat(
            f"{files.root}/{paths[0]}: its record of what wrote it is damaged, or of a newer version"
        ) from None
    return dict(own)


Named = tuple[str, tuple[object, ...], StoredTensor | Placeholder]
"""A canonical name, the path that it was made of, and the tensor."""


def _named(root: object, own: bool) -> list[Named]:
    found = list(walk_leaves(root))
    if is_module(root):
        return [(".".join(("model", *map(str, path))), ("model", *path), tensor) for path, tensor in found]
    if not own and all(len(path) == 1 for path, _ in found) and not is_flat(root):
        return [(f"model.{path[0]}", ("model", path[0]), tensor) for path, tensor in found]
    groups: dict[tuple[Any, ...], Mapping[object, str]] = {}
    flat: dict[tuple[Any, ...], bool] = {}
    named = []
    for path, tensor in found:
        if path and type(path[-1]) is str and path[-1].startswith(FLAT_STATE):
            key = path[:-1]
            if key not in flat:
                flat[key] = is_flat(_inside(root, key))
            if flat[key]:
                path = (*key, path[-1][len(FLAT_STATE) :])
        at = next((i for i, part in enumerate(path) if part == "state" and len(path) > i + 2), None)
        if at is not None:
            key = path[:at]
            if key not in groups:
                groups[key] = _parameter_names(root, key)
            if groups[key]:
                path = (*key, groups[key].get(path[at + 1], path[at + 1]), *path[at + 2 :])
        named.append((path, tensor))
    names = [".".join(map(str, path)) for path, _ in named]
    if len(set(names)) != len(names):  # {"a.b": x, "a": {"b": y}}
        names = [".".join(str(part).replace("\\", "\\\\").replace(".", "\\.") for part in path) for path, _ in named]
    return [(name, path, tensor) for name, (path, tensor) in zip(names, named, strict=True)]


def _is_told(root: Any, path: tuple[object, ...]) -> bool:
    """Whether a path says where its tensor is nested: every number in it is a position, every other part a text."""
    for part in path:
        listed = isinstance(root, list | tuple)
        if type(part) is not (int if listed else str):
            return False
        root = root[part] if listed else root.get(part) if isinstance(root, dict) else None
    return True


def _counters(root: Any, key: tuple[str, ...], inline: InlineFiles) -> dict[str, Number]:
    """The counters of optimizers that are plain numbers, by canonical name."""
    if not isinstance(root, dict | list) or len(key) > MAX_OPTIMIZER_DEPTH:
        return {}
    parts: Any = enumerate(root) if isinstance(root, list) else root.items()
    inside: dict[Any, Any] = dict(parts)
    if not isinstance(inside.get("param_groups"), list) or not isinstance(inside.get("state"), dict):
        inner = ((str(part), item) for part, item in inside.items() if isinstance(item, dict | list))
        return {k: v for part, item in inner for k, v in _counters(item, (*key, part), inline).items()}
    names = _parameter_names(root, ())
    found: dict[str, Number] = {}
    for parameter, state in inside["state"].items() if names else ():
        held = number(state.get("step"), inline) if isinstance(state, dict) else None
        if held is not None:
            found[".".join((*key, str(names.get(parameter, parameter)), "step"))] = held
    return found


def _parameter_names(root: Any, key: tuple[Any, ...]) -> Mapping[object, str]:
    """Number -> name of an optimizer's parameters, from its param_groups; empty where there is no optimizer."""
    inner = _inside(root, key)
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    if not isinstance(groups, list):
        return {}
    names: dict[object, str] = {}
    for group in groups:
        numbers = group.get("params") if isinstance(group, dict) else None
        if not isinstance(numbers, list) or not all(isinstance(number, int | str) for number in numbers):
            return {}
        given = group.get("param_names")
        known = isinstance(given, list) and len(given) == len(numbers)
        names |= {number: str(name) for number, name in zip(numbers, given if known else numbers, strict=True)}
    return names


def _inside(root: Any, path: tuple[Any, ...]) -> Any:
    """What is at a path of keys and positions; None where that leads through what is no container."""
    for part in path:
        if not isinstance(root, dict | list | tuple):
            return None
        root = root[part]
    return root


def _with_names(value: Any, depth: int, *, bare: bool) -> Any:
    """Optimizers among the values with the names of their parameters instead of torch's numbers.

    ``bare``: without counters, which are shown as tensors.
    """
    if isinstance(value, list) and depth <= MAX_OPTIMIZER_DEPTH:
        return [_with_names(item, depth + 1, bare=bare) for item in value]
    if not isinstance(value, dict) or depth > MAX_OPTIMIZER_DEPTH:
        return value
    groups: Any = value.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return {key: _with_names(item, depth + 1, bare=bare) for key, item in value.items()}
    made = dict(value)
    names = _parameter_names(value, ())
    if isinstance(value.get("state"), dict) and names and bare:
        made["state"] = _without_counters(value["state"])
        if value["state"] and not made["state"]:
            del made["state"]
    if not all(isinstance(group.get("param_names"), list) for group in groups):
        return made
    rows = [{key: item for key, item in group.items() if key != "param_names"} for group in groups]
    made["param_groups"] = [{**row, "params": [names.get(one, one) for one in row.get("params", ())]} for row in rows]
    if isinstance(made.get("state"), dict):
        made["state"] = {names.get(one, one): item for one, item in made["state"].items()}
    return made


def _without_counters(states: dict[Any, Any]) -> dict[Any, Any]:
    made = {}
    for parameter, state in states.items():
        if isinstance(state, dict) and type(state.get("step")) in (int, float):
            state = {key: item for key, item in state.items() if key != "step"}
            if not state:
                continue
        made[parameter] = state
    return made


def members(files: Files, entry: str | None) -> list[str]:
    """The files of one checkpoint; `UnreadableFormat` where that cannot be told."""
    if entry is None and files.exists(INDEX):
        return _of_index(files, INDEX)
    if entry is not None and entry.endswith(INDEX_SUFFIX):
        return _of_index(files, entry)
    if entry is not None:
        return [entry]
    found = _candidates(files)
    if "pytorch_model.bin" in found:
        return ["pytorch_model.bin"]
    if len(found) != 1:
        raise UnreadableFormat(f"{files.root} has {len(found)} files of torch.save; open one of them by name")
    part = _NUMBERED.search(found[0])
    if part is not None and int(part[1]) > 1:
        raise NotFound(f"{files.root} has {found[0]}, but no {INDEX} and no other part; fetch the missing files")
    return found


def _of_index(files: Files, path: str) -> list[str]:
    shown = f"{files.root.rstrip('/')}/{path}"
    try:
        index = json.loads(files.read(path, 0, min(files.size(path), MAX_INDEX_BYTES)))["weight_map"]
        members = sorted(set(index.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{shown} has no weight_map of names to files") from None
    for member in members:
        if not isinstance(member, str) or not files.exists(member):
            raise NotFound(f"{shown} names {member!r}, which does not exist; fetch the missing shard")
    return members


def _candidates(files: Files) -> list[str]:
    return [name for name in files.entries() if name.endswith(SUFFIXES) and is_torch_file(files, name)]


def _probe(opening: Opening) -> bool:
    if opening.entry is not None:
        return opening.entry.endswith(INDEX_SUFFIX) or is_torch_file(opening.files, opening.entry)
    return INDEX in opening.files.entries() or bool(_candidates(opening.files))


def _open(opening: Opening) -> Source:
    return TorchSource(opening.files, members(opening.files, opening.entry), opening.step)


FORMAT = Format("torch", _probe, _open)
