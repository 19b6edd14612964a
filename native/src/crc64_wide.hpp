// Folding with several residues of 16 bytes in one wide register, written once over the operations of its width.
// Internal linkage, see crc64_fold.hpp.
#pragma once

#include <immintrin.h>

#include "crc64_backends.hpp"
#include "crc64_fold.hpp"
#include "sse_ops.hpp"

namespace ckpt {
namespace {

// W: Reg; kBytes; load, store, broadcast (of one residue), move (residues, constants, next), merge (to one residue).
template <typename W>
struct WideFold {
    using Reg = typename W::Reg;
    static constexpr std::size_t kBlock = 256;
    static constexpr std::size_t kLanes = kBlock / W::kBytes;

    template <std::uint64_t Bytes>
    static Reg constants() noexcept {
        return W::broadcast(Sse::make(kPowerOfX<8 * Bytes + 63>, kPowerOfX<8 * Bytes - 1>));
    }

    template <bool Copy>
    static Reg take(std::uint8_t*& target, const std::uint8_t*& data, std::size_t& size) noexcept {
        const Reg loaded = W::load(data);
        if constexpr (Copy) {
            W::store(target, loaded);
            target += W::kBytes;
        }
        data += W::kBytes;
        size -= W::kBytes;
        return loaded;
    }

    template <bool Copy>
    static __m128i residue(std::uint8_t* target, const std::uint8_t* data, std::size_t size) noexcept {
        if (size < 128) {
            return Fold<Sse>::residue<Copy>(target, data, size);
        }
        const Reg near = constants<W::kBytes>();
        Reg all;
        if (size < 2 * kBlock) {
            all = take<Copy>(target, data, size);
        } else {
            Reg lanes[kLanes];
            for (Reg& lane : lanes) {
                lane = take<Copy>(target, data, size);
            }
            const Reg far = constants<kBlock>();
            while (size >= kBlock) {
                for (Reg& lane : lanes) {
                    lane = W::move(lane, far, take<Copy>(target, data, size));
                }
            }
            all = lanes[0];
            for (std::size_t lane = 1; lane < kLanes; ++lane) {
                all = W::move(all, near, lanes[lane]);
            }
        }
        while (size >= W::kBytes) {
            all = W::move(all, near, take<Copy>(target, data, size));
        }
        return Fold<Sse>::append<Copy>(W::merge(all), target, data, size);
    }
};

}  // namespace
}  // namespace ckpt
