#include "file_io.hpp"

#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <system_error>

#include "fault.hpp"

namespace ckpt {
namespace {

constexpr int kMaxVectors = IOV_MAX;
constexpr std::size_t kMaxTransferBytes = 1u << 30;  // Linux cuts a transfer at 2 GiB less a page

IoError failed(const char* operation, int code, std::uint64_t offset) {
    return {code, operation, offset, std::generic_category().message(code)};
}

std::uint64_t total_bytes(std::span<const iovec> vectors) {
    std::uint64_t total = 0;
    for (const iovec& vector : vectors) {
        total += vector.iov_len;
    }
    return total;
}

// Removes `bytes` from the front; `first` is the index of the first vector that is not empty.
void consume(std::vector<iovec>& vectors, std::size_t& first, std::size_t bytes) {
    while (first < vectors.size() && bytes >= vectors[first].iov_len) {
        bytes -= vectors[first].iov_len;
        ++first;
    }
    if (bytes > 0) {
        vectors[first].iov_base = static_cast<std::uint8_t*>(vectors[first].iov_base) + bytes;
        vectors[first].iov_len -= bytes;
    }
}

using Transfer = ssize_t (*)(int, const iovec*, int, off_t);

ssize_t transfer_once(Call call, Transfer transfer, int descriptor, const iovec* vectors, std::size_t count,
                      std::uint64_t offset, std::size_t alignment) {
    const FaultDecision fault = consult_faults(call);
    if (fault.error != 0) {
        errno = fault.error;
        return -1;
    }
    std::vector<iovec> limited;
    if (fault.short_bytes >= 0) {
        // A device that stops in the middle of a block has been asked for whole blocks all the same.
        auto left = (static_cast<std::size_t>(fault.short_bytes) + alignment - 1) / alignment * alignment;
        for (std::size_t i = 0; i < count && left > 0; ++i) {
            limited.push_back({vectors[i].iov_base, std::min(left, vectors[i].iov_len)});
            left -= limited.back().iov_len;
        }
        if (limited.empty()) {
            return 0;
        }
        vectors = limited.data();
        count = limited.size();
    }
    std::size_t bytes = 0;
    std::size_t used = 0;
    while (used < count && used < static_cast<std::size_t>(kMaxVectors) && bytes < kMaxTransferBytes) {
        bytes += vectors[used++].iov_len;
    }
    const ssize_t moved = transfer(descriptor, vectors, static_cast<int>(used), static_cast<off_t>(offset));
    return fault.short_bytes >= 0 ? std::min<ssize_t>(moved, fault.short_bytes) : moved;
}

// Moves everything; stops at `end of file` for reads. A transfer without progress is an error for writes.
std::optional<IoError> transfer_fully(Call call, int descriptor, std::vector<iovec>& vectors, std::uint64_t offset,
                                      std::size_t alignment, std::uint64_t& done) {
    const bool writing = call == Call::kWrite;
    const Transfer transfer = writing ? static_cast<Transfer>(::pwritev) : static_cast<Transfer>(::preadv);
    const char* operation = writing ? "pwritev" : "preadv";
    const std::uint64_t total = total_bytes(vectors);
    std::size_t first = 0;
    int stalls = 0;
    for (done = 0; done < total;) {
        const ssize_t moved =
            transfer_once(call, transfer, descriptor, vectors.data() + first, vectors.size() - first, offset + done,
                          alignment);
        if (moved < 0) {
            if (errno == EINTR) {
                continue;
            }
            return failed(operation, errno, offset + done);
        }
        if (moved == 0 && !writing) {
            return std::nullopt;
        }
        auto bytes = static_cast<std::uint64_t>(moved);
        if (done + bytes < total) {
            if (!writing && bytes % alignment != 0) {  // a direct read ends unaligned only at the end of the file
                done += bytes;
                return std::nullopt;
            }
            bytes -= bytes % alignment;
        }
        stalls = bytes == 0 ? stalls + 1 : 0;
        if (stalls > 2) {
            return failed(operation, EIO, offset + done);
        }
        consume(vectors, first, static_cast<std::size_t>(bytes));
        done += bytes;
    }
    return std::nullopt;
}

struct AlignedFree {
    void operator()(std::uint8_t* memory) const noexcept { std::free(memory); }
};

class Descriptor {
public:
    explicit Descriptor(int value) : value_(value) {}
    ~Descriptor() {
        if (value_ >= 0) {
            ::close(value_);
        }
    }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int get() const { return value_; }

private:
    int value_;
};

// False when this combination of address and offset is refused.
bool direct_round_trip(int descriptor, std::uint8_t* memory, std::size_t misalignment, std::uint64_t offset,
                       std::size_t size) {
    std::uint8_t* at = memory + misalignment;
    for (std::size_t i = 0; i < size; ++i) {
        at[i] = static_cast<std::uint8_t>(i * 31 + misalignment);
    }
    if (::pwrite(descriptor, at, size, static_cast<off_t>(offset)) != static_cast<ssize_t>(size)) {
        return false;
    }
    std::memset(at, 0, size);
    if (::pread(descriptor, at, size, static_cast<off_t>(offset)) != static_cast<ssize_t>(size)) {
        return false;
    }
    for (std::size_t i = 0; i < size; ++i) {
        if (at[i] != static_cast<std::uint8_t>(i * 31 + misalignment)) {
            return false;
        }
    }
    return true;
}

struct Alignment {
    std::size_t memory;
    std::size_t offset;
};

Alignment stated_alignment([[maybe_unused]] int descriptor) {
#if defined(STATX_DIOALIGN)
    struct statx facts {};
    if (::statx(descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &facts) == 0 &&
        (facts.stx_mask & STATX_DIOALIGN) != 0 && facts.stx_dio_mem_align != 0 && facts.stx_dio_offset_align != 0) {
        return {facts.stx_dio_mem_align, facts.stx_dio_offset_align};
    }
#endif
    return {512, 512};
}

}  // namespace

std::optional<IoError> write_fully(int descriptor, std::vector<iovec>& vectors, std::uint64_t offset,
                                   std::size_t alignment) {
    std::uint64_t done = 0;
    return transfer_fully(Call::kWrite, descriptor, vectors, offset, alignment, done);
}

std::optional<IoError> read_until_end(int descriptor, std::vector<iovec>& vectors, std::uint64_t offset,
                                      std::size_t alignment, std::uint64_t& got) {
    return transfer_fully(Call::kRead, descriptor, vectors, offset, alignment, got);
}

std::optional<IoError> reserve(int descriptor, std::uint64_t size) {
    const FaultDecision fault = consult_faults(Call::kAllocate);
    for (;;) {
        const int code = fault.error != 0                                                           ? fault.error
                         : ::fallocate(descriptor, 0, 0, static_cast<off_t>(size)) == 0 ? 0
                                                                                                    : errno;
        if (code == EINTR) {
            continue;
        }
        if (code == 0 || code == EOPNOTSUPP || code == ENOSYS || code == EINVAL) {
            return std::nullopt;
        }
        return failed("fallocate", code, 0);
    }
}

std::optional<IoError> sync_data(int descriptor) {
    const FaultDecision fault = consult_faults(Call::kSync);
    const int code = fault.error != 0 ? fault.error : ::fdatasync(descriptor) == 0 ? 0 : errno;
    if (code == 0) {
        return std::nullopt;
    }
    return failed("fdatasync", code, 0);
}

void start_writeback([[maybe_unused]] int descriptor, [[maybe_unused]] std::uint64_t offset,
                     [[maybe_unused]] std::uint64_t size) noexcept {
#if defined(SYNC_FILE_RANGE_WRITE)
    (void)::sync_file_range(descriptor, static_cast<off_t>(offset), static_cast<off_t>(size), SYNC_FILE_RANGE_WRITE);
#endif
}

bool drop_cache(int descriptor) noexcept {
    return ::posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED) == 0;
}

