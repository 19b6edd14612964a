// Arithmetic modulo the CRC-64/NVME polynomial, for constants known at compile time and as the portable path.
// Everything here has internal linkage: the including files are compiled for different instruction sets.
#pragma once

#include <cstdint>

namespace ckpt {
namespace {

inline constexpr std::uint64_t kPolynomial = 0x9A6C9329AC4BC9B5ull;  // reflected, without x^64
inline constexpr std::uint64_t kOne = 1ull << 63;

[[maybe_unused]] constexpr std::uint64_t gf_times_x(std::uint64_t a) noexcept {
    return (a >> 1) ^ ((a & 1) != 0 ? kPolynomial : 0);
}

[[maybe_unused]] constexpr std::uint64_t gf_multiply(std::uint64_t a, std::uint64_t b) noexcept {
    std::uint64_t product = 0;
    for (int bit = 63; bit >= 0; --bit) {
        product ^= ((a >> bit) & 1) != 0 ? b : 0;
        b = gf_times_x(b);
    }
    return product;
}

// x^exponent mod P.
[[maybe_unused]] constexpr std::uint64_t gf_power_of_x(std::uint64_t exponent) noexcept {
    std::uint64_t result = kOne;
    std::uint64_t square = kOne >> 1;
    for (; exponent != 0; exponent >>= 1) {
        if ((exponent & 1) != 0) {
            result = gf_multiply(result, square);
        }
        square = gf_multiply(square, square);
    }
    return result;
}

template <std::uint64_t Exponent>
inline constexpr std::uint64_t kPowerOfX = gf_power_of_x(Exponent);

// floor(x^128 / P) without its x^64 term, reflected: the quotient that Barrett's reduction needs.
[[maybe_unused]] constexpr std::uint64_t gf_barrett_quotient() noexcept {
    std::uint64_t quotient = 0;
    std::uint64_t remainder = kPolynomial;  // x^128 minus x^64 * P leaves x^64 * (P without x^64)
    for (int power = 63; power >= 0; --power) {
        // The coefficient of x^(64 + power) is the one of x^63 in what is left, stored in bit 0.
        const bool set = (remainder & 1) != 0;
        quotient |= set ? 1ull << (63 - power) : 0;
        remainder = (remainder >> 1) ^ (set ? kPolynomial : 0);
    }
    return quotient;
}

}  // namespace
}  // namespace ckpt
