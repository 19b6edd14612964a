#include "arena.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <system_error>

namespace ckpt {
namespace {

constexpr std::size_t kHugePage = 2u << 20;

}  // namespace

Arena::Arena(std::size_t buffers, std::size_t buffer_bytes) : buffers_(buffers), buffer_bytes_(buffer_bytes) {
    std::size_t size = 0;
    if (buffers == 0 || buffer_bytes == 0 || buffer_bytes % kAlignment != 0 ||
        __builtin_mul_overflow(buffers, buffer_bytes, &size) ||
        __builtin_add_overflow(size, kHugePage, &mapped_bytes_)) {
        throw std::invalid_argument("an arena needs at least one buffer whose size is a multiple of 4096 bytes");
    }
    free_.reserve(buffers);
    mapping_ = ::mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED) {
        throw std::system_error(errno, std::generic_category(), "cannot map the arena");
    }
    const auto address = reinterpret_cast<std::uintptr_t>(mapping_);
    memory_ = reinterpret_cast<std::uint8_t*>((address + kHugePage - 1) / kHugePage * kHugePage);
    (void)::madvise(memory_, size, MADV_HUGEPAGE);  // a hint; plain pages do as well
    // A forked child has no use for it, and copy-on-write of pages under direct I/O is a trap.
    (void)::madvise(memory_, size, MADV_DONTFORK);
    for (std::size_t at = 0; at < size; at += kAlignment) {
        *static_cast<volatile std::uint8_t*>(memory_ + at) = 0;  // first touch now, not under the first save
    }
    for (std::size_t i = buffers; i-- > 0;) {
        free_.push_back(memory_ + i * buffer_bytes);
    }
}

Arena::~Arena() { ::munmap(mapping_, mapped_bytes_); }

std::uint8_t* Arena::try_acquire() noexcept {
    if (free_.empty()) {
        return nullptr;
    }
    std::uint8_t* buffer = free_.back();
    free_.pop_back();
    peak_ = std::max(peak_, buffers_ - free_.size());
    return buffer;
}

void Arena::release(std::uint8_t* buffer) noexcept { free_.push_back(buffer); }

}  // namespace ckpt
