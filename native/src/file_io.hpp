// System calls on files with their retries: EINTR, short transfers, direct I/O that the file system refuses.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace ckpt {

struct IoError {
    int code = 0;           // errno; 0 for the end of the file where more was expected
    std::string operation;  // "pwritev", "preadv", "fallocate", "fdatasync", "end of file"
    std::uint64_t offset = 0;
    std::string message;
};

// A file opened once for O_DIRECT, once without, or only one of both (-1 for the other).
struct FilePair {
    int direct = -1;
    int buffered = -1;
};

// Writes all of `vectors` (consumed) at `offset`. `alignment` is 1 for a buffered descriptor; on a direct one, a short
// write is continued from the last multiple of it.
std::optional<IoError> write_fully(int descriptor, std::vector<iovec>& vectors, std::uint64_t offset,
                                   std::size_t alignment);
// Reads until `vectors` (consumed) are full or the file ends; `got` counts the bytes. Reaching the end is no error.
std::optional<IoError> read_until_end(int descriptor, std::vector<iovec>& vectors, std::uint64_t offset,
                                      std::size_t alignment, std::uint64_t& got);
// Reserves [0, size) on disk and sets the file's size; a file system that cannot is left alone.
std::optional<IoError> reserve(int descriptor, std::uint64_t size);
// fdatasync, never retried: after a failure the kernel has dropped the dirty pages' error.
std::optional<IoError> sync_data(int descriptor);
// Asks the kernel to begin writing back a buffered range. A hint.
void start_writeback(int descriptor, std::uint64_t offset, std::uint64_t size) noexcept;
// Drops a file's clean pages from the page cache. False where the system has no such call.
bool drop_cache(int descriptor) noexcept;

struct DirectSupport {
    bool supported = false;
    std::size_t memory_alignment = 1;
    std::size_t offset_alignment = 1;
    std::string reason;  // why not
};
// What O_DIRECT wants in `directory`, found by asking statx and by writing and reading an unlinked file there.
// Throws std::system_error when no file can be made in `directory`.
DirectSupport probe_direct(const std::string& directory);

}  // namespace ckpt
