// Compiled for AVX-512 with VPCLMULQDQ: four residues per register.
#include <immintrin.h>

#include "crc64_backends.hpp"
#include "crc64_fold.hpp"
#include "sse_ops.hpp"

namespace ckpt {
namespace {

struct Wide {
    template <std::uint64_t Bytes>
    static __m512i constants() noexcept {
        return _mm512_broadcast_i64x2(Sse::make(kPowerOfX<8 * Bytes + 63>, kPowerOfX<8 * Bytes - 1>));
    }

    static __m512i move(__m512i residues, __m512i constants, __m512i next) noexcept {
        return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(residues, constants, 0x00),
                                         _mm512_clmulepi64_epi128(residues, constants, 0x11), next, 0x96);
    }

    template <bool Copy>
    static __m512i take(std::uint8_t* target, const std::uint8_t* data) noexcept {
        const __m512i loaded = _mm512_loadu_si512(data);
        if constexpr (Copy) {
            _mm512_storeu_si512(target, loaded);
        }
        return loaded;
    }

    static __m128i merge(__m512i residues) noexcept {
        __m128i all = _mm512_castsi512_si128(residues);
        all = Fold<Sse>::move_by<16>(all, _mm512_extracti64x2_epi64(residues, 1));
        all = Fold<Sse>::move_by<16>(all, _mm512_extracti64x2_epi64(residues, 2));
        return Fold<Sse>::move_by<16>(all, _mm512_extracti64x2_epi64(residues, 3));
    }

    template <bool Copy>
    static __m128i residue(std::uint8_t* target, const std::uint8_t* data, std::size_t size) noexcept {
        if (size < 128) {
            return Fold<Sse>::residue<Copy>(target, data, size);
        }
        __m512i all;
        if (size < 512) {
            all = take<Copy>(target, data);
            size -= 64, data += 64, target += Copy ? 64 : 0;
        } else {
            __m512i lanes[4];
            for (int lane = 0; lane < 4; ++lane) {
                lanes[lane] = take<Copy>(target + (Copy ? 64 * lane : 0), data + 64 * lane);
            }
            const __m512i far = constants<256>();
            for (size -= 256, data += 256, target += Copy ? 256 : 0; size >= 256;
                 size -= 256, data += 256, target += Copy ? 256 : 0) {
                for (int lane = 0; lane < 4; ++lane) {
                    lanes[lane] =
                        move(lanes[lane], far, take<Copy>(target + (Copy ? 64 * lane : 0), data + 64 * lane));
                }
            }
            all = move(lanes[0], constants<192>(), move(lanes[1], constants<128>(), move(lanes[2], constants<64>(),
                                                                                         lanes[3])));
        }
        for (const __m512i near = constants<64>(); size >= 64; size -= 64, data += 64, target += Copy ? 64 : 0) {
            all = move(all, near, take<Copy>(target, data));
        }
        return Fold<Sse>::append<Copy>(merge(all), target, data, size);
    }
};

using Backend = FoldBackend<Sse, Wide>;

}  // namespace

const CrcBackend kVpclmulCrc{"vpclmul", Backend::digest, Backend::copy_digest, Backend::digest_runs,
                             Backend::multiply};

}  // namespace ckpt
