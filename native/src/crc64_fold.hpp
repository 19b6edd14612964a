// CRC by carry-less multiplication, written once over a small set of 128-bit operations.
//
// A residue R of 16 bytes stands for the polynomial of those bytes: raw = R * x^64 mod P. Its low half holds the bytes
// that come first, hence the higher powers. A carry-less product of two reflected 64-bit values lies one power too
// high in a reflected 128-bit register, so constants carry an exponent that is one lower.
//
// Internal linkage, because the including files are compiled for different instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "crc64.hpp"
#include "gf64.hpp"

namespace ckpt {
namespace {

// Constants that move a residue up by n bytes, for n below 16.
struct ByteMoves {
    std::uint64_t high[16];
    std::uint64_t low[16];
};

constexpr ByteMoves make_byte_moves() noexcept {
    ByteMoves moves{};
    for (std::uint64_t n = 1; n < 16; ++n) {
        moves.high[n] = gf_power_of_x(8 * n + 63);
        moves.low[n] = gf_power_of_x(8 * n - 1);
    }
    return moves;
}

inline constexpr ByteMoves kByteMoves = make_byte_moves();

template <typename Word>
Word load_word(const std::uint8_t* data) noexcept {
    Word word;
    std::memcpy(&word, data, sizeof word);
    return word;
}

// V: Reg; load, store, make(low, high), low, high, exclusive_or, product_low (low * low), product_high (high * high).
template <typename V>
struct Fold {
    using Reg = typename V::Reg;

    static Reg move(Reg residue, Reg constants, Reg next) noexcept {
        return V::exclusive_or(V::exclusive_or(V::product_low(residue, constants),
                                               V::product_high(residue, constants)),
                               next);
    }

    template <std::uint64_t Bytes>
    static Reg move_by(Reg residue, Reg next) noexcept {
        return move(residue, V::make(kPowerOfX<8 * Bytes + 63>, kPowerOfX<8 * Bytes - 1>), next);
    }

    // A residue of fewer than 16 bytes.
    static Reg short_residue(const std::uint8_t* data, std::size_t size) noexcept {
        if (size >= 8) {
            const auto first = load_word<std::uint64_t>(data);
            const auto last = load_word<std::uint64_t>(data + size - 8);
            return V::make(size == 8 ? 0 : first << (8 * (16 - size)), last);
        }
        std::uint64_t value = 0;
        if (size >= 4) {
            value = load_word<std::uint32_t>(data);
            value |= std::uint64_t{load_word<std::uint32_t>(data + size - 4)} << (8 * (size - 4));
        } else if (size > 0) {
            value = data[0];
            value |= std::uint64_t{data[size / 2]} << (8 * (size / 2));
            value |= std::uint64_t{data[size - 1]} << (8 * (size - 1));
        } else {
            return V::make(0, 0);
        }
        return V::make(0, value << (8 * (8 - size)));
    }

    // Appends fewer than 16 bytes.
    static Reg append_short(Reg residue, const std::uint8_t* data, std::size_t size) noexcept {
        if (size == 0) {
            return residue;
        }
        return move(residue, V::make(kByteMoves.high[size], kByteMoves.low[size]), short_residue(data, size));
    }

    template <bool Copy>
    static Reg take(std::uint8_t* target, const std::uint8_t* data) noexcept {
        const Reg loaded = V::load(data);
        if constexpr (Copy) {
            V::store(target, loaded);
        }
        return loaded;
    }

    // Appends whole blocks of 16 bytes and a remainder to a residue.
    template <bool Copy>
    static Reg append(Reg residue, std::uint8_t* target, const std::uint8_t* data, std::size_t size) noexcept {
        for (; size >= 16; size -= 16, data += 16, target += Copy ? 16 : 0) {
            residue = move_by<16>(residue, take<Copy>(target, data));
        }
        if constexpr (Copy) {
            std::memcpy(target, data, size);
            return append_short(residue, target, size);
        }
        return append_short(residue, data, size);
    }

    template <bool Copy>
    static Reg residue(std::uint8_t* target, const std::uint8_t* data, std::size_t size) noexcept {
        if (size < 16) {
            if constexpr (Copy) {
                std::memcpy(target, data, size);
                return short_residue(target, size);
            }
            return short_residue(data, size);
        }
        if (size < 128) {
            const Reg first = take<Copy>(target, data);
            return append<Copy>(first, target + (Copy ? 16 : 0), data + 16, size - 16);
        }
        Reg lanes[8];
        for (int lane = 0; lane < 8; ++lane) {
            lanes[lane] = take<Copy>(target + (Copy ? 16 * lane : 0), data + 16 * lane);
        }
        for (size -= 128, data += 128, target += Copy ? 128 : 0; size >= 128;
             size -= 128, data += 128, target += Copy ? 128 : 0) {
            for (int lane = 0; lane < 8; ++lane) {
                lanes[lane] =
                    move_by<128>(lanes[lane], take<Copy>(target + (Copy ? 16 * lane : 0), data + 16 * lane));
            }
        }
        Reg all = lanes[0];
        for (int lane = 1; lane < 8; ++lane) {
            all = move_by<16>(all, lanes[lane]);
        }
        return append<Copy>(all, target, data, size);
    }

    // register of degree below 128 -> remainder modulo P (Barrett).
    static std::uint64_t reduce(Reg value) noexcept {
        constexpr std::uint64_t quotient_constant = gf_barrett_quotient();
        const std::uint64_t top = V::low(value);
        const Reg estimate = V::product_low(V::make(top, 0), V::make(quotient_constant, 0));
        const std::uint64_t quotient = top ^ (V::low(estimate) << 1);
        const Reg product = V::product_low(V::make(quotient, 0), V::make(kPolynomial, 0));
        return V::high(value) ^ ((V::high(product) << 1) | (V::low(product) >> 63));
    }

    // residue -> raw CRC: residue * x^64 mod P.
    static std::uint64_t finish(Reg residue) noexcept {
        const Reg product = V::product_low(residue, V::make(kPowerOfX<127>, 0));
        return reduce(V::exclusive_or(product, V::make(V::high(residue), 0)));
    }

    static std::uint64_t multiply(std::uint64_t a, std::uint64_t b) noexcept {
        const Reg product = V::product_low(V::make(a, 0), V::make(b, 0));
        const std::uint64_t low = V::low(product);
        return reduce(V::make(low << 1, (V::high(product) << 1) | (low >> 63)));
    }
};

// R: any type with residue<Copy>(target, data, size).
template <typename V, typename R>
struct FoldBackend {
    static std::uint64_t digest(const std::uint8_t* data, std::size_t size) {
        return Fold<V>::finish(R::template residue<false>(nullptr, data, size));
    }
    static std::uint64_t copy_digest(std::uint8_t* target, const std::uint8_t* data, std::size_t size) {
        return Fold<V>::finish(R::template residue<true>(target, data, size));
    }
    static std::uint64_t digest_runs(const std::uint8_t* data, std::size_t run_bytes, std::size_t count,
                                     const RunStep& step) {
        const auto constants = V::make(step.fold_high, step.fold_low);
        auto sum = V::make(0, 0);
        for (std::size_t run = 0; run < count; ++run, data += run_bytes) {
            sum = Fold<V>::move(sum, constants, R::template residue<false>(nullptr, data, run_bytes));
        }
        return Fold<V>::finish(sum);
    }
    static std::uint64_t multiply(std::uint64_t a, std::uint64_t b) { return Fold<V>::multiply(a, b); }
};

}  // namespace
}  // namespace ckpt
