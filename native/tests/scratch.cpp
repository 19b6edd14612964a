#include "scratch.hpp"

namespace ckpt::test {

Body random_body(Random& random, std::size_t extents, std::size_t largest_bytes, bool direct,
                 std::uint64_t alignment) {
    Body body;
    body.options.segment_bytes = 256u << 10;
    body.options.memory_alignment = direct ? alignment : 1;
    body.options.offset_alignment = direct ? alignment : 1;
    body.options.body_begin = below(random, 3) * 1000;
    std::uint64_t at = body.options.body_begin;
    for (std::size_t i = 0; i < extents; ++i) {
        const bool strided = below(random, 4) == 0;
        const std::uint64_t columns = 1 + below(random, 64);
        std::uint64_t size = below(random, below(random, 3) == 0 ? largest_bytes : 3000);
        size = strided ? (size / (columns * 4)) * columns * 4 : size;
        body.memory.push_back(random_bytes(random, size + 8192));
        const std::uint64_t base = reinterpret_cast<std::uintptr_t>(body.memory.back().data());
        Extent extent{};
        extent.address = base + below(random, 8) * 64;
        extent.size_bytes = size;
        extent.device = kHost;
        std::vector<std::uint8_t> packed(size);
        const auto* source = reinterpret_cast<const std::uint8_t*>(extent.address);
        if (strided && size > 0) {  // a transposed matrix of 4-byte items
            const auto rows = static_cast<std::int64_t>(size / (columns * 4));
            const auto width = static_cast<std::int64_t>(columns);
            extent.item_bytes = 4;
            extent.source_dims_begin = static_cast<std::uint32_t>(body.dims.size());
            extent.source_dims = 2;
            body.dims.push_back({width, 4});
            body.dims.push_back({rows, 4 * width});
            for (std::int64_t column = 0; column < width; ++column) {
                for (std::int64_t row = 0; row < rows; ++row) {
                    std::copy_n(source + 4 * (row * width + column), 4,
                                packed.begin() + 4 * (column * rows + row));
                }
            }
        } else {
            std::copy_n(source, size, packed.begin());
        }
        at += below(random, 4) == 0 ? below(random, 5000) : 0;
        if (below(random, 4) != 0) {  // mostly congruent, most of those to whole pages
            at += (extent.address - at) % (below(random, 4) == 0 ? alignment : kPage);
        }
        extent.file_offset = at;
        extent.granule_slot = body.options.granule_slots;
        body.options.granule_slots += (size + body.options.granule_bytes - 1) / body.options.granule_bytes;
        if (size > 0) {  // the last `size` bytes of runs of 100 bytes, 150 apart
            extent.run_bytes = 100;
            extent.run_dims_begin = static_cast<std::uint32_t>(body.dims.size());
            extent.run_dims = 1;
            body.dims.push_back({static_cast<std::int64_t>(size / 100 + 1), 150});
            extent.run_skip_bytes = (size / 100 + 1) * 100 - size;
            extent.follow_bytes = 77;
        }
        at += size;
        body.extents.push_back(extent);
        body.packed.push_back(std::move(packed));
    }
    body.options.body_end = at + below(random, 2) * below(random, 9000);
    body.expected.resize(body.options.body_end - body.options.body_begin);
    for (std::size_t i = 0; i < extents; ++i) {
        const auto offset = static_cast<std::ptrdiff_t>(body.extents[i].file_offset - body.options.body_begin);
        std::copy(body.packed[i].begin(), body.packed[i].end(), body.expected.begin() + offset);
    }
    return body;
}

void expect_written(Engine& engine, WriteJob& job, const Body& body, const ScratchFile& file) {
    EXPECT(engine.wait_written(job, 60) == WaitResult::kDone);
    EXPECT(engine.state(job) == JobState::kWritten);
    EXPECT(!engine.error(job).has_value());
    EXPECT(!engine.sync(job).has_value());
    EXPECT(file.read(body.options.body_begin, body.options.body_end) == body.expected);
    const auto granules = job.digests().granules();
    const auto digests = job.digests().extent_digests();
    const auto contributions = job.digests().tensor_contributions();
    for (std::size_t i = 0; i < body.extents.size(); ++i) {
        const auto& bytes = body.packed[i];
        const std::uint64_t step = body.options.granule_bytes;
        for (std::uint64_t at = 0; at < bytes.size(); at += step) {
            EXPECT_EQ(granules[body.extents[i].granule_slot + at / step],
                      slow_crc(bytes.data() + at, std::min(step, bytes.size() - at)));
        }
        EXPECT_EQ(digests[i], slow_crc(bytes.data(), bytes.size()));
        std::vector<std::uint8_t> tensor;
        const std::uint64_t skip = body.extents[i].run_skip_bytes;
        for (std::size_t at = 0; at < bytes.size(); ++at) {
            tensor.resize((at + skip) / 100 * 150 + (at + skip) % 100 + 1);
            tensor.back() = bytes[at];
        }
        tensor.resize(bytes.empty() ? 0 : tensor.size() + 77);
        EXPECT_EQ(contributions[i], slow_crc(tensor.data(), tensor.size()));
    }
    const JobProgress progress = engine.progress(job);
    EXPECT_EQ(progress.written_bytes, body.expected.size());
    EXPECT(progress.written_ns >= progress.submitted_ns);
}

}  // namespace ckpt::test
