#include <cerrno>
#include <cstring>

#include "engine_tools.hpp"
#include "reader.hpp"

namespace ckpt::test {
namespace {

struct Wanted {
    std::vector<std::vector<std::uint8_t>> memory;
    std::vector<ReadRange> ranges;
    std::uint64_t granule_slots = 0;
};

Wanted random_ranges(Random& random, std::size_t count, std::size_t file_bytes, std::uint64_t granule_bytes) {
    Wanted wanted;
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint64_t offset = below(random, file_bytes);
        const std::uint64_t limit = below(random, 2) == 0 ? 2000 : file_bytes - offset + 1;
        const std::uint64_t size = std::min(file_bytes - offset, below(random, limit));
        wanted.memory.emplace_back(size + 8192, std::uint8_t{0x77});
        const auto base = reinterpret_cast<std::uintptr_t>(wanted.memory.back().data());
        std::uint64_t address = base;
        if (below(random, 2) == 0) {
            address += (offset - base) % 4096;
        }
        wanted.ranges.push_back({offset, size, below(random, 8) == 0 ? 0 : address, wanted.granule_slots});
        wanted.granule_slots += (size + granule_bytes - 1) / granule_bytes;
    }
    return wanted;
}

void expect_read(const Wanted& wanted, const ReadResult& result, const std::vector<std::uint8_t>& file,
                 std::uint64_t granule_bytes) {
    EXPECT(!result.error.has_value());
    for (std::size_t i = 0; i < wanted.ranges.size(); ++i) {
        const ReadRange& range = wanted.ranges[i];
        const std::uint8_t* expected = file.data() + range.file_offset;
        EXPECT_EQ(result.digests[i], slow_crc(expected, range.size_bytes));
        if (range.address != 0) {
            const auto* got = reinterpret_cast<const std::uint8_t*>(range.address);
            EXPECT(std::equal(got, got + range.size_bytes, expected));
            const std::uint8_t* const end = wanted.memory[i].data() + wanted.memory[i].size();
            EXPECT(std::all_of(got + range.size_bytes, end, [](std::uint8_t byte) { return byte == 0x77; }));
        }
        for (std::uint64_t at = 0; granule_bytes != 0 && at < range.size_bytes; at += granule_bytes) {
            EXPECT_EQ(result.granules[range.granule_slot + at / granule_bytes],
                      slow_crc(expected + at, std::min(granule_bytes, range.size_bytes - at)));
        }
    }
}

CKPT_TEST(ranges_are_read_to_where_they_belong) {
    Random random(30);
    for (int round = 0; round < 24; ++round) {
        const ScratchFile file;
        const auto bytes = random_bytes(random, 1 + below(random, 1500000));
        file.write(bytes, 0);
        ReadOptions options;
        options.threads = 1 + static_cast<int>(below(random, 4));
        options.block_bytes = 64u << 10;
        options.memory_alignment = round % 3 == 0 ? 4096 : 512;
        options.granule_bytes = round % 2 == 0 ? 0 : 4000;
        const Wanted wanted = random_ranges(random, below(random, 12), bytes.size(), 4000);
        options.granule_slots = options.granule_bytes == 0 ? 0 : wanted.granule_slots;
        const FilePair files = round % 4 == 3 ? FilePair{-1, file.buffered()} : file.both();
        expect_read(wanted, read_ranges(files, wanted.ranges, options), bytes, options.granule_bytes);
    }
}

CKPT_TEST(short_interrupted_and_refused_reads_are_continued) {
    Random random(31);
    for (const std::int64_t short_bytes : {512, 4096, 30000}) {
        const ScratchFile file;
        const auto bytes = random_bytes(random, 1000000);
        file.write(bytes, 0);
        ReadOptions options;
        options.block_bytes = 64u << 10;
        const FaultScope faults;
        const bool direct = file.direct() >= 0 && short_bytes % 512 == 0;
        arm_fault({.call = Call::kRead, .nth = 2, .short_bytes = short_bytes});
        arm_fault({.call = Call::kRead, .nth = 5, .error = EINTR});
        arm_fault({.call = Call::kRead, .nth = 9, .error = direct ? EINVAL : EINTR});
        const Wanted wanted = random_ranges(random, 8, bytes.size(), 4000);
        const FilePair files = direct ? file.both() : FilePair{-1, file.buffered()};
        const ReadResult result = read_ranges(files, wanted.ranges, options);
        expect_read(wanted, result, bytes, 0);
    }
}

CKPT_TEST(a_short_file_and_a_bad_disk_are_told_apart) {
    Random random(32);
    const ScratchFile file;
    file.write(random_bytes(random, 100000), 0);
    std::vector<std::uint8_t> target(200000);
    const ReadRange ranges[] = {{0, 5000, reinterpret_cast<std::uintptr_t>(target.data()), 0},
                                {5000, 95001, reinterpret_cast<std::uintptr_t>(target.data() + 5000), 0}};
    for (const FilePair& files : {file.both(), FilePair{-1, file.buffered()}}) {
        const ReadResult result = read_ranges(files, ranges, {});
        EXPECT(result.error.has_value());
        EXPECT_EQ(result.error->code, 0);
        EXPECT_EQ(result.error->offset, 100000u);
        EXPECT_EQ(result.failed_range, 1u);
    }
    const FaultScope faults;
    arm_fault({.call = Call::kRead, .error = EIO, .sticky = true});
    const ReadResult result = read_ranges(file.both(), ranges, {});
    EXPECT_EQ(result.error->code, EIO);
    EXPECT_EQ(result.error->operation, "preadv");
}

CKPT_TEST(reading_refuses_nonsense) {
    const ReadRange range{UINT64_MAX, 10, 0, 0};
    const FilePair files{-1, 0};
    EXPECT_THROWS(std::invalid_argument, read_ranges(files, std::span(&range, 1), {}));
    EXPECT_THROWS(std::invalid_argument, read_ranges({-1, -1}, {}, {}));
    ReadOptions options;
    options.granule_bytes = 16;
    const ReadRange outside{0, 10, 0, 5};
    EXPECT_THROWS(std::invalid_argument, read_ranges(files, std::span(&outside, 1), options));
}

CKPT_TEST(probing_says_what_direct_io_wants) {
    const DirectSupport support = probe_direct(".");
    EXPECT(support.supported == support.reason.empty());
    EXPECT(!support.supported || (support.memory_alignment <= 4096 && support.offset_alignment <= 4096));
    EXPECT_THROWS(std::system_error, probe_direct("no-such-directory"));
}

}  // namespace
}  // namespace ckpt::test