DirectSupport probe_direct(const std::string& directory) {
    constexpr std::size_t size = 1u << 20;
    constexpr std::size_t page = 4096;
    std::string path = directory + "/.ckptengine-probe-XXXXXX";
    const Descriptor buffered(::mkostemp(path.data(), O_CLOEXEC));
    if (buffered.get() < 0) {
        throw std::system_error(errno, std::generic_category(), "cannot make a file in " + directory);
    }
    const Descriptor direct(::open(path.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC));
    const int code = errno;
    ::unlink(path.c_str());
    DirectSupport support;
    if (direct.get() < 0) {
        support.reason = "O_DIRECT refused: " + std::generic_category().message(code);
        return support;
    }
    const std::unique_ptr<std::uint8_t, AlignedFree> memory(
        static_cast<std::uint8_t*>(std::aligned_alloc(page, size + 2 * page)));
    if (memory == nullptr) {
        throw std::bad_alloc();
    }
    // statx may promise more than large requests are granted, so what it says is tried before it is believed.
    const Alignment stated = stated_alignment(direct.get());
    for (const Alignment alignment : {stated, Alignment{512, 512}, Alignment{page, page}}) {
        const std::size_t off = alignment.memory < page ? alignment.memory : 0;
        if (alignment.memory <= page && alignment.offset <= page && alignment.memory >= stated.memory &&
            alignment.offset >= stated.offset && direct_round_trip(direct.get(), memory.get(), off, 0, size) &&
            direct_round_trip(direct.get(), memory.get(), 0, alignment.offset, size)) {
            support.supported = true;
            support.memory_alignment = alignment.memory;
            support.offset_alignment = alignment.offset;
            return support;
        }
    }
    support.reason = "O_DIRECT opens but refuses aligned writes of 1 MiB";
    return support;
}

}  // namespace ckpt
