"""FSDP1: the parameters behind the flat ones of ``torch.distributed.fsdp.FullyShardedDataParallel``.

It flattens the parameters of a wrapped module into one buffer, padding included, and gives each rank an even part of
that.  Between steps this shard lies in ``_local_shard``, which is allocated once: what is gathered from it, and copies
in a lower precision, have storages of their own, and only those are resized.  So a shard may be read lazily.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from ckptengine.errors import UnsupportedValue
from ckptengine.layout.box import Box
from ckptengine.layout.flat import flat_boxes
from ckptengine.layout.irregular import Irregular
from ckptengine.layout.mesh import Mesh
from ckptengine.layout.piece import Piece, packed_pieces
from ckptengine.layout.placement import Flat
from ckptengine.layout.sharding import Layout, Sharding
from ckptengine.state.sharded import Sharded
from ckptengine.state.tensors import global_rank, sharding_of

CLASS = ("torch.distributed.fsdp", "FullyShardedDataParallel")
HOOKS = "torch.distributed.fsdp._state_dict_utils"
"""Where its state-dict hooks are: they gather whole parameters, which nobody needs here."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Which elements of a flat parameter, as this rank has it, are those of one parameter.

    ``total``: elements of the flat one here.  ``shape`` and ``strides``: of the parameter, where the rank has all of
    it; None for the elements in a row.
    """

    start: int
    size: int
    total: int
    shape: tuple[int, ...] | None = None
    strides: tuple[int, ...] | None = None

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """A view of the elements in ``flat``, which is the flat parameter or a state tensor of its shape."""
        part = flat.detach()[self.start : self.start + self.size]
        if self.shape is None or self.strides is None:
            return part
        return part.as_strided(self.shape, self.strides)


class FlatPart(NamedTuple):
    """One parameter of a module as this rank has it.

    ``value`` is live memory.  ``parameter`` is what optimizers have in their groups: the parameter itself, or (``cut``
    is not None) the flat one, of whose state tensors the parameter has its part.  ``here``: optimizers of this rank
    step it; those that are parameters themselves and have no elements here never have a gradient, and so no state.
    """

    value: torch.Tensor | Sharded
    parameter: nn.Parameter
    cut: Cut | None
    here: bool


def is_wrapper(module: nn.Module) -> bool:
    """Whether ``module`` is one that FSDP1 wraps others in."""
    package, name = CLASS
    return any(kind.__name__ == name and kind.__module__.startswith(package) for kind in type(module).__mro__)


def handles_of(parts: Iterable[nn.Module]) -> list[Any]:
    """What manages the flat parameter of each wrapper among ``parts``."""
    found = (getattr(part, "_handle", None) for part in parts if is_wrapper(part))
    return [handle for handle in found if handle is not None]


def flat_parts(handles: Iterable[Any]) -> dict[int, dict[str, FlatPart]]:
    """Every parameter that is behind a flat one, by ``id`` of the module that it hangs in and its name there.

    `UnsupportedValue` where the shards are not what the module means just now.
    """
    found: dict[int, dict[str, FlatPart]] = {}
    for handle in handles:
        flat = handle.flat_param
        if not (handle.uses_sharded_strategy or flat._params is None):
            continue  # its parameters hang in their modules whole
        for info, part in zip(flat._param_infos, _parts(handle), strict=True):
            found.setdefault(id(info.module), {})[info.param_name] = part
        for tied in flat._shared_param_infos:
            part = found[id(tied.prim_module)][tied.prim_param_name]
            found.setdefault(id(tied.module), {})[tied.param_name] = part
    return found


def lowered_buffers(part: nn.Module) -> list[tuple[str, torch.dtype, torch.dtype]]:
    """(name below it, dtype, dtype before) of the buffers that a wrapper casts at its first forward."""
    low = part.mixed_precision.buffer_dtype if is_wrapper(part) else None  # type: ignore[union-attr]
    if low is None:
        return []
    before: dict[str, torch.dtype] = part._buffer_name_to_orig_dtype  # type: ignore[assignment]
    return [(name, low, dtype) for name, dtype in before.items() if dtype != low]  # type: ignore[misc]


def settle(handle: Any) -> None:
    """Have everybody see what was filled into the shards: what was gathered from them before is let go."""
    flat = handle.flat_param
    if not handle.uses_sharded_strategy or not hasattr(flat, "_local_shard"):
        return  # nothing was ever gathered
    if flat._params is not None and handle.is_sharded(flat) and not handle._skipped_use_sharded_views:
        handle._writeback_orig_params()  # from parameters that were given other memory by hand
    handle.reshard(True)
    handle.post_reshard()
    handle._prefetched = False


def _parts(handle: Any) -> Iterator[FlatPart]:
    flat, shard = handle.flat_param, _shard(handle)
    starts = accumulate(flat._numels_with_padding, initial=0)
    offsets = [start for start, padding in zip(starts, flat._is_padding_mask, strict=False) if not padding]
    for index, offset in enumerate(offsets):
        held = flat._shard_param_infos[index]
        if not handle.uses_sharded_strategy:
            if flat._param_extensions[index] is not None:
                raise UnsupportedValue(f"{flat._fqns[index]} is sharded by tensor parallelism below FSDP1's NO_SHARD")
            cut = Cut(offset, held.numel_in_shard, shard.numel(), flat._shapes[index], flat._strides[index])
            yield FlatPart(cut.of(shard), flat, cut, True)
            continue
        cut = Cut(held.offset_in_shard or 0, held.numel_in_shard or 0, shard.numel())
        begin = held.intra_param_start_idx or 0
        layout, shape = _layout(handle, index, offset, (begin, begin + cut.size))
        if flat._params is None:
            yield FlatPart(Sharded(cut.of(shard), shape, layout=layout, rank=global_rank()), flat, cut, True)
        else:
            parameter = _hanging(handle, index)
            local = cut.of(shard) if parameter is None else parameter
            value = Sharded(local, shape, layout=layout, rank=global_rank())
            yield FlatPart(value, flat._params[index] if parameter is None else parameter, None, bool(cut.size))


def _hanging(handle: Any, index: int) -> nn.Parameter | None:
    """The parameter in its module, while its memory is that of the shard or was given to it by hand, which the next
    forward takes over; None while gathered tensors hang there."""
    info = handle.flat_param._param_infos[index]
    parameter = info.module._parameters.get(info.param_name)
    if not isinstance(parameter, nn.Parameter) or not handle.is_sharded(handle.flat_param):
        return None
    size = handle.flat_param._shard_param_infos[index].numel_in_shard or 0
    if tuple(parameter.shape) != (size,):
        raise UnsupportedValue(
            f"{handle.flat_param._fqns[index]} has the shape {tuple(parameter.shape)}, and FSDP1 keeps {size} elements "
            f"of it in a row on this rank; change whole parameters inside of summon_full_params"
        )
    return parameter


def _shard(handle: Any) -> torch.Tensor:
    """This rank's shard of the flat parameter; refuses where FSDP1 is at work or its parameter was replaced."""
    flat = handle.flat_param
    if handle._training_state.name != "IDLE":
        raise UnsupportedValue(
            f"FSDP1 is at work on {', '.join(flat._fqns[:3])} ({handle._training_state.name}); save and restore "
            f"outside of forward, backward and summon_full_params"
        )
    shard: torch.Tensor = getattr(flat, "_local_shard", flat)
    if shard.shape == flat.shape:
        if shard.data_ptr() != flat.data_ptr():
            raise UnsupportedValue(
                f"the flat parameter of {', '.join(flat._fqns[:3])} has other memory than FSDP1 goes on with; fill it "
                f"in place, and move or cast the module before its first forward"
            )
        shard = flat.detach()  # shares the version counter that optimizers advance
    return shard


