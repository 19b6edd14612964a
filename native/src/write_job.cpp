#include "write_job.hpp"

#include <algorithm>
#include <stdexcept>

#include "crc64.hpp"
#include "scramble.hpp"

namespace ckpt {
namespace {

// The first, which is captured first, and one anywhere in every equal part of the rest; a single look goes anywhere.
std::uint64_t sampled_granule(std::uint64_t look, std::uint64_t looks, std::uint64_t count,
                              std::uint64_t random) noexcept {
    if (looks == count || look == 0) {
        return looks == 1 ? random % count : look;
    }
    const std::uint64_t begin = 1 + (count - 1) * (look - 1) / (looks - 1);
    const std::uint64_t end = 1 + (count - 1) * look / (looks - 1);
    return begin + random % (end - begin);
}

}  // namespace

WriteJob::WriteJob(const WriteRequest& request)
    : layout_(request.extents, request.dims, request.layout),
      digests_(layout_),
      files_(request.files),
      reserve_bytes_(request.reserve_bytes),
      uncaptured_(std::make_unique<std::atomic<std::uint64_t>[]>(request.extents.size())),
      taken_(layout_.segments().size()),
      pending_(layout_.segments().size()),
      reserve_started_(request.reserve_bytes == 0),
      reserved_(request.reserve_bytes == 0) {
    if (files_.direct < 0 && files_.buffered < 0) {
        throw std::invalid_argument("a write job needs a file descriptor");
    }
    const LayoutOptions& options = layout_.options();
    if (files_.buffered < 0 && (options.body_begin % options.alignment() != 0 ||
                                options.body_end % options.alignment() != 0)) {
        throw std::invalid_argument("without a buffered descriptor the body must begin and end on the alignment");
    }
    for (std::size_t i = 0; i < request.extents.size(); ++i) {
        uncaptured_[i].store(request.extents[i].size_bytes, std::memory_order_relaxed);
        extent_bytes_ += request.extents[i].size_bytes;
    }
    const auto segments = layout_.segments();
    std::vector<bool> listed(segments.size());
    const auto list = [&](std::uint64_t segment) {
        if (!listed[segment]) {
            listed[segment] = true;
            (segments[segment].on_device ? device_ : host_).order.push_back(static_cast<std::uint32_t>(segment));
        }
    };
    for (const std::uint32_t extent : request.order) {
        if (extent >= layout_.extents().size()) {
            throw std::invalid_argument("the order names an extent that does not exist");
        }
        const ByteRange range = layout_.segments_of(layout_.extents()[extent]);
        for (std::uint64_t segment = range.begin; segment < range.end; ++segment) {
            list(segment);
        }
    }
    for (std::uint64_t segment = 0; segment < segments.size(); ++segment) {
        list(segment);
    }
    if (!device_.order.empty()) {
        late_digests_ = std::make_unique<std::atomic<std::uint32_t>[]>(request.extents.size());
        for (const std::uint32_t index : device_.order) {
            for (std::uint32_t i = segments[index].first_extent; i < segments[index].last_extent; ++i) {
                late_digests_[i].fetch_add(1, std::memory_order_relaxed);
            }
        }
    }
}

WriteJob::~WriteJob() {
    for (const CudaCopier::Mark& mark : order_marks_) {
        CudaRuntime::find()->destroy_event(mark.event);
    }
}

std::vector<TraceEvent> WriteJob::trace() const {
    MutexLock lock(trace_mutex_);
    return trace_;
}

void WriteJob::record(TraceKind kind, std::int64_t begin_ns, std::uint64_t offset, std::uint64_t size, int thread) {
    const std::int64_t end_ns = now_ns();
    MutexLock lock(trace_mutex_);
    if (trace_.size() < kTraceEvents) {
        trace_.push_back({begin_ns, end_ns, offset, size, static_cast<std::int32_t>(kind), thread});
    }
}

void WriteJob::add_digested(const Segment& segment) noexcept {
    for (std::uint32_t i = segment.first_extent; i < segment.last_extent; ++i) {
        late_digests_[i].fetch_sub(1, std::memory_order_release);
    }
}

void WriteJob::add_captured(const Segment& segment) noexcept {
    std::uint64_t total = 0;
    for (std::uint32_t i = segment.first_extent; i < segment.last_extent; ++i) {
        const Extent& extent = layout_.extents()[i];
        const std::uint64_t begin = std::max(extent.file_offset, segment.begin);
        const std::uint64_t end = std::min(extent.file_offset + extent.size_bytes, segment.end);
        if (begin < end) {
            uncaptured_[i].fetch_sub(end - begin, std::memory_order_release);
            total += end - begin;
        }
    }
    if (captured_bytes_.fetch_add(total, std::memory_order_relaxed) + total == extent_bytes_) {
        captured_ns_.store(now_ns(), std::memory_order_relaxed);
    }
}

bool WriteJob::granule_changed(std::uint32_t extent, std::uint64_t granule, std::vector<std::uint8_t>& scratch,
                               std::unique_ptr<CudaCopier>& copier) const {
    const Extent& record = layout_.extents()[extent];
    const std::uint64_t begin = granule * layout_.options().granule_bytes;
    const std::uint64_t size = std::min(layout_.options().granule_bytes, record.size_bytes - begin);
    const auto* data = reinterpret_cast<const std::uint8_t*>(record.address);
    if (const StridedRegion* region = layout_.strided(extent); region != nullptr) {
        region->gather(scratch.data(), data, begin, begin + size);
        data = scratch.data();
    } else if (record.device != kHost) {
        const CudaRuntime* runtime = CudaRuntime::find();
        if (copier == nullptr) {
            copier = std::make_unique<CudaCopier>(*runtime);
        }
        copier->copy(record.device, scratch.data(), data + begin, size);
        auto marks = copier->mark({record.device});
        copier->reach(marks);
        data = scratch.data();
    } else {
        data += begin;
    }
    return crc_digest(data, size) != digests_.granule(record.granule_slot + granule);
}

std::vector<std::uint32_t> WriteJob::recheck(std::span<const std::uint32_t> extents, std::uint64_t samples,
                                             std::uint64_t seed) const {
    std::vector<std::uint32_t> changed;
    std::vector<std::uint8_t> scratch(layout_.options().granule_bytes);
    std::unique_ptr<CudaCopier> copier;
    for (const std::uint32_t extent : extents) {
        if (extent >= layout_.extents().size()) {
            throw std::out_of_range("recheck of an extent that does not exist");
        }
        const std::uint64_t count = layout_.granules_of(layout_.extents()[extent]);
        if (!captured(extent) || !digested(extent) || count == 0) {
            continue;
        }
        const std::uint64_t looks = samples == 0 ? count : std::min(samples, count);
        for (std::uint64_t i = 0; i < looks; ++i) {
            const std::uint64_t granule = sampled_granule(i, looks, count, scramble(scramble(seed ^ extent) + i));
            if (granule_changed(extent, granule, scratch, copier)) {
                changed.push_back(extent);
                break;
            }
        }
    }
    return changed;
}

}  // namespace ckpt
