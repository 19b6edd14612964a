"""Real text that every machine has: the sources of Python's standard library, in a shuffled, stateful loader."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch


def read_corpus(limit_bytes: int = 8 << 20) -> torch.Tensor:
    """The sources one after another, in order of their names, as int64 of shape (bytes,)."""
    chunks: list[bytes] = []
    total = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        data = path.read_bytes()
        chunks.append(data)
        total += len(data)
        if total >= limit_bytes:
            break
    return torch.frombuffer(bytearray(b"".join(chunks)[:limit_bytes]), dtype=torch.uint8).long()


class ShuffledLoader:
    """Endless batches of windows of the corpus, shuffled anew each epoch; resumes where its state says.

    Every rank sees every ``world``-th batch of one common order, so that the state is the same on all ranks.
    """

    def __init__(self, corpus: torch.Tensor, window: int, batch: int, *, rank: int = 0, world: int = 1) -> None:
        self._corpus, self._window, self._batch = corpus, window, batch
        self._rank, self._world = rank, world
        self._epoch, self._position = 0, 0
        self._order = self._shuffled()

    def _shuffled(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._epoch)
        return torch.randperm((len(self._corpus) - 1) // self._window, generator=generator)

    def next(self) -> torch.Tensor:
        """The next batch for this rank: int64 of shape (batch, window + 1)."""
        need = self._batch * self._world
        if self._position + need > len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffled()
        start = self._position + self._rank * self._batch
        picked = self._order[start : start + self._batch].tolist()
        self._position += need
        return torch.stack([self._corpus[i * self._window : i * self._window + self._window + 1] for i in picked])

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffled()
