"""One rank's file of a legacy Megatron checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptengine.errors import UnreadableFormat
from ckptengine.sources.plain import plain, walk_tensors
from ckptengine.sources.port import Files
from ckptengine.sources.stored import StoredTensor
from ckptengine.sources.torchzip import load_torch

_CHUNK = re.compile(r"model(\d+)")
_TENSOR_KEYS = ("model", "optimizer")
GRAD_SCALER = "grad_scaler"


@dataclass(frozen=True, slots=True)
class RankFile:
    """``chunks`` are the virtual pipeline stages' tensors by local name; ``buffers`` is ``distrib_optim.pt``."""

    path: str
    chunks: tuple[Mapping[str, StoredTensor], ...]
    optimizer: object
    buffers: object
    rest: Mapping[Any, Any]
    arguments: Mapping[Any, Any]

    @property
    def grad_scaler(self) -> object:
        """What scales the loss in 16 bits, or None; of a chain of optimizers the first one's does."""
        first = self.optimizer[0] if isinstance(self.optimizer, list) and self.optimizer else self.optimizer
        return first.get(GRAD_SCALER) if isinstance(first, dict) else None


def read_rank_file(files: Files, path: str, buffers: str) -> RankFile:
    """Read the headers of a rank's files; ``buffers`` need not exist."""
    where = f"{files.root}/{path}"
    loaded = load_torch(files, path)
    if not isinstance(loaded, dict):
        raise UnreadableFormat(f"{where} does not hold a dictionary")
    numbered = {int(match[1]): key for key in loaded if isinstance(key, str) and (match := _CHUNK.fullmatch(key))}
    if "model" in loaded:
        chunks = [loaded["model"]]
    else:
        chunks = [loaded[numbered[number]] for number in sorted(numbered)]
    if not chunks or sorted(numbered) != list(range(len(numbered))):
        raise UnreadableFormat(f"{where} has neither model nor model0, model1, ...; it is no checkpoint of Megatron")
    rest = {k: v for k, v in loaded.items() if k not in _TENSOR_KEYS and k not in numbered.values()}
    arguments = plain(loaded.get("args"))
    return RankFile(
        path=where,
        chunks=tuple(_tensors(chunk) for chunk in chunks),
        optimizer=loaded.get("optimizer"),
        buffers=load_torch(files, buffers) if files.exists(buffers) else None,
        rest=rest,
        arguments=arguments if isinstance(arguments, dict) else {},
    )


def _tensors(chunk: object) -> dict[str, StoredTensor]:
    """The tensors of a model's state by dotted name; older files nest ``language_model`` and the like."""
    found = {".".join(str(key) for key in path): tensor for path, tensor in walk_tensors(chunk)}
    while found and all(name.startswith("module.") for name in found):
        found = {name[len("module.") :]: tensor for name, tensor in found.items()}
    return {name: tensor for name, tensor in found.items() if not name.endswith("_extra_state")}
