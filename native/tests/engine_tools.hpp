#pragma once

// What tests of the engine and of the reader have in common.

#include "fault.hpp"
#include "scratch.hpp"

namespace ckpt::test {

inline constexpr std::size_t kBuffer = 256u << 10;

inline EngineOptions small_engine(int workers, std::size_t buffers) {
    EngineOptions options;
    options.workers = workers;
    options.buffers = buffers;
    options.buffer_bytes = kBuffer;
    return options;
}

struct FaultScope {
    FaultScope() { disarm_faults(); }
    ~FaultScope() { disarm_faults(); }
};

// Direct I/O where this file system has it.
inline FilePair files_of(const ScratchFile& file, bool direct) {
    return direct ? file.both() : FilePair{-1, file.buffered()};
}

}  // namespace ckpt::test
