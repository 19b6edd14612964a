#include "witness.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>

#include "crc64.hpp"
#include "scramble.hpp"

namespace ckpt {
namespace {

constexpr std::uint64_t kLine = 64;

__extension__ using Wide = unsigned __int128;

std::uint64_t sampled(std::uint64_t address, std::uint64_t size, std::uint64_t parts, std::uint64_t random) noexcept {
    std::array<const std::uint8_t*, kMostWitnessLines> lines{};
    const std::uint64_t share = size / parts;
    const std::uint64_t larger = size % parts;  // so many parts have one byte more
    for (std::uint64_t part = 0; part < parts; ++part) {
        random = scramble(random);
        const std::uint64_t room = share + (part < larger ? 1 : 0);
        // Anywhere in the part, without a division.
        const std::uint64_t ahead = static_cast<std::uint64_t>((Wide{random} * Wide{room}) >> 64);
        // Rounded down to a whole line, but never to before the beginning.
        const std::uint64_t place = address + share * part + std::min(part, larger) + ahead;
        const std::uint64_t line = place / kLine * kLine;
        lines[part] = reinterpret_cast<const std::uint8_t*>(line < address ? address : line);
        __builtin_prefetch(lines[part]);
    }
    const std::uint64_t end = address + size;
    std::uint64_t value = 0;
    for (const std::uint8_t* line : std::span(lines).first(parts)) {
        const std::uint64_t left = end - reinterpret_cast<std::uintptr_t>(line);
        value = scramble(value ^ crc_digest(line, left < kLine ? left : kLine));
    }
    return value;
}

}  // namespace

std::vector<std::uint64_t> witnesses(std::span<const std::uint64_t> addresses, std::span<const std::uint64_t> sizes,
                                     std::uint64_t whole_bytes, std::uint64_t lines, std::uint64_t seed) {
    if (addresses.size() != sizes.size() || lines == 0 || lines > kMostWitnessLines) {
        throw std::invalid_argument("witnesses need as many addresses as sizes, and 1 to 16 lines");
    }
    std::vector<std::uint64_t> values(addresses.size());
    for (std::size_t i = 0; i < values.size(); ++i) {
        const bool whole = sizes[i] <= whole_bytes || sizes[i] < kMostWitnessLines;
        values[i] = whole ? crc_digest(reinterpret_cast<const std::uint8_t*>(addresses[i]), sizes[i])
                          : sampled(addresses[i], sizes[i], lines, scramble(seed) ^ addresses[i]);
    }
    return values;
}

}  // namespace ckpt
