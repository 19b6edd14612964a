"""What the parts of a restore share: the two sides, what was found wrong, what will be filled, what runs at commit."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.piece import Piece, whole
from ckptengine.state import names
from ckptengine.state.collect import Walk
from ckptengine.state.decoding import Decoder, checked, malformed
from ckptengine.state.dtypes import torch_dtype
from ckptengine.state.encoding import Json
from ckptengine.state.objects import PHASES
from ckptengine.state.optimizers import ParameterEntry
from ckptengine.state.scalars import read_dtype, read_shape
from ckptengine.state.selection import Selection
from ckptengine.state.sharded import Sharded
from ckptengine.state.target import Target
from ckptengine.state.tensors import Described


@dataclass(frozen=True, slots=True)
class SavedState:
    """What a checkpoint holds, as `FlatState` gives it.

    ``tensors`` maps each name to dtype and global shape.  ``values`` is None for a source that records none: then
    plain values stay as they are.  ``rank_values`` is this rank's own, None where there are none for it.  ``digests``
    are of the tensors' contents, where the checkpoint records them.  ``numbered`` has the parameters by group of each
    optimizer whose ``values`` are not offered and whose parameters have numbers instead of names.

    ``offered`` are the plain values of a checkpoint of another format (None for one of a live state); its names are
    then as other tools spell them, without escapes.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    values: Json = None
    rank_values: Json = None
    digests: Mapping[str, int] = field(default_factory=dict)
    numbered: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    offered: object = None


@dataclass(frozen=True, slots=True)
class Trial:
    """An expanded live tensor: memory of its own to read all of it into, and the ``first`` elements, which it keeps."""

    name: str
    target: Target
    first: torch.Tensor

    def problem(self) -> str | None:
        """Once the target is filled: what would be lost."""
        whole = self.target.tensor
        found, kept = (one.contiguous().view(-1).view(torch.uint8) for one in (whole, self.first.expand_as(whole)))
        if torch.equal(found, kept):  # bytes: a NaN is itself
            return None
        return (
            f"{self.name}: its elements share memory here (it is expanded), and differ in the checkpoint; give it "
            f"memory for each with .clone()"
        )


class Absent:
    """The saved side says nothing about this place (a source without values)."""


ABSENT = Absent()
Build = Callable[[], Any]
"""Makes, at commit, the value that belongs in a live place; mutable live objects return themselves."""

OnMissing = Literal["problem", "keep"]


