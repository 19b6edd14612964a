"""Loads the C++ library, once, and names the records that travel to it as NumPy arrays."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXTENT = np.dtype(
    [(name, "<u8") for name in ("address", "size_bytes", "file_offset", "granule_slot")]
    + [(name, "<u8") for name in ("run_bytes", "run_skip_bytes", "follow_bytes")]
    + [(name, "<u4") for name in ("item_bytes", "source_dims_begin", "source_dims", "run_dims_begin", "run_dims")]
    + [("device", "<i4")]
)
"""One extent of a write job; 80 bytes, mirrored by ``Extent`` in native/src/extent.hpp.

``address``, ``size_bytes``   where the bytes are; ``device`` is -1 for host memory, else the CUDA device's index.
``source_dims_begin``, ``source_dims``, ``item_bytes``   rows of the job's loops that say how items lie in memory, taken
    in row-major order; no rows (0) for contiguous memory.  Strides may be 0 or negative.  Host memory only.
``file_offset``   ascending and disjoint.  Congruent to the address modulo 4096: written with no copy.
``granule_slot``   index of its first granule in the job's granule table.
``run_bytes``, ``run_dims_begin``, ``run_dims``   the runs that the extent's bytes are in its logical tensor, back to
    back from byte ``run_skip_bytes`` of them on; ``follow_bytes`` of the tensor come after the last run.  ``run_bytes``
    0: no contribution to a tensor digest.
"""
RANGE = np.dtype([(name, "<u8") for name in ("file_offset", "size_bytes", "address", "granule_slot")])
"""One range to read; address 0 digests only.  ``granule_slot`` counts only when granules are asked for."""
TRACE = np.dtype(
    {
        "names": ["begin_ns", "end_ns", "file_offset", "size_bytes", "kind", "thread"],
        "formats": ["<i8", "<i8", "<u8", "<u8", "<i4", "<i4"],
    }
)
"""One event of a job; times as `time.monotonic_ns`, thread -1 the caller's, -2 the device copier's."""
TRACE_KINDS = ("gather", "write", "reserve", "sync", "device copy", "throttle")
NO_LOOPS: NDArray[np.int64] = np.zeros((0, 2), np.int64)
SEGMENT_BYTES = 4 << 20

Ids = NDArray[np.uint32]


def _load() -> Any:
    log = logging.getLogger("ckptengine")
    if os.environ.get("CKPTENGINE_NATIVE", "1") == "0":
        log.info("native library switched off by CKPTENGINE_NATIVE=0: using the portable path")
        return None
    try:
        return importlib.import_module("ckptengine._native")
    except ImportError as error:
        log.warning("no native library (%s): using the portable path, which is slower", error)
        return None


library: Any = _load()


def available() -> bool:
    """Whether the C++ library is in use."""
    return library is not None


def backend() -> str:
    """What digests are computed with: ``vpclmul``, ``vpclmul256``, ``clmul``, ``table`` or ``portable``."""
    return str(library.crc_backend()) if library is not None else "portable"


def cuda_available() -> bool:
    """Whether the library can copy from CUDA devices."""
    return library is not None and bool(library.cuda_available())


def octets_of_records(records: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[np.uint8]:
    if records.dtype != dtype or records.ndim != 1:
        raise ValueError(f"expected a one-dimensional array of {dtype.names}, not {records.dtype} of {records.shape}")
    return np.ascontiguousarray(records).view(np.uint8)


def ids_of(extents: Sequence[int] | Ids) -> Ids:
    return np.ascontiguousarray(extents, np.uint32)
