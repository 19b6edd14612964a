// The plan of one rank file's body: which extents lie where, cut into segments. Immutable and without I/O.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "extent.hpp"
#include "runs.hpp"
#include "strided.hpp"

namespace ckpt {

inline constexpr std::uint64_t kPage = 4096;

struct LayoutOptions {
    std::uint64_t body_begin = 0;  // the job writes file bytes [body_begin, body_end); what no extent covers is zero
    std::uint64_t body_end = 0;
    std::uint64_t segment_bytes = 4u << 20;  // a multiple of kPage
    std::uint64_t granule_bytes = 16384;
    std::uint64_t granule_slots = 0;
    std::uint64_t memory_alignment = 1;  // what direct I/O wants at least; 1 where everything is buffered
    std::uint64_t offset_alignment = 1;  // both divide kPage
    std::uint64_t min_live_bytes = 16384;  // shorter stretches are gathered rather than written from where they lie

    // Where stretches of live memory begin and end, in the file and in memory. Whole pages, though direct I/O may take
    // less: a request is cut where its memory crosses a page too often, and a cut inside a page of the file makes the
    // device read the rest of that page before it writes.
    std::uint64_t alignment() const noexcept { return memory_alignment > 1 || offset_alignment > 1 ? kPage : 1; }
};

// One write: a range of the file between two multiples of segment_bytes.
struct Segment {
    std::uint64_t begin;
    std::uint64_t end;
    std::uint32_t first_extent;
    std::uint32_t last_extent;  // one past
    bool live_only;             // needs no buffer
    bool on_device;             // holds bytes of a CUDA device
};

struct ByteRange {
    std::uint64_t begin;
    std::uint64_t end;
    bool empty() const noexcept { return begin >= end; }
};

class JobLayout {
public:
    // `extents` are ordered by file offset and disjoint. Throws std::invalid_argument.
    JobLayout(std::span<const Extent> extents, std::span<const Dim> dims, const LayoutOptions& options);

    const LayoutOptions& options() const noexcept { return options_; }
    std::span<const Extent> extents() const noexcept { return extents_; }
    std::span<const Segment> segments() const noexcept { return segments_; }
    std::uint64_t granules_of(const Extent& extent) const noexcept {
        return (extent.size_bytes + options_.granule_bytes - 1) / options_.granule_bytes;
    }
    // nullptr where the source is contiguous, or where the tensor digest is that of a single run (or absent).
    const StridedRegion* strided(std::uint32_t extent) const noexcept;
    const PositionedRuns* runs(std::uint32_t extent) const noexcept;
    // Bytes of the only run of the tensor digest, where there is just one.
    std::uint64_t single_run_bytes(std::uint32_t extent) const noexcept { return single_run_bytes_[extent]; }
    // The part of file bytes [begin, end) of an extent that can be written from where it lies.
    ByteRange live_part(const Extent& extent, std::uint64_t begin, std::uint64_t end) const noexcept;
    // Segments that hold bytes of an extent, as indices [begin, end).
    ByteRange segments_of(const Extent& extent) const noexcept;

private:
    void check_options() const;
    void take_extent(const Extent& extent, std::span<const Dim> dims);
    void cut();

    LayoutOptions options_;
    std::vector<Extent> extents_;
    std::vector<Segment> segments_;
    std::vector<std::int32_t> strided_index_;
    std::vector<std::int32_t> runs_index_;
    std::vector<std::uint64_t> single_run_bytes_;
    std::vector<StridedRegion> strided_;
    std::vector<PositionedRuns> runs_;
};

}  // namespace ckpt