class Context:
    """One restore in the making.  Nothing live is touched until `Filling.commit` runs the actions."""

    def __init__(self, walk: Walk, saved: SavedState, selection: Selection, on_missing_rank: OnMissing) -> None:
        self.walk = walk
        self.saved = saved
        self.selection = selection
        self.on_missing_rank = on_missing_rank
        self.problems: list[str] = []
        self.forgivable: set[str] = set()
        self.extra: list[str] = []
        self.targets: list[Target] = []
        self.trials: list[Trial] = []
        self.used: set[str] = set()
        self.actions: dict[str, list[Callable[[], object]]] = {phase: [] for phase in PHASES}
        self.staged: list[Callable[[], object]] = []
        self.device: torch.device | None = None
        self.rank_mark = ""
        self.found_any = False
        self._filled: dict[tuple[object, ...], tuple[str, str]] = {}
        self._by_name: dict[str, ParameterEntry] | None = None
        me = weakref.ref(self)  # a context of very many tensors must not be cyclic garbage

        def leaf(node: dict[str, Json], decoder: Decoder) -> object:
            context = me()
            assert context is not None
            return context._decode_leaf(node)

        self.decoder = Decoder(types=walk.types, leaf=leaf)

    # names

    def stored(self, name: str) -> str | None:
        """The stored tensor that ``name`` reads, an alias followed; None where there is none."""
        if self.rank_mark:
            name = name if name.endswith(self.rank_mark) else name + self.rank_mark
        found = self._known(name)
        if found is None and self.saved.offered is not None and "\\" in name:
            found = next(filter(None, map(self._known, self._spellings(name))), None)
        return found

    def _known(self, name: str) -> str | None:
        if name in self.saved.tensors:
            return name
        owner = self.saved.aliases.get(name)
        return owner if owner in self.saved.tensors else None

    def _spellings(self, name: str) -> Iterator[str]:
        """What other formats call the tensor of a dict with dots in its keys, or of an optimizer's state dict."""
        spelled = names.plain(name)
        if spelled in self.walk.found:
            return  # that is another one of the live state
        yield spelled
        for match in re.finditer(r"\.state\.", spelled):
            yield f"{spelled[: match.start()]}.{spelled[match.end() :]}"

    def parameter_named(self, name: str) -> ParameterEntry | None:
        """The live parameter whose full name is ``name``."""
        if self._by_name is None:
            self._by_name = {one.name: one for entries in self.walk.parameters.values() for one in entries}
        return self._by_name.get(name)

    def missing(self, name: str) -> None:
        self.lacking(f"{name}: in the live state, not in the checkpoint")

    def lacking(self, problem: str) -> None:
        """A problem that a restore which is not strict passes over: the live side keeps what it has."""
        self.problems.append(problem)
        self.forgivable.add(problem)

    # tensors

    def fill(self, name: str, described: Described, live: torch.Tensor | Sharded | None, source: str | None) -> bool:
        """Fill a live tensor in place from stored tensor ``source``; False where that was reported as a problem."""
        if source is None:
            self.missing(name)
            return False
        self.used.add(name)
        self.used.add(source)
        dtype, shape = self.saved.tensors[source]
        if shape != described.global_shape:
            self.problems.append(f"{name}: shape {shape} in the checkpoint, {described.global_shape} live")
            return False
        if dtype != described.dtype:
            if shape == () and live is not None and not isinstance(live, Sharded):
                return self._fill_scalar(described.tensor, dtype, source)
            self.problems.append(f"{name}: dtype {dtype} in the checkpoint, {described.dtype} live")
            return False
        destination = described.tensor
        if destination.is_meta or not self._is_first(destination, name, source):
            return True  # reported once for all, or tied to memory that is being filled
        strides = destination.stride()
        if 0 in strides and any(step == 0 and n > 1 for step, n in zip(strides, destination.shape, strict=True)):
            destination = self._unexpanded(name, destination, source, described.pieces)
        if isinstance(live, torch.Tensor) and (live.is_conj() or live.is_neg() or live.dtype != destination.dtype):
            self.staged.append(lambda: live.detach().copy_(destination))
        self.targets.append(Target(source, destination, described.pieces))
        return True

    def _is_first(self, tensor: torch.Tensor, name: str, source: str) -> bool:
        """False for memory that another name fills already: tied tensors take the first name's elements.

        Where those are not this name's too, that is a problem: some of them would be lost.
        """
        if not tensor.numel():
            return True
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._filled:
            self._filled[key] = name, source
            return True
        first, taken = self._filled[key]
        digests = self.saved.digests
        if taken != source and digests.get(taken) != digests.get(source):
            self.lacking(f"{name}: shares its memory with {first} here, and differs from it in the checkpoint")
        return False

    def _unexpanded(self, name: str, live: torch.Tensor, source: str, pieces: tuple[Piece, ...]) -> torch.Tensor:
        """Memory for an expanded tensor, whose elements share theirs; its first ones go to the live memory.

        Where the others differ from them they would be lost, so that they are looked at before anything changes.
        """
        copy = torch.empty(live.shape, dtype=live.dtype, device=live.device)
        first = tuple(slice(0, 1) if step == 0 else slice(None) for step in live.stride())
        self.trials.append(Trial(name, Target(source, copy, pieces), copy[first]))
        self.staged.append(lambda: live[first].copy_(copy[first]))
        return copy

    def _fill_scalar(self, live: torch.Tensor, dtype: str, source: str) -> bool:
        """A counter stored in another dtype is converted."""
        copy = torch.empty((), dtype=torch_dtype(dtype))
        self.targets.append(Target(source, copy, whole(())))
        self.staged.append(lambda: live.copy_(copy))
        return True

    def fresh(self, source: str, device: torch.device | None = None) -> torch.Tensor:
        """A new tensor for all of stored tensor ``source``."""
        dtype, shape = self.saved.tensors[source]
        self.used.add(source)
        tensor = torch.empty(shape, dtype=torch_dtype(dtype), device=device or "cpu")
        self.targets.append(Target(source, tensor, whole(shape)))
        return tensor

    def fresh_part(self, source: str, described: Described, spec: DTensorSpec | None) -> torch.Tensor:
        """A new tensor laid out as a live one, ``described``, for its part of a stored one; a DTensor of ``spec``."""
        dtype, shape = self.saved.tensors[source]
        self.used.add(source)
        local = torch.zeros_like(described.tensor, dtype=torch_dtype(dtype))
        self.targets.append(Target(source, local, described.pieces))
        if spec is None:
            return local
        return DTensor.from_local(
            local, spec.mesh, spec.placements, run_check=False, shape=torch.Size(shape), stride=spec.stride
        )

    # values

    def decode(self, data: Json) -> Any:
        """The value of encoded ``data``; tensors in it are new, and filled before commit."""
        return self.decoder.decode(data)

    def _decode_leaf(self, node: dict[str, Json]) -> object:
        tag = node.get("$")
        if tag == "tensor" or (tag == "ndarray" and "tensor" in node):
            name = checked(node["tensor" if tag == "ndarray" else "name"], str)
            source = self.stored(name)
            if source is None:
                self.problems.append(f"{name}: the checkpoint's values name this tensor, its tensors do not have it")
                return None
            self.used |= {name, source}
            if tag == "ndarray":
                return self._array(node, source)
            known, spec = self.walk.found.get(name), self.walk.specs.get(name)
            if known is not None and spec is not None and known.described.global_shape == self.saved.tensors[source][1]:
                return self.fresh_part(source, known.described, spec)  # an object gets back what it gave
            return self.fresh(source, known.described.tensor.device if known is not None else self.device)
        if tag in ("module", "optimizer", "object", "per_rank"):
            self.problems.append(f"a saved {tag} has no live counterpart to take its state; put one into the state")
            return None
        self.problems.append(f"a saved value has the unknown tag {tag!r}; it was written by a newer version")
        return None

    def _array(self, node: dict[str, Json], source: str) -> object:
        dtype, shape = read_dtype(node["dtype"]), read_shape(node["shape"])
        stored_dtype, stored_shape = self.saved.tensors[source]
        if math.prod(shape) * dtype.itemsize != math.prod(stored_shape) * itemsize(stored_dtype):
            raise malformed(f"an array of {shape} {dtype} stored as a tensor of {stored_shape} {stored_dtype}")
        array = np.empty(shape, dtype)
        flat = torch.from_numpy(array.reshape(-1).view(np.uint8))
        tensor = flat.view(torch_dtype(stored_dtype)).reshape(stored_shape)
        self.targets.append(Target(source, tensor, whole(stored_shape)))
        return array


def is_node(data: object, tag: str) -> bool:
    return isinstance(data, dict) and data.get("$") == tag


def mapping_items(context: Context, data: object) -> dict[Any, Json] | None:
    """The entries of an encoded mapping of any type, their values still encoded; None for anything else."""
    if not isinstance(data, dict):
        return None
    if "$" not in data:
        return dict(data)
    if data["$"] not in ("dict", "OrderedDict", "defaultdict", "Counter"):
        return None
    items = data.get("items")
    if isinstance(items, dict):
        return dict(items)
    pairs = [checked(pair, list) for pair in checked(items, list)]
    return {key if type(key) is str else context.decode(key): part for key, part in pairs}


def sequence_parts(data: object) -> list[Json] | None:
    """The parts of an encoded list, tuple or deque, still encoded; None for anything else."""
    if isinstance(data, list):
        return data
    if isinstance(data, dict) and data.get("$") in ("tuple", "deque") and isinstance(data.get("v"), list):
        return checked(data["v"], list)  # type: ignore[no-any-return]
    return None


def below(prefix: str, key: str) -> str:
    """The name of ``key`` (escaped) below ``prefix``."""
    return names.join(prefix, key)
