// Turns one segment into what is written: stretches of live memory where that is possible, gathered bytes elsewhere.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <vector>

#include "cuda.hpp"
#include "job_digests.hpp"
#include "job_layout.hpp"

namespace ckpt {

class SegmentBuilder {
public:
    SegmentBuilder(const JobLayout& layout, JobDigests& digests) : layout_(layout), digests_(digests) {}

    // `buffer` has segment_bytes and is aligned to a page; it may be nullptr for a live_only
    // segment when `allow_live`. Digests every byte. The result covers the segment in file order.
    const std::vector<iovec>& build(const Segment& segment, std::uint8_t* buffer, bool allow_live);

    // Bytes of the last build() that lie in its buffer.
    std::uint64_t gathered_bytes() const noexcept { return gathered_bytes_; }

    // For segments with device memory: issues the copies into `buffer` and lists the devices they were issued to, those
    // before a CudaError too. Nothing is digested before digest_buffer() is called, after the copies have arrived.
    void copy_from_devices(const Segment& segment, std::uint8_t* buffer, CudaCopier& copier,
                           std::vector<int>& devices);
    void digest_buffer(const Segment& segment, const std::uint8_t* buffer);

    // Where a file offset of a segment lies in its buffer.
    static std::uint8_t* place(const Segment& segment, std::uint8_t* buffer, std::uint64_t offset) noexcept {
        return buffer + (offset - segment.begin / kPage * kPage);
    }

private:
    void gather(std::uint32_t extent, std::uint64_t begin, std::uint64_t end, std::uint8_t* target, bool digest);

    const JobLayout& layout_;
    JobDigests& digests_;
    std::vector<iovec> vectors_;
    std::uint64_t gathered_bytes_ = 0;
};

// The part of `vectors` (which begin at file offset `begin`) that holds file bytes [from, to).
std::vector<iovec> slice_vectors(const std::vector<iovec>& vectors, std::uint64_t begin, std::uint64_t from,
                                 std::uint64_t to);

}  // namespace ckpt
