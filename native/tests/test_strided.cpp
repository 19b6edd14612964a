#include <cstring>

#include "check.hpp"
#include "strided.hpp"

namespace ckpt::test {
namespace {

struct Case {
    std::size_t item_bytes;
    std::vector<Dim> dims;
    std::vector<std::int64_t> offsets;  // of every item, in row-major order
    std::int64_t low;                   // lowest offset touched
    std::int64_t high;                  // one past the highest
};

Case random_case(Random& random, bool repeat) {
    constexpr std::size_t items[] = {1, 2, 4, 8, 16, 3, 12};
    Case result{items[below(random, 7)], {}, {0}, 0, 0};
    const std::size_t rank = below(random, 5);
    std::vector<std::int64_t> strides;
    auto span = static_cast<std::int64_t>(result.item_bytes);
    for (std::size_t i = 0; i < rank; ++i) {
        const auto count = static_cast<std::int64_t>(1 + below(random, 6));
        std::int64_t stride = span + static_cast<std::int64_t>(below(random, 2) * below(random, 30));
        span += stride * (count - 1);
        stride = below(random, 5) == 0 ? -stride : stride;
        stride = repeat && below(random, 5) == 0 ? 0 : stride;
        result.dims.push_back({count, stride});
    }
    std::shuffle(result.dims.begin(), result.dims.end(), random);
    for (const Dim& dim : result.dims) {
        std::vector<std::int64_t> next;
        for (const std::int64_t offset : result.offsets) {
            for (std::int64_t i = 0; i < dim.count; ++i) {
                next.push_back(offset + i * dim.stride_bytes);
            }
        }
        result.offsets = next;
    }
    result.low = *std::min_element(result.offsets.begin(), result.offsets.end());
    result.high = *std::max_element(result.offsets.begin(), result.offsets.end()) +
                  static_cast<std::int64_t>(result.item_bytes);
    return result;
}

CKPT_TEST(gather_takes_items_in_row_major_order) {
    Random random(4);
    for (int round = 0; round < 500; ++round) {
        const Case c = random_case(random, true);
        const auto memory = random_bytes(random, static_cast<std::size_t>(c.high - c.low));
        const std::uint8_t* base = memory.data() - c.low;
        std::vector<std::uint8_t> expected;
        for (const std::int64_t offset : c.offsets) {
            expected.insert(expected.end(), base + offset, base + offset + c.item_bytes);
        }
        const StridedRegion region(c.item_bytes, c.dims);
        EXPECT_EQ(region.size_bytes(), expected.size());
        for (int part = 0; part < 8; ++part) {
            const std::size_t begin = part == 0 ? 0 : below(random, expected.size() + 1);
            const std::size_t end = part == 0 ? expected.size() : begin + below(random, expected.size() - begin + 1);
            std::vector<std::uint8_t> packed(end - begin);
            region.gather(packed.data(), base, begin, end);
            EXPECT(std::equal(packed.begin(), packed.end(), expected.begin() + static_cast<std::ptrdiff_t>(begin)));
        }
    }
}

CKPT_TEST(scatter_undoes_gather_and_touches_nothing_else) {
    Random random(5);
    for (int round = 0; round < 500; ++round) {
        const Case c = random_case(random, false);
        const auto size = static_cast<std::size_t>(c.high - c.low);
        const StridedRegion region(c.item_bytes, c.dims);
        const auto packed = random_bytes(random, region.size_bytes());
        const std::size_t begin = below(random, packed.size() + 1);
        const std::size_t end = begin + below(random, packed.size() - begin + 1);
        std::vector<std::uint8_t> memory(size, 0x5A);
        std::vector<std::uint8_t> expected(size, 0x5A);
        for (std::size_t at = begin; at < end; ++at) {
            const std::int64_t offset = c.offsets[at / c.item_bytes] - c.low;
            expected[static_cast<std::size_t>(offset) + at % c.item_bytes] = packed[at];
        }
        region.scatter(memory.data() - c.low, packed.data() + begin, begin, end);
        EXPECT(memory == expected);
    }
}

CKPT_TEST(regions_merge_what_is_contiguous) {
    const Dim plain[] = {{3, 20}, {1, 999}, {5, 4}};
    EXPECT(StridedRegion(4, plain).contiguous());
    const Dim transposed[] = {{3, 4}, {5, 12}};
    EXPECT_EQ(StridedRegion(4, transposed).dims().size(), 2u);
    const Dim empty[] = {{3, 4}, {0, 12}};
    EXPECT_EQ(StridedRegion(4, empty).size_bytes(), 0u);
}

CKPT_TEST(regions_refuse_nonsense) {
    const Dim negative[] = {{-1, 4}};
    EXPECT_THROWS(std::invalid_argument, StridedRegion(4, negative));
    const Dim huge[] = {{1ll << 40, 4}, {1ll << 40, 4}};
    EXPECT_THROWS(std::invalid_argument, StridedRegion(4, huge));
    EXPECT_THROWS(std::invalid_argument, StridedRegion(0, {}));
}

}  // namespace
}  // namespace ckpt::test
