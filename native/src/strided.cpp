#include "strided.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace ckpt {
namespace {

constexpr std::size_t kMaxDims = 64;

// Walks the byte range [begin, end) as pieces of the innermost loop: f(region offset, packed offset, item_bytes,
// items) for whole items and f(..., bytes, 1) for parts of one.
template <typename F>
void for_each_row(std::size_t item_bytes, std::span<const Dim> dims, std::size_t begin, std::size_t end, F&& f) {
    std::int64_t index[kMaxDims];
    std::size_t item = begin / item_bytes;
    std::size_t skip = begin % item_bytes;
    std::int64_t offset = 0;
    for (std::size_t dim = dims.size(); dim-- > 0;) {
        const auto count = static_cast<std::size_t>(dims[dim].count);
        index[dim] = static_cast<std::int64_t>(item % count);
        offset += index[dim] * dims[dim].stride_bytes;
        item /= count;
    }
    const std::size_t inner = dims.size() - 1;
    const std::int64_t inner_stride = dims[inner].stride_bytes;
    std::size_t packed = 0;
    const std::size_t total = end - begin;
    while (packed < total) {
        std::int64_t advanced = 1;
        const std::size_t left = total - packed;
        if (skip != 0 || left < item_bytes) {
            const std::size_t part = std::min(item_bytes - skip, left);
            f(offset + static_cast<std::int64_t>(skip), packed, part, std::size_t{1});
            packed += part;
            skip = 0;
        } else {
            advanced = std::min(dims[inner].count - index[inner], static_cast<std::int64_t>(left / item_bytes));
            f(offset, packed, item_bytes, static_cast<std::size_t>(advanced));
            packed += static_cast<std::size_t>(advanced) * item_bytes;
        }
        index[inner] += advanced;
        offset += advanced * inner_stride;
        for (std::size_t dim = inner; index[dim] == dims[dim].count && dim > 0; --dim) {
            index[dim] = 0;
            offset -= dims[dim].count * dims[dim].stride_bytes;
            ++index[dim - 1];
            offset += dims[dim - 1].stride_bytes;
        }
    }
}

template <std::size_t Item>
void copy_items(std::uint8_t* target, std::int64_t target_step, const std::uint8_t* source, std::int64_t source_step,
                std::size_t items) noexcept {
    for (std::size_t i = 0; i < items; ++i, target += target_step, source += source_step) {
        std::memcpy(target, source, Item);
    }
}

void copy_row(std::uint8_t* target, std::int64_t target_step, const std::uint8_t* source, std::int64_t source_step,
              std::size_t item_bytes, std::size_t items) noexcept {
    switch (items == 1 ? 0 : item_bytes) {
        case 1: return copy_items<1>(target, target_step, source, source_step, items);
        case 2: return copy_items<2>(target, target_step, source, source_step, items);
        case 4: return copy_items<4>(target, target_step, source, source_step, items);
        case 8: return copy_items<8>(target, target_step, source, source_step, items);
        case 16: return copy_items<16>(target, target_step, source, source_step, items);
        default:
            for (std::size_t i = 0; i < items; ++i, target += target_step, source += source_step) {
                std::memcpy(target, source, item_bytes);
            }
    }
}

}  // namespace

StridedRegion::StridedRegion(std::size_t item_bytes, std::span<const Dim> dims)
    : item_bytes_(item_bytes), size_bytes_(item_bytes) {
    if (item_bytes == 0 || dims.size() > kMaxDims) {
        throw std::invalid_argument("a strided region needs items of at least one byte and at most 64 dimensions");
    }
    for (const Dim& dim : dims) {
        if (dim.count < 0 ||
            __builtin_mul_overflow(size_bytes_, static_cast<std::size_t>(dim.count), &size_bytes_)) {
            throw std::invalid_argument("a strided region with a negative or overflowing size");
        }
    }
    if (size_bytes_ == 0) {
        return;
    }
    for (std::size_t i = dims.size(); i-- > 0;) {  // innermost first, reversed at the end
        const Dim& dim = dims[i];
        if (dim.count == 1) {
            continue;
        }
        if (dims_.empty() && dim.stride_bytes == static_cast<std::int64_t>(item_bytes_)) {
            item_bytes_ *= static_cast<std::size_t>(dim.count);
        } else if (std::int64_t span = 0; !dims_.empty() &&
                   !__builtin_mul_overflow(dims_.back().count, dims_.back().stride_bytes, &span) &&
                   dim.stride_bytes == span) {
            dims_.back().count *= dim.count;
        } else {
            dims_.push_back(dim);
        }
    }
    std::reverse(dims_.begin(), dims_.end());
}

void StridedRegion::gather(std::uint8_t* target, const std::uint8_t* base, std::size_t begin,
                           std::size_t end) const noexcept {
    if (begin >= end) {
        return;
    }
    if (contiguous()) {
        std::memcpy(target, base + begin, end - begin);
        return;
    }
    const std::int64_t step = dims_.back().stride_bytes;
    for_each_row(item_bytes_, dims_, begin, end,
                 [&](std::int64_t offset, std::size_t packed, std::size_t bytes, std::size_t items) {
                     copy_row(target + packed, static_cast<std::int64_t>(bytes), base + offset, step, bytes, items);
                 });
}

void StridedRegion::scatter(std::uint8_t* base, const std::uint8_t* source, std::size_t begin,
                            std::size_t end) const noexcept {
    if (begin >= end) {
        return;
    }
    if (contiguous()) {
        std::memcpy(base + begin, source, end - begin);
        return;
    }
    const std::int64_t step = dims_.back().stride_bytes;
    for_each_row(item_bytes_, dims_, begin, end,
                 [&](std::int64_t offset, std::size_t packed, std::size_t bytes, std::size_t items) {
                     copy_row(base + offset, step, source + packed, static_cast<std::int64_t>(bytes), bytes, items);
                 });
}

}  // namespace ckpt
