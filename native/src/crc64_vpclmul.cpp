// Compiled for AVX-512 with VPCLMULQDQ: four residues per register.
#include "crc64_wide.hpp"

namespace ckpt {
namespace {

struct Ops {
    using Reg = __m512i;
    static constexpr std::size_t kBytes = 64;
    static Reg load(const std::uint8_t* data) noexcept { return _mm512_loadu_si512(data); }
    static void store(std::uint8_t* target, Reg value) noexcept { _mm512_storeu_si512(target, value); }
    static Reg broadcast(__m128i value) noexcept { return _mm512_broadcast_i64x2(value); }
    static Reg move(Reg residues, Reg constants, Reg next) noexcept {
        return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(residues, constants, 0x00),
                                         _mm512_clmulepi64_epi128(residues, constants, 0x11), next, 0x96);
    }
    static __m128i merge(Reg residues) noexcept {
        __m128i all = _mm512_castsi512_si128(residues);
        all = Fold<Sse>::move_by<16>(all, _mm512_extracti64x2_epi64(residues, 1));
        all = Fold<Sse>::move_by<16>(all, _mm512_extracti64x2_epi64(residues, 2));
        return Fold<Sse>::move_by<16>(all, _mm512_extracti64x2_epi64(residues, 3));
    }
};

using Backend = FoldBackend<Sse, WideFold<Ops>>;

}  // namespace

const CrcBackend kVpclmulCrc{"vpclmul", Backend::digest, Backend::copy_digest, Backend::digest_runs,
                             Backend::multiply};

}  // namespace ckpt
