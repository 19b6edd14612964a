// What a save hands over: where the bytes are in memory, where they go in the file, what their digests mean.
// Plain records, filled by the caller in one array each.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ckpt {

// One loop of a nest: `count` steps that lie `stride_bytes` apart.
struct Dim {
    std::int64_t count;
    std::int64_t stride_bytes;
};

inline constexpr std::int32_t kHost = -1;

// Mirrored by EXTENT in ckptengine/native.py.
//
// Source: `size_bytes` bytes at `address` when `source_dims` is 0; otherwise items of `item_bytes` bytes in the nest
// of loops dims[source_dims_begin ...], outermost first, taken in row-major order.
// Tensor digest: none when `run_bytes` is 0; otherwise the extent holds the bytes [run_skip_bytes, run_skip_bytes +
// size_bytes) of the runs that the nest dims[run_dims_begin ...] repeats, and `follow_bytes` bytes of the logical
// tensor come after the last of those runs.
struct Extent {
    std::uint64_t address;
    std::uint64_t size_bytes;
    std::uint64_t file_offset;
    std::uint64_t granule_slot;  // index of the extent's first granule
    std::uint64_t run_bytes;
    std::uint64_t run_skip_bytes;
    std::uint64_t follow_bytes;
    std::uint32_t item_bytes;
    std::uint32_t source_dims_begin;
    std::uint32_t source_dims;
    std::uint32_t run_dims_begin;
    std::uint32_t run_dims;
    std::int32_t device;  // kHost, or the CUDA device that `address` belongs to
};
static_assert(sizeof(Extent) == 80);

}  // namespace ckpt
