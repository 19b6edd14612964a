#include "job_layout.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace ckpt {
namespace {

[[noreturn]] void refuse(std::size_t extent, const char* why) {
    throw std::invalid_argument("extent " + std::to_string(extent) + ": " + why);
}

std::span<const Dim> slice_dims(std::span<const Dim> dims, std::uint32_t begin, std::uint32_t count,
                                std::size_t extent) {
    if (begin > dims.size() || count > dims.size() - begin) {
        refuse(extent, "its loops lie outside the table of loops");
    }
    return dims.subspan(begin, count);
}

bool power_of_two(std::uint64_t value) { return value != 0 && (value & (value - 1)) == 0; }

}  // namespace

JobLayout::JobLayout(std::span<const Extent> extents, std::span<const Dim> dims, const LayoutOptions& options)
    : options_(options) {
    check_options();
    extents_.reserve(extents.size());
    strided_index_.reserve(extents.size());
    runs_index_.reserve(extents.size());
    single_run_bytes_.reserve(extents.size());
    for (const Extent& extent : extents) {
        take_extent(extent, dims);
    }
    cut();
}

void JobLayout::check_options() const {
    const auto& o = options_;
    if (o.body_begin > o.body_end || o.body_end > (1ull << 62)) {
        throw std::invalid_argument("the body's end lies before its beginning or beyond every file");
    }
    if (o.segment_bytes == 0 || o.segment_bytes % kPage != 0 || o.granule_bytes == 0 || o.min_live_bytes == 0) {
        throw std::invalid_argument("segments are multiples of 4096 bytes; granules and live stretches are not empty");
    }
    if (!power_of_two(o.memory_alignment) || !power_of_two(o.offset_alignment) ||
        o.memory_alignment > kPage || o.offset_alignment > kPage) {
        throw std::invalid_argument("alignments are powers of two of at most 4096");
    }
    if ((o.body_end - o.body_begin) / o.segment_bytes >= UINT32_MAX - 2) {
        throw std::invalid_argument("a body of too many segments");
    }
}

void JobLayout::take_extent(const Extent& extent, std::span<const Dim> dims) {
    const std::size_t index = extents_.size();
    if (index >= INT32_MAX) {
        throw std::invalid_argument("too many extents");
    }
    const std::uint64_t floor =
        extents_.empty() ? options_.body_begin : extents_.back().file_offset + extents_.back().size_bytes;
    if (extent.file_offset < floor || extent.size_bytes > options_.body_end ||
        extent.file_offset > options_.body_end - extent.size_bytes) {
        refuse(index, "it overlaps the one before, is out of order or lies outside the body");
    }
    const std::uint64_t granules = granules_of(extent);
    if (granules > options_.granule_slots || extent.granule_slot > options_.granule_slots - granules) {
        refuse(index, "its granules lie outside the granule table");
    }
    if (extent.size_bytes != 0 && extent.address == 0) {
        refuse(index, "it has bytes but no address");
    }
    strided_index_.push_back(-1);
    runs_index_.push_back(-1);
    single_run_bytes_.push_back(0);
    if (extent.source_dims != 0 && extent.size_bytes != 0) {
        StridedRegion region(extent.item_bytes, slice_dims(dims, extent.source_dims_begin, extent.source_dims, index));
        if (region.size_bytes() != extent.size_bytes) {
            refuse(index, "its loops hold another number of bytes than it has");
        }
        if (!region.contiguous()) {
            if (extent.device != kHost) {
                refuse(index, "strided memory of a CUDA device; make it contiguous there first");
            }
            strided_index_.back() = static_cast<std::int32_t>(strided_.size());
            strided_.push_back(std::move(region));
        }
    }
    if (extent.run_bytes != 0 && extent.size_bytes != 0) {
        PositionedRuns runs(extent.run_bytes, slice_dims(dims, extent.run_dims_begin, extent.run_dims, index),
                            extent.follow_bytes);
        if (extent.run_skip_bytes > runs.size_bytes() ||
            extent.size_bytes > runs.size_bytes() - extent.run_skip_bytes) {
            refuse(index, "the runs of its tensor digest hold fewer bytes than it has");
        }
        if (runs.single()) {
            single_run_bytes_.back() = runs.size_bytes();
        } else {
            runs_index_.back() = static_cast<std::int32_t>(runs_.size());
            runs_.push_back(std::move(runs));
        }
    }
    extents_.push_back(extent);
}

void JobLayout::cut() {
    const auto count = static_cast<std::uint32_t>(extents_.size());
    std::uint32_t first = 0;
    for (std::uint64_t begin = options_.body_begin; begin < options_.body_end;) {
        const std::uint64_t grid = (begin / options_.segment_bytes + 1) * options_.segment_bytes;
        const std::uint64_t end = std::min(grid, options_.body_end);
        while (first < count && extents_[first].file_offset + extents_[first].size_bytes <= begin) {
            ++first;
        }
        std::uint32_t last = first;
        bool on_device = false;
        while (last < count && extents_[last].file_offset < end) {
            on_device = on_device || extents_[last].device != kHost;
            ++last;
        }
        bool live_only = false;
        if (last - first == 1) {
            const ByteRange live = live_part(extents_[first], begin, end);
            live_only = live.begin == begin && live.end == end && begin >= extents_[first].file_offset &&
                        end <= extents_[first].file_offset + extents_[first].size_bytes;
        }
        segments_.push_back({begin, end, first, last, live_only, on_device});
        begin = end;
    }
}

const StridedRegion* JobLayout::strided(std::uint32_t extent) const noexcept {
    const std::int32_t index = strided_index_[extent];
    return index < 0 ? nullptr : &strided_[static_cast<std::size_t>(index)];
}

const PositionedRuns* JobLayout::runs(std::uint32_t extent) const noexcept {
    const std::int32_t index = runs_index_[extent];
    return index < 0 ? nullptr : &runs_[static_cast<std::size_t>(index)];
}

ByteRange JobLayout::live_part(const Extent& extent, std::uint64_t begin, std::uint64_t end) const noexcept {
    const auto index = static_cast<std::size_t>(&extent - extents_.data());
    if (extent.device != kHost || strided_index_[index] >= 0 ||
        (extent.address - extent.file_offset) % options_.alignment() != 0) {
        return {begin, begin};
    }
    const std::uint64_t alignment = options_.alignment();
    const std::uint64_t from = (begin + alignment - 1) / alignment * alignment;
    const std::uint64_t to = end / alignment * alignment;
    if (from >= to || to - from < options_.min_live_bytes) {
        return {begin, begin};
    }
    return {from, to};
}

ByteRange JobLayout::segments_of(const Extent& extent) const noexcept {
    if (extent.size_bytes == 0) {
        return {0, 0};
    }
    const std::uint64_t base = options_.body_begin / options_.segment_bytes;
    return {extent.file_offset / options_.segment_bytes - base,
            (extent.file_offset + extent.size_bytes - 1) / options_.segment_bytes - base + 1};
}

}  // namespace ckpt
