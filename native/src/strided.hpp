// Copies between a strided N-d region and the contiguous row-major bytes it stands for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "extent.hpp"

namespace ckpt {

class StridedRegion {
public:
    // Throws std::invalid_argument for a nest whose size overflows or has negative counts.
    StridedRegion(std::size_t item_bytes, std::span<const Dim> dims);

    std::size_t size_bytes() const noexcept { return size_bytes_; }
    bool contiguous() const noexcept { return dims_.empty(); }
    // Number of nested loops after merging; the copy of one item is a plain copy of item_bytes().
    std::span<const Dim> dims() const noexcept { return dims_; }
    std::size_t item_bytes() const noexcept { return item_bytes_; }

    // Row-major bytes [begin, end) of the region at `base` -> target.
    void gather(std::uint8_t* target, const std::uint8_t* base, std::size_t begin, std::size_t end) const noexcept;
    // The inverse. No stride may be 0.
    void scatter(std::uint8_t* base, const std::uint8_t* source, std::size_t begin, std::size_t end) const noexcept;

private:
    std::size_t item_bytes_;  // of a whole contiguous inner run
    std::size_t size_bytes_;
    std::vector<Dim> dims_;  // outermost first, merged where two loops are one
};

}  // namespace ckpt
