// A few bytes of live memory, digested: the same now and later unless somebody wrote there.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace ckpt {

inline constexpr std::uint64_t kMostWitnessLines = 16;

// One word for each of the memories [addresses[i], addresses[i] + sizes[i]): of all of it up to `whole_bytes`, beyond that
// of one cache line anywhere in each of `lines` equal parts, chosen by `seed`. Throws std::invalid_argument.
std::vector<std::uint64_t> witnesses(std::span<const std::uint64_t> addresses, std::span<const std::uint64_t> sizes,
                                     std::uint64_t whole_bytes, std::uint64_t lines, std::uint64_t seed);

}  // namespace ckpt