def _layout(handle: Any, index: int, offset: int, held: tuple[int, int]) -> tuple[Layout, tuple[int, ...]]:
    """How a parameter is sharded, and its shape; the rank has the elements ``held`` of those that were flattened."""
    flat, rank = handle.flat_param, global_rank()
    shape, strides = tuple(flat._shapes[index]), tuple(flat._strides[index])
    spec = flat._param_extensions[index]
    if spec is None and flat._contiguities[index]:
        ranks = tuple(torch.distributed.get_process_group_ranks(handle.process_group))
        return _sharding(ranks, offset, flat._sharded_size.numel()), shape
    pieces = _in_memory_order(shape, strides, *held)
    if spec is None:
        return Irregular(((rank, pieces),)), shape
    outer = sharding_of(spec, flat._fqns[index]).pieces(rank, spec.shape)  # of tensor parallelism, below FSDP1
    moved = tuple(Piece(piece.box.shift(outer[0].box.offsets), piece.start, piece.strides) for piece in pieces)
    return Irregular(((rank, moved),)), tuple(spec.shape)


@lru_cache(maxsize=65536)
def _sharding(ranks: tuple[int, ...], offset: int, part: int) -> Sharding:
    return Sharding(Mesh((len(ranks),), ("fsdp",), ranks), (Flat(offset=offset, part=part),))


def _in_memory_order(shape: tuple[int, ...], strides: tuple[int, ...], start: int, stop: int) -> tuple[Piece, ...]:
    """The elements ``start:stop`` of a dense tensor in the order in which its memory has them (channels last)."""
    order = sorted(range(len(shape)), key=lambda dim: (-strides[dim], dim))
    back = [order.index(dim) for dim in range(len(shape))]
    pieces = packed_pieces(flat_boxes([shape[dim] for dim in order], start, stop))
    return tuple(
        Piece(
            Box(_permuted(piece.box.offsets, back), _permuted(piece.box.shape, back)),
            piece.start,
            _permuted(piece.strides, back),
        )
        for piece in pieces
    )


def _permuted(values: tuple[int, ...], order: list[int]) -> tuple[int, ...]:
    return tuple(values[place] for place in order)
