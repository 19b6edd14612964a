#include "segment_builder.hpp"

#include <algorithm>
#include <cstring>

namespace ckpt {
namespace {

const std::uint8_t* memory_at(std::uint64_t address) { return reinterpret_cast<const std::uint8_t*>(address); }

iovec vector_of(const std::uint8_t* data, std::uint64_t size) {
    return {const_cast<std::uint8_t*>(data), static_cast<std::size_t>(size)};  // pwritev only reads
}

}  // namespace

void SegmentBuilder::gather(std::uint32_t extent, std::uint64_t begin, std::uint64_t end, std::uint8_t* target,
                            bool digest) {
    if (begin >= end) {
        return;
    }
    const Extent& record = layout_.extents()[extent];
    const std::uint64_t local = begin - record.file_offset;
    const std::uint64_t size = end - begin;
    if (const StridedRegion* region = layout_.strided(extent); region != nullptr) {
        region->gather(target, memory_at(record.address), local, local + size);
        if (digest) {
            digests_.add(extent, local, target, size);
        }
    } else if (digest) {
        digests_.copy_and_add(extent, local, target, memory_at(record.address) + local, size);
    } else {
        std::memcpy(target, memory_at(record.address) + local, size);
    }
}

const std::vector<iovec>& SegmentBuilder::build(const Segment& segment, std::uint8_t* buffer, bool allow_live) {
    vectors_.clear();
    gathered_bytes_ = 0;
    std::uint64_t gathered_from = segment.begin;  // gathered bytes not yet listed
    std::uint64_t at = segment.begin;
    const auto list_gathered = [&](std::uint64_t until) {
        if (until > gathered_from) {
            vectors_.push_back(vector_of(place(segment, buffer, gathered_from), until - gathered_from));
            gathered_bytes_ += until - gathered_from;
        }
    };
    for (std::uint32_t i = segment.first_extent; i < segment.last_extent; ++i) {
        const Extent& extent = layout_.extents()[i];
        const std::uint64_t begin = std::max(extent.file_offset, segment.begin);
        const std::uint64_t end = std::min(extent.file_offset + extent.size_bytes, segment.end);
        if (begin >= end) {
            continue;
        }
        if (begin > at) {
            std::memset(place(segment, buffer, at), 0, begin - at);
        }
        const ByteRange live = allow_live ? layout_.live_part(extent, begin, end) : ByteRange{begin, begin};
        if (live.empty()) {
            gather(i, begin, end, place(segment, buffer, begin), true);
        } else {
            if (live.begin > begin) {
                gather(i, begin, live.begin, place(segment, buffer, begin), true);
            }
            list_gathered(live.begin);
            const std::uint64_t local = live.begin - extent.file_offset;
            const std::uint8_t* data = memory_at(extent.address) + local;
            digests_.add(i, local, data, live.end - live.begin);
            vectors_.push_back(vector_of(data, live.end - live.begin));
            gathered_from = live.end;
            if (live.end < end) {
                gather(i, live.end, end, place(segment, buffer, live.end), true);
            }
        }
        at = end;
    }
    if (at < segment.end) {
        std::memset(place(segment, buffer, at), 0, segment.end - at);
    }
    list_gathered(segment.end);
    return vectors_;
}

void SegmentBuilder::copy_from_devices(const Segment& segment, std::uint8_t* buffer, CudaCopier& copier,
                                       std::vector<int>& devices) {
    std::uint64_t at = segment.begin;
    for (std::uint32_t i = segment.first_extent; i < segment.last_extent; ++i) {
        const Extent& extent = layout_.extents()[i];
        const std::uint64_t begin = std::max(extent.file_offset, segment.begin);
        const std::uint64_t end = std::min(extent.file_offset + extent.size_bytes, segment.end);
        if (begin >= end) {
            continue;
        }
        std::memset(place(segment, buffer, at), 0, begin - at);
        if (extent.device == kHost) {
            gather(i, begin, end, place(segment, buffer, begin), false);
        } else {
            const std::uint64_t source = extent.address + (begin - extent.file_offset);
            if (std::find(devices.begin(), devices.end(), extent.device) == devices.end()) {
                devices.push_back(extent.device);
            }
            copier.copy(extent.device, place(segment, buffer, begin), memory_at(source), end - begin);
        }
        at = end;
    }
    std::memset(place(segment, buffer, at), 0, segment.end - at);
}

void SegmentBuilder::digest_buffer(const Segment& segment, const std::uint8_t* buffer) {
    for (std::uint32_t i = segment.first_extent; i < segment.last_extent; ++i) {
        const Extent& extent = layout_.extents()[i];
        const std::uint64_t begin = std::max(extent.file_offset, segment.begin);
        const std::uint64_t end = std::min(extent.file_offset + extent.size_bytes, segment.end);
        if (begin < end) {
            digests_.add(i, begin - extent.file_offset, buffer + (begin - segment.begin / kPage * kPage),
                         end - begin);
        }
    }
}

std::vector<iovec> slice_vectors(const std::vector<iovec>& vectors, std::uint64_t begin, std::uint64_t from,
                                 std::uint64_t to) {
    std::vector<iovec> result;
    std::uint64_t at = begin;
    for (const iovec& vector : vectors) {
        const std::uint64_t low = std::max(at, from);
        const std::uint64_t high = std::min(at + vector.iov_len, to);
        if (low < high) {
            result.push_back({static_cast<std::uint8_t*>(vector.iov_base) + (low - at),
                              static_cast<std::size_t>(high - low)});
        }
        at += vector.iov_len;
    }
    return result;
}

}  // namespace ckpt
