#include "reader.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

#include "crc64.hpp"
#include "sync.hpp"

namespace ckpt {
namespace {

constexpr std::uint64_t kPageBytes = 4096;
constexpr std::size_t kKeptBuffers = 4;

// Bounce buffers are kept between calls: on virtual machines, touching fresh memory is slower than the disk.
class BouncePool {
public:
    using Buffer = std::unique_ptr<std::uint8_t, decltype(&std::free)>;

    Buffer acquire(std::size_t size) {
        {
            MutexLock lock(mutex_);
            for (auto& kept : kept_) {
                if (kept.size >= size) {
                    Buffer buffer = std::move(kept.buffer);
                    std::swap(kept, kept_.back());
                    kept_.pop_back();
                    return buffer;
                }
            }
        }
        Buffer buffer(static_cast<std::uint8_t*>(std::aligned_alloc(kPageBytes, size)), &std::free);
        if (buffer == nullptr) {
            throw std::bad_alloc();
        }
        return buffer;
    }

    void release(Buffer buffer, std::size_t size) {
        MutexLock lock(mutex_);
        if (kept_.size() < kKeptBuffers) {
            kept_.push_back({std::move(buffer), size});
        }
    }

private:
    struct Kept {
        Buffer buffer;
        std::size_t size;
    };
    Mutex mutex_;
    std::vector<Kept> kept_ CKPT_GUARDED_BY(mutex_);
};

BouncePool& bounce_pool() {
    static BouncePool pool;
    return pool;
}

// Direct reads take whole pages of the file, though it may allow less: a device that holds its blocks in pages reads a
// page again for each part of it.
constexpr std::uint64_t unit_bytes(bool direct) noexcept { return direct ? kPageBytes : 1; }

struct Part {
    std::size_t range;
    std::uint64_t begin;  // file offsets
    std::uint64_t end;
};

struct Chunk {
    std::uint64_t begin;
    std::uint64_t end;
    std::size_t first_part;
    std::size_t last_part;
};

class Reader {
public:
    Reader(const FilePair& files, std::span<const ReadRange> ranges, const ReadOptions& options);
    ReadResult run();

private:
    void check() const;
    void plan();
    void work();
    std::optional<IoError> read_chunk(const Chunk& chunk, std::uint8_t* buffer);
    std::optional<IoError> fetch(const Chunk& chunk, std::uint8_t* buffer, bool direct);
    void deliver(const Part& part, const std::uint8_t* buffer, std::uint64_t base, bool direct);
    void take(std::size_t range, std::uint64_t local, std::uint64_t size, const std::uint8_t* source,
              std::uint8_t* target);
    void digest(std::size_t range, std::uint64_t local, std::uint64_t size, const std::uint8_t* source,
                std::uint8_t* target);
    Part live_part(const Part& part, bool direct) const;
    void fail(const Chunk& chunk, IoError error);
    std::vector<std::uint64_t> range_digests() const;

