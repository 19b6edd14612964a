#include "job_digests.hpp"

#include <algorithm>

#include "crc64.hpp"

namespace ckpt {
namespace {

constexpr std::uint64_t kHotBytes = 256u << 10;  // digested twice while it is in the second-level cache

}  // namespace

JobDigests::JobDigests(const JobLayout& layout)
    : layout_(layout),
      granule_power_(crc_byte_power(layout.options().granule_bytes)),
      granules_(std::make_unique<std::atomic<std::uint64_t>[]>(layout.options().granule_slots)),
      contributions_(std::make_unique<std::atomic<std::uint64_t>[]>(layout.extents().size())) {}

template <typename Digest>
void JobDigests::add_parts(std::uint32_t extent, std::uint64_t begin, std::uint64_t size, Digest&& digest) noexcept {
    const Extent& record = layout_.extents()[extent];
    const std::uint64_t granule_bytes = layout_.options().granule_bytes;
    for (std::uint64_t at = begin; at < begin + size;) {
        const std::uint64_t granule = at / granule_bytes;
        const std::uint64_t granule_end = std::min((granule + 1) * granule_bytes, record.size_bytes);
        const std::uint64_t end = std::min(granule_end, begin + size);
        const std::uint64_t raw = digest(at - begin, end - at);
        granules_[record.granule_slot + granule].fetch_xor(crc_shift(raw, granule_end - end),
                                                           std::memory_order_relaxed);
        at = end;
    }
}

void JobDigests::add(std::uint32_t extent, std::uint64_t begin, const std::uint8_t* data,
                     std::uint64_t size) noexcept {
    const PositionedRuns* runs = layout_.runs(extent);
    const std::uint64_t skip = layout_.extents()[extent].run_skip_bytes;
    while (size > 0) {
        const std::uint64_t hot = runs == nullptr ? size : std::min(size, kHotBytes);
        add_parts(extent, begin, hot,
                  [data](std::uint64_t at, std::uint64_t bytes) { return crc_digest(data + at, bytes); });
        if (runs != nullptr) {
            contributions_[extent].fetch_xor(runs->contribution(data, skip + begin, skip + begin + hot),
                                             std::memory_order_relaxed);
        }
        begin += hot;
        data += hot;
        size -= hot;
    }
}

void JobDigests::copy_and_add(std::uint32_t extent, std::uint64_t begin, std::uint8_t* target,
                              const std::uint8_t* data, std::uint64_t size) noexcept {
    const PositionedRuns* runs = layout_.runs(extent);
    const std::uint64_t skip = layout_.extents()[extent].run_skip_bytes;
    while (size > 0) {
        const std::uint64_t hot = runs == nullptr ? size : std::min(size, kHotBytes);
        add_parts(extent, begin, hot, [target, data](std::uint64_t at, std::uint64_t bytes) {
            return crc_copy_digest(target + at, data + at, bytes);
        });
        if (runs != nullptr) {
            contributions_[extent].fetch_xor(runs->contribution(target, skip + begin, skip + begin + hot),
                                             std::memory_order_relaxed);
        }
        begin += hot;
        target += hot;
        data += hot;
        size -= hot;
    }
}

std::vector<std::uint64_t> JobDigests::granules() const {
    std::vector<std::uint64_t> values(layout_.options().granule_slots);
    for (std::size_t slot = 0; slot < values.size(); ++slot) {
        values[slot] = granule(slot);
    }
    return values;
}

std::uint64_t JobDigests::extent_digest(const Extent& extent) const noexcept {
    const std::uint64_t count = layout_.granules_of(extent);
    std::uint64_t raw = 0;
    for (std::uint64_t i = 0; i + 1 < count; ++i) {
        raw = crc_multiply(raw, granule_power_) ^ granule(extent.granule_slot + i);
    }
    if (count == 0) {
        return 0;
    }
    const std::uint64_t last_bytes = extent.size_bytes - (count - 1) * layout_.options().granule_bytes;
    return crc_shift(raw, last_bytes) ^ granule(extent.granule_slot + count - 1);
}

std::vector<std::uint64_t> JobDigests::extent_digests() const {
    std::vector<std::uint64_t> values;
    values.reserve(layout_.extents().size());
    for (const Extent& extent : layout_.extents()) {
        values.push_back(extent_digest(extent));
    }
    return values;
}

std::vector<std::uint64_t> JobDigests::tensor_contributions() const {
    std::vector<std::uint64_t> values;
    values.reserve(layout_.extents().size());
    for (std::uint32_t i = 0; i < layout_.extents().size(); ++i) {
        const Extent& extent = layout_.extents()[i];
        if (extent.run_bytes == 0 || extent.size_bytes == 0) {
            values.push_back(0);
        } else if (layout_.runs(i) != nullptr) {
            values.push_back(contributions_[i].load(std::memory_order_relaxed));
        } else {
            // One run: the extent's own digest, moved to where it ends in the tensor. Merged loops make a run longer
            // than run_bytes, so the length of all runs is taken.
            values.push_back(crc_shift(extent_digest(extent),
                                       extent.follow_bytes + layout_.single_run_bytes(i) - extent.run_skip_bytes -
                                           extent.size_bytes));
        }
    }
    return values;
}

}  // namespace ckpt
