// CRC-64/NVME in its raw form (initial value 0, no final xor), which is linear:
//   raw(A || B) = raw(A) * x^(8 * len(B)) xor raw(B)      (mod P)
// Values are in the reflected representation: bit 63 is the coefficient of x^0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ckpt {

// What one step of Horner's rule over runs that lie `stride` bytes apart multiplies by.
struct RunStep {
    std::uint64_t advance;    // x^(8 * stride)
    std::uint64_t fold_high;  // x^(8 * stride + 63): for the half that stands 64 powers higher
    std::uint64_t fold_low;   // x^(8 * stride - 1)
};

struct CrcBackend {
    const char* name;
    // raw CRC of `size` bytes.
    std::uint64_t (*digest)(const std::uint8_t* data, std::size_t size);
    // The same while copying to `target`; the digest is that of the bytes that were stored.
    std::uint64_t (*copy_digest)(std::uint8_t* target, const std::uint8_t* data, std::size_t size);
    // Sum over i of raw(run i) * advance^(count - 1 - i); the runs lie back to back in `data`.
    std::uint64_t (*digest_runs)(const std::uint8_t* data, std::size_t run_bytes, std::size_t count,
                                 const RunStep& step);
    std::uint64_t (*multiply)(std::uint64_t a, std::uint64_t b);
};

// The fastest backend of this processor, or the one chosen by select_crc_backend.
const CrcBackend& crc_backend() noexcept;
// "table", "clmul", "vpclmul256" or "vpclmul"; false when this build or processor lacks it. Not for use while others digest.
bool select_crc_backend(const char* name) noexcept;

inline std::uint64_t crc_digest(const void* data, std::size_t size) noexcept {
    return crc_backend().digest(static_cast<const std::uint8_t*>(data), size);
}
inline std::uint64_t crc_copy_digest(void* target, const void* data, std::size_t size) noexcept {
    return crc_backend().copy_digest(static_cast<std::uint8_t*>(target), static_cast<const std::uint8_t*>(data),
                                     size);
}
inline std::uint64_t crc_multiply(std::uint64_t a, std::uint64_t b) noexcept {
    return crc_backend().multiply(a, b);
}

// x^(8 * bytes) mod P.
std::uint64_t crc_byte_power(std::uint64_t bytes) noexcept;
// raw CRC of what `crc` digests followed by `bytes` zero bytes.
std::uint64_t crc_shift(std::uint64_t crc, std::uint64_t bytes) noexcept;
RunStep crc_run_step(std::uint64_t stride_bytes) noexcept;

}  // namespace ckpt
