#include "crc64.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <iterator>

#include "crc64_backends.hpp"
#include "gf64.hpp"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace ckpt {
namespace {

static_assert(std::endian::native == std::endian::little, "digests and the file format are little-endian");

constexpr int kSlices = 16;
using Tables = std::array<std::array<std::uint64_t, 256>, kSlices>;

constexpr Tables make_tables() {
    Tables tables{};
    for (std::uint64_t byte = 0; byte < 256; ++byte) {
        std::uint64_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) {
            crc = gf_times_x(crc);
        }
        tables[0][byte] = crc;
    }
    for (int slice = 1; slice < kSlices; ++slice) {
        for (std::size_t byte = 0; byte < 256; ++byte) {
            const std::uint64_t before = tables[slice - 1][byte];
            tables[slice][byte] = (before >> 8) ^ tables[0][before & 0xFF];
        }
    }
    return tables;
}

const Tables kTables = make_tables();

std::uint64_t table_digest(const std::uint8_t* data, std::size_t size) {
    std::uint64_t crc = 0;
    for (; size >= kSlices; size -= kSlices, data += kSlices) {
        std::uint64_t first;
        std::uint64_t second;
        std::memcpy(&first, data, 8);
        std::memcpy(&second, data + 8, 8);
        first ^= crc;
        crc = 0;
        for (std::size_t byte = 0; byte < 8; ++byte) {
            crc ^= kTables[15 - byte][(first >> (8 * byte)) & 0xFF];
            crc ^= kTables[7 - byte][(second >> (8 * byte)) & 0xFF];
        }
    }
    for (; size > 0; --size, ++data) {
        crc = (crc >> 8) ^ kTables[0][(crc ^ *data) & 0xFF];
    }
    return crc;
}

std::uint64_t table_copy_digest(std::uint8_t* target, const std::uint8_t* data, std::size_t size) {
    std::memcpy(target, data, size);
    return table_digest(target, size);
}

std::uint64_t table_digest_runs(const std::uint8_t* data, std::size_t run_bytes, std::size_t count,
                                const RunStep& step) {
    std::uint64_t sum = 0;
    for (std::size_t run = 0; run < count; ++run, data += run_bytes) {
        sum = gf_multiply(sum, step.advance) ^ table_digest(data, run_bytes);
    }
    return sum;
}

#if defined(__x86_64__)
[[maybe_unused]] bool has_clmul() noexcept { return __builtin_cpu_supports("pclmul") != 0 && __builtin_cpu_supports("sse4.1") != 0; }
[[maybe_unused]] bool has_vpclmul256() noexcept {
    return __builtin_cpu_supports("vpclmulqdq") != 0 && __builtin_cpu_supports("avx2") != 0 && has_clmul();
}
[[maybe_unused]] bool has_vpclmul() noexcept {
    return has_vpclmul256() && __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512dq") != 0;
}
#elif defined(__aarch64__) && defined(__linux__)
bool has_clmul() noexcept { return (getauxval(AT_HWCAP) & HWCAP_PMULL) != 0; }
#else
[[maybe_unused]] bool has_clmul() noexcept { return true; }  // a backend that is built runs
#endif
bool has_table() noexcept { return true; }

struct Candidate {
    const CrcBackend* backend;
    bool (*runs_here)() noexcept;
};

// What this build contains, the fastest first.
constexpr Candidate kCandidates[] = {
#if defined(CKPT_HAVE_VPCLMUL)
    {&kVpclmulCrc, has_vpclmul},
#endif
#if defined(CKPT_HAVE_VPCLMUL256)
    {&kVpclmul256Crc, has_vpclmul256},
#endif
#if defined(CKPT_HAVE_CLMUL)
    {&kClmulCrc, has_clmul},
#endif
    {&kTableCrc, has_table},
};

const CrcBackend* best_backend() noexcept {
    return std::find_if(std::begin(kCandidates), std::end(kCandidates),
                        [](const Candidate& candidate) { return candidate.runs_here(); })
        ->backend;
}

std::atomic<const CrcBackend*>& current_backend() noexcept {
    static std::atomic<const CrcBackend*> backend{best_backend()};
    return backend;
}

constexpr std::array<std::uint64_t, 64> make_byte_powers() {
    std::array<std::uint64_t, 64> powers{};  // x^(8 * 2^k)
    std::uint64_t power = gf_power_of_x(8);
    for (auto& entry : powers) {
        entry = power;
        power = gf_multiply(power, power);
    }
    return powers;
}

constexpr auto kBytePowers = make_byte_powers();
constexpr std::uint64_t kInverseOfX = (kPolynomial << 1) | 1;  // x * this = x^64 + (P without x^64) = 0 + 1

static_assert(gf_times_x(kInverseOfX) == kOne);

}  // namespace

const CrcBackend kTableCrc{"table", table_digest, table_copy_digest, table_digest_runs, gf_multiply};

const CrcBackend& crc_backend() noexcept { return *current_backend().load(std::memory_order_relaxed); }

bool select_crc_backend(const char* name) noexcept {
    for (const Candidate& candidate : kCandidates) {
        if (std::strcmp(name, candidate.backend->name) == 0 && candidate.runs_here()) {
            current_backend().store(candidate.backend, std::memory_order_relaxed);
            return true;
        }
    }
    return false;
}

std::uint64_t crc_byte_power(std::uint64_t bytes) noexcept {
    const auto multiply = crc_backend().multiply;
    std::uint64_t power = kOne;
    for (; bytes != 0; bytes &= bytes - 1) {
        power = multiply(power, kBytePowers[static_cast<std::size_t>(std::countr_zero(bytes))]);
    }
    return power;
}

std::uint64_t crc_shift(std::uint64_t crc, std::uint64_t bytes) noexcept {
    return crc == 0 || bytes == 0 ? crc : crc_multiply(crc, crc_byte_power(bytes));
}

RunStep crc_run_step(std::uint64_t stride_bytes) noexcept {
    const std::uint64_t advance = crc_byte_power(stride_bytes);
    return {advance, crc_multiply(advance, kPowerOfX<63>), crc_multiply(advance, kInverseOfX)};
}

}  // namespace ckpt
