// The digest of a box of a row-major tensor, positioned in the digest of the whole tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "crc64.hpp"
#include "extent.hpp"

namespace ckpt {

// `run_bytes` contiguous bytes of the tensor, repeated by nested loops in ascending order without overlap;
// `follow_bytes` bytes of the tensor come after the last run.
class PositionedRuns {
public:
    // Throws std::invalid_argument for runs that overlap, descend or overflow.
    PositionedRuns(std::size_t run_bytes, std::span<const Dim> dims, std::uint64_t follow_bytes);

    std::size_t size_bytes() const noexcept { return size_bytes_; }
    bool single() const noexcept { return dims_.empty(); }
    std::uint64_t follow_bytes() const noexcept { return follow_bytes_; }

    // What local bytes [begin, end) (`data`, back to back) contribute to the raw CRC of the whole tensor.
    std::uint64_t contribution(const std::uint8_t* data, std::size_t begin, std::size_t end) const noexcept;

private:
    std::uint64_t position(std::size_t run) const noexcept;  // of a run's first byte, relative to the first run's

    std::size_t run_bytes_;
    std::size_t size_bytes_;
    std::uint64_t follow_bytes_;
    std::uint64_t span_bytes_;  // from the first byte of the first run to the end of the last one
    std::vector<Dim> dims_;     // merged, outermost first
    RunStep step_{};            // of the innermost loop
};

}  // namespace ckpt
