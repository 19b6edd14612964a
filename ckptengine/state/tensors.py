"""A live tensor as bytes, layout and logical shape."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Partial as TorchPartial
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard as TorchStridedShard

from ckptengine.errors import UnsupportedValue
from ckptengine.layout.mesh import Mesh
from ckptengine.layout.piece import Piece, whole
from ckptengine.layout.placement import Placement, Replicate, Shard, StridedShard
from ckptengine.layout.sharding import Irregular, Layout, Sharding
from ckptengine.state.dtypes import TORCH_DTYPES
from ckptengine.state.encoding import where
from ckptengine.state.laid import PLAIN_TYPES, held_by, is_plain_subclass
from ckptengine.state.sharded import Sharded

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
ON_META = "is on the meta device and has no memory; materialise it first, for instance with to_empty(device=...)"
_UNINITIALIZED = (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)


class Described(NamedTuple):
    """A tensor's local part (detached) and what it is of."""

    tensor: torch.Tensor
    dtype: str
    global_shape: tuple[int, ...]
    sharding: Layout | None
    pieces: tuple[Piece, ...]


def global_rank() -> int:
    """This process's rank in the default process group; 0 without one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def describe(value: torch.Tensor | Sharded, name: str, *, meta_ok: bool = False) -> Described:
    """What ``value`` holds.  `UnsupportedValue`, naming the leaf, for a tensor that has no bytes to store.

    ``meta_ok``: describe tensors without memory too, so that a restore can report them beside all other differences.
    """
    if not isinstance(value, Sharded) and type(value) in PLAIN_TYPES:  # first: there may be a hundred thousand
        local = _local(value, name, meta_ok)
        shape = tuple(local.shape)
        return Described(local, _dtype(local, name), shape, None, whole(shape))
    if isinstance(value, Sharded):
        local = _local(value.tensor, name, meta_ok)
        layout = value.layout or Irregular(((global_rank(), value.pieces),))
        return Described(local, _dtype(local, name), value.global_shape, layout, value.pieces)
    if isinstance(value, DTensor):
        sharding = sharding_of(value, name)
        with torch.no_grad():
            local = _local(value.to_local(), name, meta_ok)
        shape = tuple(value.shape)
        pieces = _pieces(sharding, global_rank(), shape)
        if sum(piece.size for piece in pieces) != local.numel():
            raise UnsupportedValue(
                f"{where(name)}: the local part of this DTensor has shape {tuple(local.shape)}, which its placements "
                f"{tuple(value.placements)} of {shape} do not give; uneven hand-made shards belong in Sharded"
            )
        return Described(local, _dtype(local, name), shape, sharding, pieces)
    local = _local(value, name, meta_ok)
    shape = tuple(local.shape)
    return Described(local, _dtype(local, name), shape, None, whole(shape))


def describe_plain(value: torch.Tensor) -> Described | None:
    """As `describe`, of a tensor of a plain class with memory of its own; None where more must be looked at."""
    if value.layout is not torch.strided or value.is_quantized or value.is_nested or value.is_meta:
        return None
    local = value.detach()
    dtype, shape = _DTYPE_NAMES.get(local.dtype), tuple(local.shape)
    if dtype is None or 0 in shape or local.is_conj() or local.is_neg():
        return None
    return Described(local, dtype, shape, None, whole(shape))


def converted(described: Described, dtype: torch.dtype) -> Described:
    """A copy of it in another dtype."""
    return described._replace(tensor=described.tensor.to(dtype), dtype=_DTYPE_NAMES[dtype])


@lru_cache(maxsize=65536)
def _pieces(sharding: Sharding, rank: int, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    return tuple(piece for piece in sharding.pieces(rank, shape) if piece.size)


def _dtype(tensor: torch.Tensor, name: str) -> str:
    found = _DTYPE_NAMES.get(tensor.dtype)
    if found is None:
        raise UnsupportedValue(
            f"{where(name)} is a tensor of {tensor.dtype}, which cannot be stored; convert it to one of "
            f"{', '.join(_DTYPE_NAMES.values())} or save its parts (int_repr, scales)"
        )
    return found


def _local(tensor: torch.Tensor, name: str, meta_ok: bool) -> torch.Tensor:
    """A detached alias of a plain strided tensor; a resolved copy of a lazily conjugated or negated one."""
    kind = type(tensor)
    if kind not in PLAIN_TYPES:
        tensor = held_by(tensor)
        kind = type(tensor)
    if kind not in PLAIN_TYPES and (isinstance(tensor, _UNINITIALIZED) or not is_plain_subclass(kind)):
        if isinstance(tensor, _UNINITIALIZED):
            raise UnsupportedValue(f"{where(name)} is not initialised yet; run one forward pass before checkpointing")
        raise UnsupportedValue(
            f"{where(name)} is a {kind.__module__}.{kind.__qualname__}, a tensor subclass without bytes of its own; "
            f"save the tensors it is made of, or wrap its local part in Sharded"
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        what = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
        raise UnsupportedValue(f"{where(name)} is a {what} tensor; save its parts (indices and values, offsets)")
    if tensor.is_meta and not meta_ok:
        raise UnsupportedValue(f"{where(name)} {ON_META}")
    local = tensor.detach()
    if local.is_conj() or local.is_neg():
        return local.resolve_conj().resolve_neg()
    return local


def sharding_of(tensor: DTensor | DTensorSpec, name: str) -> Sharding:
    """The layout of a DTensor, or of its spec; `UnsupportedValue` for placements that do not say who holds what."""
    return _sharding(tensor.device_mesh, tuple(tensor.placements), tensor.ndim, name)


_SHARDINGS: dict[tuple[DeviceMesh, tuple[TorchPlacement, ...], int], Sharding] = {}


def _sharding(mesh: DeviceMesh, placements: tuple[TorchPlacement, ...], ndim: int, name: str) -> Sharding:
    key = mesh, placements, ndim
    found = _SHARDINGS.get(key)
    if found is None:
        found = Sharding(_mesh(mesh), tuple(_placement(placement, ndim, name) for placement in placements))
        if len(_SHARDINGS) > 4096:
            _SHARDINGS.clear()
        _SHARDINGS[key] = found
    return found


def _mesh(mesh: DeviceMesh) -> Mesh:
    shape = tuple(mesh.mesh.shape)
    names = mesh.mesh_dim_names or tuple(f"axis{index}" for index in range(len(shape)))
    return Mesh(shape, names, tuple(int(rank) for rank in mesh.mesh.flatten().tolist()))


def _placement(placement: TorchPlacement, ndim: int, name: str) -> Placement:
    if isinstance(placement, TorchStridedShard):  # before Shard, of which it may be a subclass
        return StridedShard(placement.dim % ndim, int(placement.split_factor))
    if type(placement) is TorchShard:
        return Shard(placement.dim % ndim)
    if isinstance(placement, TorchReplicate):
        return Replicate()
    if isinstance(placement, TorchPartial):
        raise UnsupportedValue(
            f"{where(name)} is a DTensor with a pending {placement} reduction, so no rank holds its elements; "
            f"redistribute it to Replicate or Shard first"
        )
    raise UnsupportedValue(f"{where(name)} is a DTensor with placement {placement}, whose layout is unknown")
