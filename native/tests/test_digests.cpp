#include "check.hpp"
#include "crc64.hpp"
#include "runs.hpp"

namespace ckpt::test {
namespace {

const char* const kBackends[] = {"table", "clmul", "vpclmul256", "vpclmul"};

// Runs `body` on every backend that this machine has, and leaves the fastest one chosen.
template <typename Body>
void on_every_backend(Body&& body) {
    const std::string best = crc_backend().name;
    for (const char* name : kBackends) {
        if (select_crc_backend(name)) {
            body();
        }
    }
    EXPECT(select_crc_backend(best.c_str()));
}

CKPT_TEST(digest_of_the_standard_check_string) {
    const auto* text = reinterpret_cast<const std::uint8_t*>("123456789");
    EXPECT_EQ(slow_crc(text, 9, ~0ull) ^ ~0ull, 0xAE8B14860A799888ull);  // the oracle itself
    on_every_backend([&] {
        EXPECT_EQ(crc_digest(text, 9) ^ crc_shift(~0ull, 9) ^ ~0ull, 0xAE8B14860A799888ull);
    });
}

CKPT_TEST(digests_of_every_length_and_offset_are_those_of_the_definition) {
    Random random(1);
    const auto data = random_bytes(random, 4200);
    on_every_backend([&] {
        for (std::size_t size = 0; size < 1100; ++size) {
            const std::size_t offset = size % 17;
            const std::uint64_t expected = slow_crc(data.data() + offset, size);
            EXPECT_EQ(crc_digest(data.data() + offset, size), expected);
            std::vector<std::uint8_t> copy(size + 1, 0xAA);
            EXPECT_EQ(crc_copy_digest(copy.data(), data.data() + offset, size), expected);
            EXPECT(std::equal(copy.begin(), copy.end() - 1, data.begin() + static_cast<std::ptrdiff_t>(offset)));
            EXPECT_EQ(int{copy.back()}, 0xAA);
        }
        EXPECT_EQ(crc_digest(data.data(), 4200), slow_crc(data.data(), 4200));
    });
}

CKPT_TEST(digests_concatenate) {
    Random random(2);
    const auto data = random_bytes(random, 3000);
    on_every_backend([&] {
        for (int i = 0; i < 200; ++i) {
            const std::size_t cut = below(random, data.size() + 1);
            EXPECT_EQ(crc_shift(crc_digest(data.data(), cut), data.size() - cut) ^
                          crc_digest(data.data() + cut, data.size() - cut),
                      slow_crc(data.data(), data.size()));
        }
        EXPECT_EQ(crc_shift(1ull << 63, 1ull << 40), crc_byte_power(1ull << 40));
        EXPECT_EQ(crc_shift(crc_shift(0x1234567890ABCDEFull, 1ull << 33), 7), crc_shift(0x1234567890ABCDEFull, (1ull << 33) + 7));
    });
}

// A box is worth what the whole tensor is worth with everything outside the box set to zero.
CKPT_TEST(positioned_runs_are_the_digest_of_the_tensor_with_zeros_elsewhere) {
    Random random(3);
    on_every_backend([&] {
        for (int round = 0; round < 300; ++round) {
            const std::size_t rank = below(random, 4);
            std::vector<Dim> dims(rank);
            std::size_t run_bytes = 1 + below(random, round % 3 == 0 ? 200 : 9);
            std::size_t span = run_bytes;
            for (std::size_t dim = rank; dim-- > 0;) {
                const std::size_t stride = span + below(random, 3) * below(random, 40);
                dims[dim] = {static_cast<std::int64_t>(1 + below(random, 6)), static_cast<std::int64_t>(stride)};
                span += stride * static_cast<std::size_t>(dims[dim].count - 1);
            }
            const std::size_t follow = below(random, 100);
            const PositionedRuns runs(run_bytes, dims, follow);
            std::vector<std::size_t> starts{0};
            for (const Dim& dim : dims) {
                std::vector<std::size_t> next;
                for (const std::size_t start : starts) {
                    for (std::int64_t i = 0; i < dim.count; ++i) {
                        next.push_back(start + static_cast<std::size_t>(i * dim.stride_bytes));
                    }
                }
                starts = next;
            }
            EXPECT_EQ(runs.size_bytes(), starts.size() * run_bytes);
            const auto local = random_bytes(random, runs.size_bytes());
            std::vector<std::uint8_t> tensor(span + follow);
            for (std::size_t i = 0; i < local.size(); ++i) {
                tensor[starts[i / run_bytes] + i % run_bytes] = local[i];
            }
            const std::uint64_t expected = slow_crc(tensor.data(), tensor.size());
            std::uint64_t in_parts = 0;
            for (std::size_t begin = 0; begin < local.size();) {
                const std::size_t end = begin + 1 + below(random, local.size() - begin);
                in_parts ^= runs.contribution(local.data() + begin, begin, end);
                begin = end;
            }
            EXPECT_EQ(runs.contribution(local.data(), 0, local.size()), expected);
            EXPECT_EQ(in_parts, expected);
        }
    });
}

CKPT_TEST(positioned_runs_refuse_overlap) {
    const Dim overlapping[] = {{4, 7}};
    EXPECT_THROWS(std::invalid_argument, PositionedRuns(8, overlapping, 0));
    const Dim descending[] = {{4, -16}};
    EXPECT_THROWS(std::invalid_argument, PositionedRuns(8, descending, 0));
    const Dim huge[] = {{1ll << 62, 1ll << 62}};
    EXPECT_THROWS(std::invalid_argument, PositionedRuns(8, huge, 0));
    EXPECT_THROWS(std::invalid_argument, PositionedRuns(0, {}, 0));
}

}  // namespace
}  // namespace ckpt::test
