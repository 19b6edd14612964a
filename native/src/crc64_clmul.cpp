// Compiled for the carry-less multiplication of the target: PCLMULQDQ on x86-64, PMULL on AArch64.
#include "crc64_backends.hpp"
#include "crc64_fold.hpp"

#if defined(__x86_64__)
#include "sse_ops.hpp"
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ckpt {
namespace {

#if defined(__x86_64__)
using Ops = Sse;
#elif defined(__aarch64__)
struct Neon {
    using Reg = uint64x2_t;
    static Reg load(const std::uint8_t* data) noexcept { return vreinterpretq_u64_u8(vld1q_u8(data)); }
    static void store(std::uint8_t* target, Reg value) noexcept { vst1q_u8(target, vreinterpretq_u8_u64(value)); }
    static Reg make(std::uint64_t low, std::uint64_t high) noexcept {
        return vcombine_u64(vcreate_u64(low), vcreate_u64(high));
    }
    static std::uint64_t low(Reg value) noexcept { return vgetq_lane_u64(value, 0); }
    static std::uint64_t high(Reg value) noexcept { return vgetq_lane_u64(value, 1); }
    static Reg exclusive_or(Reg a, Reg b) noexcept { return veorq_u64(a, b); }
    static Reg product_low(Reg a, Reg b) noexcept {
        return vreinterpretq_u64_p128(vmull_p64(static_cast<poly64_t>(low(a)), static_cast<poly64_t>(low(b))));
    }
    static Reg product_high(Reg a, Reg b) noexcept {
        return vreinterpretq_u64_p128(vmull_p64(static_cast<poly64_t>(high(a)), static_cast<poly64_t>(high(b))));
    }
};
using Ops = Neon;
#endif

using Backend = FoldBackend<Ops, Fold<Ops>>;

}  // namespace

const CrcBackend kClmulCrc{"clmul", Backend::digest, Backend::copy_digest, Backend::digest_runs, Backend::multiply};

}  // namespace ckpt
