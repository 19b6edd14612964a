"""The one door to the C++ library: digests, strided copies, parallel verified reads, and the engine that writes.

Everything but `Engine` and the faults has a portable path behind the same function, slower with the same results.  The
library is left out when the package was built without a compiler, or when ``CKPTENGINE_NATIVE=0`` is set.

Digests are raw CRC-64/NVME (initial value and final xor 0), see `ckptengine.layout.digest`.  Memory is named by
address: the caller keeps it alive and in place for as long as a function says.  Loops are int64 arrays of shape
(n, 2): rows of (count, stride in bytes), outermost first.
"""

from ckptengine.native.engine import Engine, Progress, WriteJob
from ckptengine.native.faults import arm_fault, disarm_faults
from ckptengine.native.files import DirectSupport, Files, ReadDigests, drop_cache, probe_direct, read_ranges
from ckptengine.native.host_memory import (
    copy_raw_crc64,
    crc64,
    digest,
    gather,
    memory,
    raw_crc64,
    raw_granules,
    raw_positioned,
    scatter,
    shift,
    witnesses,
)
from ckptengine.native.library import (
    EXTENT,
    NO_LOOPS,
    RANGE,
    SEGMENT_BYTES,
    TRACE,
    TRACE_KINDS,
    available,
    backend,
    cuda_available,
)

__all__ = [
    "EXTENT",
    "NO_LOOPS",
    "RANGE",
    "SEGMENT_BYTES",
    "TRACE",
    "TRACE_KINDS",
    "DirectSupport",
    "Engine",
    "Files",
    "Progress",
    "ReadDigests",
    "WriteJob",
    "arm_fault",
    "available",
    "backend",
    "copy_raw_crc64",
    "crc64",
    "cuda_available",
    "digest",
    "disarm_faults",
    "drop_cache",
    "gather",
    "memory",
    "probe_direct",
    "raw_crc64",
    "raw_granules",
    "raw_positioned",
    "read_ranges",
    "scatter",
    "shift",
    "witnesses",
]
