#include <algorithm>

#include "check.hpp"
#include "witness.hpp"

namespace ckpt::test {
namespace {

struct Memories {
    std::vector<std::vector<std::uint8_t>> bytes;
    std::vector<std::uint64_t> addresses;
    std::vector<std::uint64_t> sizes;

    std::vector<std::uint64_t> words(std::uint64_t seed, std::uint64_t whole = 4096) const {
        return witnesses(addresses, sizes, whole, 16, seed);
    }
};

Memories random_memories(Random& random, std::size_t count, std::size_t largest) {
    Memories all;
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint64_t skip = below(random, 70);
        const std::uint64_t size = below(random, below(random, 2) == 0 ? 300 : largest);
        all.bytes.push_back(random_bytes(random, size + skip));  // ends where the memory does: the sanitizer looks on
        all.addresses.push_back(reinterpret_cast<std::uintptr_t>(all.bytes.back().data()) + skip);
        all.sizes.push_back(size);
    }
    return all;
}

CKPT_TEST(witnesses_of_untouched_memory_stay_the_same) {
    Random random(50);
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
        const Memories all = random_memories(random, 30, 100000);
        for (const std::uint64_t whole : {0, 64, 4096}) {
            const auto first = all.words(seed, whole);
            EXPECT(first == all.words(seed, whole));
            // One by one as in a list.
            for (std::size_t i = 0; i < first.size(); ++i) {
                const std::uint64_t address[] = {all.addresses[i]};
                const std::uint64_t size[] = {all.sizes[i]};
                EXPECT_EQ(witnesses(address, size, whole, 16, seed).at(0), first[i]);
            }
        }
    }
    const std::uint64_t lonely[] = {0};
    EXPECT_THROWS(std::invalid_argument, witnesses(lonely, {}, 0, 16, 0));
}

CKPT_TEST(writes_to_small_memories_are_always_found) {
    Random random(51);
    Memories all = random_memories(random, 60, 4096);
    const auto before = all.words(7);
    for (std::size_t i = 0; i < all.sizes.size(); ++i) {
        if (all.sizes[i] != 0) {
            reinterpret_cast<std::uint8_t*>(all.addresses[i])[below(random, all.sizes[i])] ^= 16;
            EXPECT(all.words(7)[i] != before[i]);
        }
    }
}

CKPT_TEST(a_write_to_an_eighth_of_a_large_memory_is_always_found) {
    Random random(52);
    for (std::uint64_t seed = 0; seed < 300; ++seed) {
        std::vector<std::uint8_t> bytes(5000 + below(random, 60000));
        const std::uint64_t address[] = {reinterpret_cast<std::uintptr_t>(bytes.data())};
        const std::uint64_t size[] = {bytes.size()};
        const auto before = witnesses(address, size, 4096, 16, seed);
        const std::size_t part = bytes.size() / 8 + 1;
        const std::size_t begin = below(random, bytes.size() - part + 1);
        std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(begin), part, std::uint8_t{9});
        EXPECT(witnesses(address, size, 4096, 16, seed) != before);
    }
}

CKPT_TEST(every_byte_of_a_large_memory_is_looked_at_sooner_or_later) {
    constexpr std::size_t kSize = 20000;
    constexpr double kPart = kSize / 16.0;
    constexpr std::uint64_t kSeeds = 20000;
    std::vector<std::uint8_t> bytes(kSize);
    const std::uint64_t address[] = {reinterpret_cast<std::uintptr_t>(bytes.data())};
    const std::uint64_t size[] = {bytes.size()};
    for (const std::size_t place : {0u, 1u, 63u, 64u, 1249u, 1250u, 9999u, 19935u, 19999u}) {
        // A line that the memory's begin or end cuts is drawn as seldom as it has few bytes: how few is the allocator's
        // choice, so what is expected follows from it. Half of that is eight deviations away where it is least.
        const std::uint64_t line = (address[0] + place) / 64 * 64;
        const std::uint64_t begin = std::max(line, address[0]);
        const std::uint64_t end = std::min(line + 64, address[0] + kSize);
        const double expected = static_cast<double>(kSeeds) * static_cast<double>(end - begin) / kPart;
        std::size_t found = 0;
        for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
            bytes[place] = 0;
            const auto before = witnesses(address, size, 4096, 16, seed);
            bytes[place] = 1;
            found += witnesses(address, size, 4096, 16, seed) != before ? 1 : 0;
        }
        EXPECT(static_cast<double>(found) > expected / 2);
    }
}

}  // namespace
}  // namespace ckpt::test
