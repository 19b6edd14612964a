#include <span>
#include <stdexcept>

#include "scratch.hpp"

namespace ckpt::test {
namespace {

CKPT_TEST(layouts_refuse_what_makes_no_sense) {
    LayoutOptions options;
    options.body_end = 1u << 20;
    options.granule_slots = 100;
    Extent good{};
    good.address = 4096;
    good.size_bytes = 20000;
    good.device = kHost;
    const auto layout = [&](const Extent& extent) { return JobLayout(std::span(&extent, 1), {}, options); };
    EXPECT_EQ(layout(good).segments().size(), 1u);
    const auto refused = [&](auto change) {
        Extent extent = good;
        change(extent);
        EXPECT_THROWS(std::invalid_argument, layout(extent));
    };
    refused([](Extent& e) { e.address = 0; });
    refused([](Extent& e) { e.file_offset = (1u << 20) - 19999; });
    refused([](Extent& e) { e.file_offset = UINT64_MAX - 5; });
    refused([](Extent& e) { e.size_bytes = UINT64_MAX; });
    refused([](Extent& e) { e.granule_slot = 99; });
    refused([](Extent& e) { e.granule_slot = UINT64_MAX; });
    refused([](Extent& e) { e.source_dims = 1; });
    refused([](Extent& e) { e.source_dims_begin = UINT32_MAX; e.source_dims = 2; });
    refused([](Extent& e) { e.run_bytes = 19999; });
    const Extent twice[] = {good, good};
    EXPECT_THROWS(std::invalid_argument, JobLayout(twice, {}, options));
    options.segment_bytes = 1000;
    EXPECT_THROWS(std::invalid_argument, layout(good));
}

}  // namespace
}  // namespace ckpt::test
