// Files and write requests for tests.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"
#include "engine.hpp"

namespace ckpt::test {

// A file in the current directory that goes away with the object.
class ScratchFile {
public:
    explicit ScratchFile(bool want_direct = true) {
        std::string path = "scratch-XXXXXX";
        buffered_ = ::mkstemp(path.data());
        if (buffered_ < 0) {
            throw std::runtime_error("cannot make a scratch file");
        }
        direct_ = want_direct ? ::open(path.c_str(), O_RDWR | O_DIRECT) : -1;
        ::unlink(path.c_str());
    }
    ~ScratchFile() {
        ::close(buffered_);
        if (direct_ >= 0) {
            ::close(direct_);
        }
    }
    ScratchFile(const ScratchFile&) = delete;
    ScratchFile& operator=(const ScratchFile&) = delete;

    int buffered() const { return buffered_; }
    int direct() const { return direct_; }
    FilePair both() const { return {direct_, buffered_}; }

    std::vector<std::uint8_t> read(std::uint64_t begin, std::uint64_t end) const {
        std::vector<std::uint8_t> bytes(end - begin);
        std::size_t done = 0;
        while (done < bytes.size()) {
            const ssize_t got = ::pread(buffered_, bytes.data() + done, bytes.size() - done,
                                        static_cast<off_t>(begin + done));
            if (got <= 0) {
                throw std::runtime_error("the scratch file is too short");
            }
            done += static_cast<std::size_t>(got);
        }
        return bytes;
    }
    void write(const std::vector<std::uint8_t>& bytes, std::uint64_t offset) const {
        if (::pwrite(buffered_, bytes.data(), bytes.size(), static_cast<off_t>(offset)) !=
            static_cast<ssize_t>(bytes.size())) {
            throw std::runtime_error("cannot fill the scratch file");
        }
    }

private:
    int buffered_ = -1;
    int direct_ = -1;
};

// Random extents with the file that they must become.
struct Body {
    std::vector<std::vector<std::uint8_t>> memory;
    std::vector<Extent> extents;
    std::vector<Dim> dims;
    LayoutOptions options;
    std::vector<std::uint8_t> expected;          // file bytes [body_begin, body_end)
    std::vector<std::vector<std::uint8_t>> packed;  // each extent's own bytes

    WriteRequest request(const FilePair& files) const {
        WriteRequest request;
        request.extents = extents;
        request.dims = dims;
        request.layout = options;
        request.files = files;
        request.reserve_bytes = options.body_end;
        return request;
    }
    std::vector<std::uint32_t> all() const {
        std::vector<std::uint32_t> ids(extents.size());
        for (std::uint32_t i = 0; i < ids.size(); ++i) {
            ids[i] = i;
        }
        return ids;
    }
    // What an optimizer does once the fence has let go.
    void overwrite() {
        for (auto& bytes : memory) {
            std::fill(bytes.begin(), bytes.end(), std::uint8_t{0xEE});
        }
    }
};

Body random_body(Random& random, std::size_t extents, std::size_t largest_bytes, bool direct, std::uint64_t alignment);

// The job's file and digests are those of the body.
void expect_written(Engine& engine, WriteJob& job, const Body& body, const ScratchFile& file);

}  // namespace ckpt::test
