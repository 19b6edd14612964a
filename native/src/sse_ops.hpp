// The 128-bit operations of crc64_fold.hpp on x86-64 with PCLMULQDQ. Internal linkage, see there.
#pragma once

#include <emmintrin.h>
#include <smmintrin.h>
#include <wmmintrin.h>

#include <cstdint>

namespace ckpt {
namespace {

struct Sse {
    using Reg = __m128i;
    static Reg load(const std::uint8_t* data) noexcept { return _mm_loadu_si128(reinterpret_cast<const Reg*>(data)); }
    static void store(std::uint8_t* target, Reg value) noexcept {
        _mm_storeu_si128(reinterpret_cast<Reg*>(target), value);
    }
    static Reg make(std::uint64_t low, std::uint64_t high) noexcept {
        return _mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low));
    }
    static std::uint64_t low(Reg value) noexcept { return static_cast<std::uint64_t>(_mm_cvtsi128_si64(value)); }
    static std::uint64_t high(Reg value) noexcept {
        return static_cast<std::uint64_t>(_mm_extract_epi64(value, 1));
    }
    static Reg exclusive_or(Reg a, Reg b) noexcept { return _mm_xor_si128(a, b); }
    static Reg product_low(Reg a, Reg b) noexcept { return _mm_clmulepi64_si128(a, b, 0x00); }
    static Reg product_high(Reg a, Reg b) noexcept { return _mm_clmulepi64_si128(a, b, 0x11); }
};

}  // namespace
}  // namespace ckpt
