// Reads many ranges of one file straight into their destinations, digesting them on the way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "file_io.hpp"

namespace ckpt {

// Mirrored by RANGE in ckptengine/native.py.
struct ReadRange {
    std::uint64_t file_offset;
    std::uint64_t size_bytes;
    std::uint64_t address;       // 0: digest only
    std::uint64_t granule_slot;  // index of the range's first granule; ignored when no granules are asked for
};
static_assert(sizeof(ReadRange) == 32);

struct ReadOptions {
    int threads = 4;
    std::uint64_t block_bytes = 4u << 20;  // of one system call; a multiple of 4096
    std::uint64_t memory_alignment = 512;  // what direct I/O wants
    std::uint64_t offset_alignment = 512;
    std::uint64_t granule_bytes = 0;       // 0: no granule digests
    std::uint64_t granule_slots = 0;
    std::uint64_t min_live_bytes = 16384;  // shorter stretches go through a bounce buffer
    std::uint64_t max_gap_bytes = 65536;   // unwanted bytes between ranges that are read along rather than skipped
};

struct ReadResult {
    std::vector<std::uint64_t> digests;   // raw CRC per range
    std::vector<std::uint64_t> granules;  // raw CRC per granule slot
    std::optional<IoError> error;         // of the lowest file offset that was noticed; destinations are then undefined
    std::size_t failed_range = 0;
    bool direct_refused = false;
};

// Ranges may come in any order and overlap in the file, not in memory. Throws std::invalid_argument.
ReadResult read_ranges(const FilePair& files, std::span<const ReadRange> ranges, const ReadOptions& options);

}  // namespace ckpt
