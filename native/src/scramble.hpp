// Numbers without a pattern, made from numbers with one (splitmix64).
#pragma once

#include <cstdint>

namespace ckpt {

inline std::uint64_t scramble(std::uint64_t value) noexcept {
    value += 0x9E3779B97F4A7C15ull;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
    return value ^ (value >> 31);
}

}  // namespace ckpt
