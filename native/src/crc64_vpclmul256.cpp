// Compiled for AVX2 with VPCLMULQDQ, for processors without AVX-512: two residues per register.
#include "crc64_wide.hpp"

namespace ckpt {
namespace {

struct Ops {
    using Reg = __m256i;
    static constexpr std::size_t kBytes = 32;
    static Reg load(const std::uint8_t* data) noexcept { return _mm256_loadu_si256(reinterpret_cast<const Reg*>(data)); }
    static void store(std::uint8_t* target, Reg value) noexcept {
        _mm256_storeu_si256(reinterpret_cast<Reg*>(target), value);
    }
    static Reg broadcast(__m128i value) noexcept { return _mm256_broadcastsi128_si256(value); }
    static Reg move(Reg residues, Reg constants, Reg next) noexcept {
        return _mm256_xor_si256(_mm256_xor_si256(_mm256_clmulepi64_epi128(residues, constants, 0x00),
                                                 _mm256_clmulepi64_epi128(residues, constants, 0x11)),
                                next);
    }
    static __m128i merge(Reg residues) noexcept {
        return Fold<Sse>::move_by<16>(_mm256_castsi256_si128(residues), _mm256_extracti128_si256(residues, 1));
    }
};

using Backend = FoldBackend<Sse, WideFold<Ops>>;

}  // namespace

const CrcBackend kVpclmul256Crc{"vpclmul256", Backend::digest, Backend::copy_digest, Backend::digest_runs,
                                Backend::multiply};

}  // namespace ckpt
