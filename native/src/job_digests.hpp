// The digests of one job, filled in any order by any thread: every part xors its positioned CRC into its slots.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "job_layout.hpp"

namespace ckpt {

class JobDigests {
public:
    explicit JobDigests(const JobLayout& layout);

    // Local bytes [begin, begin + size) of an extent. Each byte is added once.
    void add(std::uint32_t extent, std::uint64_t begin, const std::uint8_t* data, std::uint64_t size) noexcept;
    // The same for bytes that are copied to `target` on the way.
    void copy_and_add(std::uint32_t extent, std::uint64_t begin, std::uint8_t* target, const std::uint8_t* data,
                      std::uint64_t size) noexcept;

    std::uint64_t granule(std::uint64_t slot) const noexcept { return granules_[slot].load(std::memory_order_relaxed); }
    // All of these are raw CRCs, complete once every byte has been added.
    std::vector<std::uint64_t> granules() const;
    std::vector<std::uint64_t> extent_digests() const;
    // Per extent: what it adds (xor) to the raw CRC of its logical tensor; 0 where the extent names no runs.
    std::vector<std::uint64_t> tensor_contributions() const;

private:
    template <typename Digest>
    void add_parts(std::uint32_t extent, std::uint64_t begin, std::uint64_t size, Digest&& digest) noexcept;
    std::uint64_t extent_digest(const Extent& extent) const noexcept;

    const JobLayout& layout_;
    std::uint64_t granule_power_;
    std::unique_ptr<std::atomic<std::uint64_t>[]> granules_;
    std::unique_ptr<std::atomic<std::uint64_t>[]> contributions_;  // of extents with several runs
};

}  // namespace ckpt
