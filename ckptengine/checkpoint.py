"""Read-only access.  Loads nothing that only saving and restoring take, `torch.distributed` above all."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex

import numpy as np
import torch

from ckptengine.errors import NotFound, UnusableRequest
from ckptengine.layout.box import Box
from ckptengine.layout.piece import Piece, whole
from ckptengine.operations.digests import digest_of
from ckptengine.operations.filling.fill import array_of, fill_targets
from ckptengine.operations.opening import open_any
from ckptengine.operations.read import BoxReader
from ckptengine.operations.saving.step_number import step_number
from ckptengine.operations.verify import verify
from ckptengine.sources.files import is_url, open_files
from ckptengine.sources.native import NativeSource
from ckptengine.sources.port import Source
from ckptengine.state.collection import no_collection
from ckptengine.state.dtypes import torch_dtype
from ckptengine.state.target import Target
from ckptengine.store.history import History

_CHUNK_BYTES = 64 << 20
_UNPROVEN_ELEMENTS = 1 << 20
"""From this size on memory is taken only for what fragments are known to hold."""


class Checkpoint:
    """Read-only access to one checkpoint, ours or foreign, without torch.distributed.  Thread-safe."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._readers: dict[str, BoxReader] = {}

    @property
    def source(self) -> Source:
        """The checkpoint as logical tensors and fragments."""
        return self._source

    @property
    def step(self) -> int | None:
        """The training step, where the checkpoint says so."""
        return self._source.step

    @property
    def format(self) -> str:
        """``"native"``, ``"dcp"``, ``"safetensors"``, ..."""
        return self._source.format

    @property
    def metrics(self) -> Mapping[str, float]:
        return self._source.metrics

    def names(self) -> list[str]:
        """Canonical names of all tensors, aliases of tied ones included, sorted."""
        return sorted(self._source.names())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return torch_dtype(self._source.tensor(name).dtype)

    def read(self, name: str, slices: Any = None) -> torch.Tensor:
        """A tensor, or the part that ``slices`` (ints and slices of step 1, as in indexing) picks, on the CPU.

        Reads only the bytes that it needs, and verifies them where the format has digests.
        """
        if name not in self._readers:
            self._readers[name] = BoxReader(self._source, self._source.tensor(name))
        reader = self._readers[name]
        box, dropped = _box_of(name, slices, reader.tensor.shape)
        if box.size > _UNPROVEN_ELEMENTS:
            reader.parts(box)  # a damaged manifest may claim any size: first see that the bytes exist
        out = torch.empty(box.shape, dtype=torch_dtype(reader.tensor.dtype))
        reader.read(box, array_of(out, Piece.packed(Box.whole(box.shape))))
        kept = [n for d, n in enumerate(box.shape) if d not in dropped]
        return out.reshape(kept)

    def state_dict(self, prefix: str = "", device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """Every tensor below ``prefix``, by the rest of its name: ``state_dict("model")`` fits ``load_state_dict``.

        Tied names share one tensor.
        """
        lead = f"{prefix.rstrip('.')}." if prefix else ""
        aliases = self._source.aliases()
        names = [name for name in self.names() if name.startswith(lead)]
        if not names:
            raise NotFound(f"no tensor below {prefix!r}")
        owners = dict.fromkeys(aliases.get(name, name) for name in names)
        with no_collection():
            read = self._read_small(owners, device)
        for owner in owners:
            if owner not in read:
                read[owner] = self.read(owner).to(device)
        return {name[len(lead) :]: read[aliases.get(name, name)] for name in names}

    def _read_small(self, names: Iterable[str], device: torch.device | str) -> dict[str, torch.Tensor]:
        """Those of our own tensors that are small, read together."""
        if not isinstance(self._source, NativeSource):
            return {}
        targets: list[Target] = []
        for name in names:
            tensor = self._source.tensor(name)
            if tensor.size <= _UNPROVEN_ELEMENTS:
                out = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype), device=device)
                targets.append(Target(name, out, whole(tensor.shape)))
        fill_targets(self._source, targets)
        return {target.name: target.tensor for target in targets}

    def values(self) -> Any:
        """Everything that is not a tensor, nested as it was."""
        return self._source.values()

    def digest(self, name: str) -> str:
        """``crc64nvme:...`` of the tensor's row-major bytes: recorded, or computed where the format records none."""
        tensor = self._source.tensor(name)
        if tensor.digest is not None:
            return tensor.digest
        reader = BoxReader(self._source, tensor)
        return digest_of(tensor, lambda _, box, out: reader.read(box, out), _CHUNK_BYTES)

    def zarr(self) -> Any:
        """A read-only ``zarr.Group`` over the checkpoint that copies nothing.  Needs the extra ``zarr``."""
        try:
            view = importlib.import_module("ckptengine.universal.view")
        except ImportError as error:
            raise UnusableRequest(f"zarr views need {error.name}: pip install 'ckptengine[zarr]'") from None
        return view.open_view(self._source, BoxReader)

    def verify(self) -> None:
        """Check every byte against its digest and every tensor's cover; raises the first `Damaged` or `LayoutError`."""
        problems, _ = verify(self._source)
        if problems:
            raise problems[0]

    def close(self) -> None:
        """Let go of open files; a later read opens them again."""
        self._source.files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.format} step={self.step} at {self._source.files.root}>"


def open_checkpoint(
    path: str | os.PathLike[str], step: SupportsIndex | None = None, *, rules: str | os.PathLike[str] | None = None
) -> Checkpoint:
    """Open any checkpoint, ours or foreign, for reading.  Raises `NotFound` or `UnreadableFormat`."""
    with no_collection():
        return Checkpoint(open_any(path, None if step is None else step_number(step), rules))


def steps(root: str | os.PathLike[str]) -> list[int]:
    """Committed steps of the current line of history, oldest first; empty where there is no root.

    Raises `UnusableRequest` where the root is a file.
    """
    if not is_url(os.fspath(root)) and not os.path.isdir(root):
        if os.path.lexists(root):
            raise UnusableRequest(f"{os.fspath(root)} is a file; a root is a directory")
        return []
    files = open_files(root)
    try:
        return list(History(files).line())
    finally:
        files.close()


def _box_of(name: str, slices: Any, shape: tuple[int, ...]) -> tuple[Box, set[int]]:
    """The box that an index picks, and the dimensions that it drops."""
    index = slices if isinstance(slices, tuple) else () if slices is None else (slices,)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = index[:at] + (slice(None),) * (len(shape) - len(index) + 1) + index[at + 1 :]
    if len(index) > len(shape):
        raise UnusableRequest(f"{name}: {len(index)} indices for a tensor of shape {shape}")
    offsets, sizes, dropped = [], [], set()
    for d, extent in enumerate(shape):
        one = index[d] if d < len(index) else slice(None)
        if isinstance(one, (int, np.integer)):
            at = int(one) + extent if one < 0 else int(one)
            if not 0 <= at < extent:
                raise UnusableRequest(f"{name}: index {one} is outside dimension {d} of {extent}")
            one = slice(at, at + 1)
            dropped.add(d)
        if not isinstance(one, slice) or one.step not in (None, 1):
            raise UnusableRequest(f"{name}: index {one!r} is neither a number nor a slice of step 1")
        start, stop, _ = one.indices(extent)
        offsets.append(start)
        sizes.append(max(0, stop - start))
    return Box(tuple(offsets), tuple(sizes)), dropped