    FilePair files_;
    std::span<const ReadRange> ranges_;
    ReadOptions options_;
    std::vector<Part> parts_;
    std::vector<Chunk> chunks_;
    std::unique_ptr<std::atomic<std::uint64_t>[]> digests_;
    std::unique_ptr<std::atomic<std::uint64_t>[]> granules_;
    std::atomic<std::size_t> next_chunk_{0};
    std::atomic<bool> stop_{false};
    std::atomic<bool> direct_refused_{false};
    Mutex error_mutex_;
    std::optional<IoError> error_ CKPT_GUARDED_BY(error_mutex_);
    std::size_t failed_range_ CKPT_GUARDED_BY(error_mutex_) = 0;
};

Reader::Reader(const FilePair& files, std::span<const ReadRange> ranges, const ReadOptions& options)
    : files_(files), ranges_(ranges), options_(options) {
    check();
    digests_ = std::make_unique<std::atomic<std::uint64_t>[]>(ranges.size());
    granules_ = std::make_unique<std::atomic<std::uint64_t>[]>(options.granule_slots);
    plan();
}

void Reader::check() const {
    const ReadOptions& o = options_;
    const auto power_of_two = [](std::uint64_t value) { return value != 0 && (value & (value - 1)) == 0; };
    if (files_.direct < 0 && files_.buffered < 0) {
        throw std::invalid_argument("reading needs a file descriptor");
    }
    if (o.threads < 1 || o.threads > 256 || o.block_bytes == 0 || o.block_bytes % kPageBytes != 0 ||
        o.block_bytes > (1u << 30) || o.min_live_bytes == 0 || !power_of_two(o.memory_alignment) ||
        !power_of_two(o.offset_alignment) || o.offset_alignment > kPageBytes || o.memory_alignment > kPageBytes) {
        throw std::invalid_argument(
            "reading needs 1 to 256 threads, blocks of whole pages, and alignments that divide a page");
    }
    for (std::size_t i = 0; i < ranges_.size(); ++i) {
        const ReadRange& range = ranges_[i];
        if (range.file_offset > (1ull << 62) || range.size_bytes > (1ull << 62)) {
            throw std::invalid_argument("range " + std::to_string(i) + " lies beyond every file");
        }
        if (o.granule_bytes != 0) {
            const std::uint64_t count = (range.size_bytes + o.granule_bytes - 1) / o.granule_bytes;
            if (count > o.granule_slots || range.granule_slot > o.granule_slots - count) {
                throw std::invalid_argument("range " + std::to_string(i) + ": granules outside the granule table");
            }
        }
    }
}

// Cuts the file into blocks on a fixed grid and puts neighbouring parts of ranges into one read.
void Reader::plan() {
    std::vector<std::size_t> order(ranges_.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [this](std::size_t a, std::size_t b) {
        return ranges_[a].file_offset < ranges_[b].file_offset;
    });
    const std::uint64_t block = options_.block_bytes;
    for (const std::size_t range : order) {
        std::uint64_t at = ranges_[range].file_offset;
        const std::uint64_t end = at + ranges_[range].size_bytes;
        while (at < end) {
            const std::uint64_t until = std::min(end, (at / block + 1) * block);
            const bool joins = !chunks_.empty() && at >= chunks_.back().end &&
                               at - chunks_.back().end <= options_.max_gap_bytes &&
                               at / block == chunks_.back().begin / block;
            if (!joins) {
                chunks_.push_back({at, until, parts_.size(), parts_.size()});
            }
            parts_.push_back({range, at, until});
            chunks_.back().end = until;
            chunks_.back().last_part = parts_.size();
            at = until;
        }
    }
}

// The stretch of a part that is read straight to where it belongs; empty (begin = end) where there is none.
Part Reader::live_part(const Part& part, bool direct) const {
    const ReadRange& range = ranges_[part.range];
    const std::uint64_t unit = unit_bytes(direct);
    const std::uint64_t begin = (part.begin + unit - 1) / unit * unit;
    const std::uint64_t end = part.end / unit * unit;
    const bool congruent = !direct || (range.address - range.file_offset) % options_.memory_alignment == 0;
    if (range.address == 0 || !congruent || begin >= end || end - begin < options_.min_live_bytes) {
        return {part.range, part.begin, part.begin};
    }
    return {part.range, begin, end};
}

std::optional<IoError> Reader::fetch(const Chunk& chunk, std::uint8_t* buffer, bool direct) {
    const std::uint64_t unit = unit_bytes(direct);
    const std::uint64_t base = chunk.begin / kPageBytes * kPageBytes;
    const std::uint64_t begin = chunk.begin / unit * unit;
    const std::uint64_t end = (chunk.end + unit - 1) / unit * unit;
    std::vector<iovec> vectors;
    std::uint64_t at = begin;
    const auto bounce_until = [&](std::uint64_t until) {
        if (until > at) {
            vectors.push_back({buffer + (at - base), static_cast<std::size_t>(until - at)});
        }
    };
    for (std::size_t i = chunk.first_part; i < chunk.last_part; ++i) {
        const Part live = live_part(parts_[i], direct);
        if (live.begin < live.end) {
            bounce_until(live.begin);
            const ReadRange& range = ranges_[live.range];
            vectors.push_back({reinterpret_cast<void*>(range.address + (live.begin - range.file_offset)),
                               static_cast<std::size_t>(live.end - live.begin)});
            at = live.end;
        }
    }
    bounce_until(end);
    std::uint64_t got = 0;
    auto error = read_until_end(direct ? files_.direct : files_.buffered, vectors, begin,
                                direct ? options_.offset_alignment : 1, got);
    if (!error.has_value() && begin + got < chunk.end) {
        return IoError{0, "end of file", begin + got,
                       "the file ends at byte " + std::to_string(begin + got) + ", before byte " +
                           std::to_string(chunk.end) + " that was to be read"};
    }
    return error;
}

void Reader::digest(std::size_t range, std::uint64_t local, std::uint64_t size, const std::uint8_t* source,
                    std::uint8_t* target) {
    const std::uint64_t raw =
        target == nullptr ? crc_digest(source, size) : crc_copy_digest(target, source, size);
    if (options_.granule_bytes == 0) {
        digests_[range].fetch_xor(crc_shift(raw, ranges_[range].size_bytes - local - size),
                                  std::memory_order_relaxed);
        return;
    }
    const std::uint64_t granule = local / options_.granule_bytes;
    const std::uint64_t granule_end = std::min((granule + 1) * options_.granule_bytes, ranges_[range].size_bytes);
    granules_[ranges_[range].granule_slot + granule].fetch_xor(crc_shift(raw, granule_end - local - size),
                                                               std::memory_order_relaxed);
}

// Digests local bytes [local, local + size) of a range and copies them to `target` unless that is nullptr.
void Reader::take(std::size_t range, std::uint64_t local, std::uint64_t size, const std::uint8_t* source,
                  std::uint8_t* target) {
    while (size > 0) {
        std::uint64_t step = size;
        if (options_.granule_bytes != 0) {
            step = std::min(size, options_.granule_bytes - local % options_.granule_bytes);
        }
        digest(range, local, step, source, target);
        local += step;
        source += step;
        target += target == nullptr ? 0 : step;
        size -= step;
    }
}

void Reader::deliver(const Part& part, const std::uint8_t* buffer, std::uint64_t base, bool direct) {
    const ReadRange& range = ranges_[part.range];
    const Part live = live_part(part, direct);
    auto* const target = reinterpret_cast<std::uint8_t*>(range.address);
    const auto bounced = [&](std::uint64_t begin, std::uint64_t end) {
        if (begin < end) {
            const std::uint64_t local = begin - range.file_offset;
            take(part.range, local, end - begin, buffer + (begin - base), target == nullptr ? nullptr : target + local);
        }
    };
    bounced(part.begin, live.begin);
    if (live.begin < live.end) {
        const std::uint64_t local = live.begin - range.file_offset;
        take(part.range, local, live.end - live.begin, target + local, nullptr);
    }
    bounced(live.end, part.end);
}

std::optional<IoError> Reader::read_chunk(const Chunk& chunk, std::uint8_t* buffer) {
    bool direct = files_.direct >= 0 && !direct_refused_.load(std::memory_order_relaxed);
    auto error = fetch(chunk, buffer, direct);
    if (direct && error.has_value() && error->code == EINVAL && files_.buffered >= 0) {
        direct_refused_.store(true, std::memory_order_relaxed);
        direct = false;
        error = fetch(chunk, buffer, false);
    }
    if (!error.has_value()) {
        for (std::size_t i = chunk.first_part; i < chunk.last_part; ++i) {
            deliver(parts_[i], buffer, chunk.begin / kPageBytes * kPageBytes, direct);
        }
    }
    return error;
}

void Reader::fail(const Chunk& chunk, IoError error) {
    stop_.store(true, std::memory_order_relaxed);
    MutexLock lock(error_mutex_);
    if (error_.has_value() && error_->offset <= error.offset) {
        return;
    }
    failed_range_ = parts_[chunk.first_part].range;
    for (std::size_t i = chunk.first_part; i < chunk.last_part; ++i) {
        if (parts_[i].end > error.offset) {
            failed_range_ = parts_[i].range;
            break;
        }
    }
    error_ = std::move(error);
}

void Reader::work() {
    const std::size_t size = options_.block_bytes;
    BouncePool::Buffer buffer(nullptr, &std::free);
    while (!stop_.load(std::memory_order_relaxed)) {
        const std::size_t index = next_chunk_.fetch_add(1, std::memory_order_relaxed);
        if (index >= chunks_.size()) {
            break;
        }
        try {
            if (buffer == nullptr) {
                buffer = bounce_pool().acquire(size);
            }
            if (auto error = read_chunk(chunks_[index], buffer.get())) {
                fail(chunks_[index], std::move(*error));
            }
        } catch (const std::bad_alloc&) {
            fail(chunks_[index], {ENOMEM, "allocation", chunks_[index].begin, "out of memory while reading"});
        }
    }
    if (buffer != nullptr) {
        bounce_pool().release(std::move(buffer), size);
    }
}

std::vector<std::uint64_t> Reader::range_digests() const {
    std::vector<std::uint64_t> values(ranges_.size());
    const std::uint64_t granule_power = crc_byte_power(options_.granule_bytes);
    for (std::size_t i = 0; i < ranges_.size(); ++i) {
        if (options_.granule_bytes == 0) {
            values[i] = digests_[i].load(std::memory_order_relaxed);
            continue;
        }
        const std::uint64_t count = (ranges_[i].size_bytes + options_.granule_bytes - 1) / options_.granule_bytes;
        for (std::uint64_t granule = 0; granule < count; ++granule) {
            const std::uint64_t raw = granules_[ranges_[i].granule_slot + granule].load(std::memory_order_relaxed);
            const bool last = granule + 1 == count;
            values[i] = (last ? crc_shift(values[i], ranges_[i].size_bytes - granule * options_.granule_bytes)
                              : crc_multiply(values[i], granule_power)) ^
                        raw;
        }
    }
    return values;
}

ReadResult Reader::run() {
    const auto threads = std::min<std::size_t>(static_cast<std::size_t>(options_.threads), chunks_.size());
    {
        std::vector<std::jthread> helpers;
        try {
            for (std::size_t i = 1; i < threads; ++i) {
                helpers.emplace_back([this] { work(); });
            }
        } catch (const std::system_error&) {
            // No more threads are granted: those that there are do it all.
        }
        work();
    }
    ReadResult result;
    result.digests = range_digests();
    result.granules.resize(options_.granule_slots);
    for (std::size_t slot = 0; slot < result.granules.size(); ++slot) {
        result.granules[slot] = granules_[slot].load(std::memory_order_relaxed);
    }
    result.direct_refused = direct_refused_.load(std::memory_order_relaxed);
    MutexLock lock(error_mutex_);
    result.error = error_;
    result.failed_range = failed_range_;
    return result;
}

}  // namespace

ReadResult read_ranges(const FilePair& files, std::span<const ReadRange> ranges, const ReadOptions& options) {
    return Reader(files, ranges, options).run();
}

}  // namespace ckpt
