// One block of host memory for the life of an engine: a fixed number of equal buffers, touched once, reused for ever.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ckpt {

class Arena {
public:
    static constexpr std::size_t kAlignment = 4096;

    // Maps and touches buffers * buffer_bytes; buffer_bytes is a multiple of kAlignment.
    // Throws std::invalid_argument or std::system_error.
    Arena(std::size_t buffers, std::size_t buffer_bytes);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // Not synchronised: the engine calls these under its lock. The buffer released last is handed out first, as its
    // pages are the likeliest to be in the cache. nullptr when all are taken.
    std::uint8_t* try_acquire() noexcept;
    void release(std::uint8_t* buffer) noexcept;

    std::size_t free_buffers() const noexcept { return free_.size(); }
    std::size_t buffers() const noexcept { return buffers_; }
    std::size_t buffer_bytes() const noexcept { return buffer_bytes_; }
    std::size_t peak_buffers() const noexcept { return peak_; }
    void reset_peak() noexcept { peak_ = buffers_ - free_.size(); }
    std::uint8_t* data() const noexcept { return memory_; }
    std::size_t size_bytes() const noexcept { return buffers_ * buffer_bytes_; }

private:
    std::size_t buffers_;
    std::size_t buffer_bytes_;
    std::uint8_t* memory_ = nullptr;
    std::size_t mapped_bytes_ = 0;
    void* mapping_ = nullptr;
    std::vector<std::uint8_t*> free_;
    std::size_t peak_ = 0;
};

}  // namespace ckpt
