"""Both paths behind the door, and jobs made of NumPy arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ckptengine import native
from ckptengine.native import files as files_module
from ckptengine.native import host_memory as memory_module
from ckptengine.native import library as library_module

NEEDS_LIBRARY = pytest.mark.skipif(not native.available(), reason="the native library is not built")


@pytest.fixture(params=["library", "portable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test once with the library and once on the portable path."""
    if request.param == "portable":
        for module in (files_module, library_module, memory_module):
            monkeypatch.setattr(module, "library", None)
    elif not native.available():
        pytest.skip("the native library is not built")
    return str(request.param)


@pytest.fixture
def faults() -> Iterator[None]:
    """Disarms what a test arms."""
    native.disarm_faults()
    yield
    native.disarm_faults()


@pytest.fixture
def engine() -> Iterator[native.Engine]:
    """Two workers and three buffers of 64 KiB, so that a few hundred KiB make many segments."""
    made = native.Engine(workers=2, buffers=3, buffer_bytes=1 << 16)
    yield made
    made.close()


class Target:
    """A file in ``folder`` opened as the engine wants it."""

    def __init__(self, folder: Path, name: str = "rank.bin") -> None:
        self.path = folder / name
        buffered = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        support = native.probe_direct(str(folder))
        direct = os.open(self.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC) if support.supported else -1
        self.files = native.Files(
            name=self.path.name,
            direct=direct,
            buffered=buffered,
            memory_alignment=support.memory_alignment,
            offset_alignment=support.offset_alignment,
        )

    def close(self) -> None:
        os.close(self.files.buffered)
        if self.files.direct >= 0:
            os.close(self.files.direct)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    """One file."""
    made = Target(tmp_path)
    yield made
    made.close()


def counting(size_bytes: int, seed: int = 0) -> NDArray[np.uint8]:
    """Bytes that say where they are."""
    return ((np.arange(size_bytes, dtype=np.uint64) + np.uint64(seed)) * np.uint64(2654435761) >> np.uint64(16)).astype(
        np.uint8
    )


def tiled(tensors: list[NDArray[np.uint8]], begin: int = 0, gap_bytes: int = 0) -> tuple[NDArray[np.void], int, int]:
    """Extents of contiguous tensors one after the other, the end of the body, and the number of granules."""
    extents = np.zeros(len(tensors), native.EXTENT)
    at, slot = begin, 0
    for extent, tensor in zip(extents, tensors, strict=True):
        at += (tensor.ctypes.data - at) % 512
        extent["address"], extent["size_bytes"], extent["file_offset"] = tensor.ctypes.data, tensor.size, at
        extent["granule_slot"], extent["device"] = slot, -1
        extent["run_bytes"] = tensor.size
        slot += -(-tensor.size // 16384)
        at += tensor.size + gap_bytes
    return extents, at, slot
