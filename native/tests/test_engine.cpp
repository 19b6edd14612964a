#include <atomic>
#include <cerrno>
#include <thread>

#include "engine_tools.hpp"

namespace ckpt::test {
namespace {

CKPT_TEST(bodies_arrive_with_their_digests) {
    Random random(10);
    for (const std::size_t buffers : {1, 3}) {
        Engine engine(small_engine(3, buffers));
        for (int round = 0; round < 16; ++round) {
            const ScratchFile file;
            const bool direct = file.direct() >= 0 && round % 2 == 0;
            const Body body = random_body(random, 1 + below(random, 40), 900000, direct, round % 4 == 0 ? 4096 : 512);
            const auto job = engine.submit(body.request(files_of(file, direct)));
            expect_written(engine, *job, body, file);
            EXPECT(engine.progress(*job).peak_buffer_bytes <= buffers * kBuffer);
        }
    }
}

CKPT_TEST(an_empty_body_is_written_at_once) {
    Engine engine(small_engine(1, 1));
    const ScratchFile file;
    Body body;
    body.options.segment_bytes = kBuffer;
    const auto job = engine.submit(body.request(files_of(file, false)));
    EXPECT(engine.wait_written(*job, 10) == WaitResult::kDone);
    EXPECT(engine.wait_captured(*job, {}, true, true, 10) == WaitResult::kDone);
}

CKPT_TEST(what_the_fence_lets_go_may_be_overwritten) {
    Random random(11);
    for (int round = 0; round < 12; ++round) {
        Engine engine(small_engine(1 + static_cast<int>(below(random, 3)), 1 + below(random, 6)));
        const ScratchFile file;
        const bool direct = file.direct() >= 0 && round % 2 == 0;
        Body body = random_body(random, 30, 900000, direct, 512);
        const FaultScope faults;
        arm_fault({.call = Call::kWrite, .sticky = true, .delay_us = 300});
        const auto job = engine.submit(body.request(files_of(file, direct)));
        const auto ids = body.all();
        engine.hurry(*job, ids);
        EXPECT(engine.wait_captured(*job, ids, false, round % 3 != 0, 60) == WaitResult::kDone);
        body.overwrite();
        expect_written(engine, *job, body, file);
    }
}

CKPT_TEST(a_hurried_extent_overtakes) {
    Engine engine(small_engine(1, 4));
    const ScratchFile file(false);
    Random random(12);
    Body body = random_body(random, 60, 900000, false, 512);
    const FaultScope faults;
    arm_fault({.call = Call::kWrite, .sticky = true, .delay_us = 20000});
    const auto job = engine.submit(body.request(file.both()));
    const std::uint32_t last = static_cast<std::uint32_t>(body.extents.size() - 1);
    engine.hurry(*job, std::span(&last, 1));
    EXPECT(engine.wait_captured(*job, std::span(&last, 1), false, true, 60) == WaitResult::kDone);
    EXPECT(engine.state(*job) == JobState::kRunning);
    disarm_faults();
    expect_written(engine, *job, body, file);
}

CKPT_TEST(a_given_order_is_followed) {
    Engine engine(small_engine(1, 1));
    const ScratchFile file(false);
    Random random(13);
    const Body body = random_body(random, 40, 900000, false, 512);
    auto order = body.all();
    std::reverse(order.begin(), order.end());
    auto request = body.request(file.both());
    request.order = order;
    const auto job = engine.submit(request);
    expect_written(engine, *job, body, file);
    std::vector<std::uint64_t> expected;  // file offsets of segments
    for (const std::uint32_t extent : order) {
        const ByteRange range = job->layout().segments_of(body.extents[extent]);
        for (std::uint64_t i = range.begin; i < range.end; ++i) {
            const std::uint64_t begin = job->layout().segments()[i].begin;
            if (std::find(expected.begin(), expected.end(), begin) == expected.end()) {
                expected.push_back(begin);
            }
        }
    }
    std::vector<std::uint64_t> written;
    for (const TraceEvent& event : job->trace()) {
        if (event.kind == static_cast<std::int32_t>(TraceKind::kWrite)) {
            written.push_back(event.file_offset);
        }
    }
    EXPECT(expected.size() > 10 && written.size() >= expected.size());
    EXPECT(std::equal(expected.begin(), expected.end(), written.begin()));
}

CKPT_TEST(many_jobs_and_many_waiters_share_one_small_arena) {
    Random random(14);
    Engine engine(small_engine(3, 2));
    constexpr int kJobs = 6;
    std::vector<std::unique_ptr<ScratchFile>> files;
    std::vector<Body> bodies;
    std::vector<std::shared_ptr<WriteJob>> jobs;
    for (int i = 0; i < kJobs; ++i) {
        files.push_back(std::make_unique<ScratchFile>());
        bodies.push_back(random_body(random, 20, 700000, files.back()->direct() >= 0, 512));
    }
    for (int i = 0; i < kJobs; ++i) {
        jobs.push_back(engine.submit(bodies[static_cast<std::size_t>(i)].request(
            files_of(*files[static_cast<std::size_t>(i)], files[static_cast<std::size_t>(i)]->direct() >= 0))));
    }
    std::atomic<int> released{0};
    {
        std::vector<std::jthread> waiters;
        for (std::size_t i = 0; i < kJobs; ++i) {
            waiters.emplace_back([&, i] {
                const auto ids = bodies[i].all();
                engine.hurry(*jobs[i], ids);
                released += engine.wait_captured(*jobs[i], ids, false, true, 60) == WaitResult::kDone ? 1 : 0;
                bodies[i].overwrite();
            });
        }
    }
    EXPECT_EQ(released.load(), kJobs);
    for (std::size_t i = 0; i < kJobs; ++i) {
        expect_written(engine, *jobs[i], bodies[i], *files[i]);
    }
}

CKPT_TEST(short_and_interrupted_writes_are_continued) {
    Random random(15);
    for (const std::int64_t short_bytes : {1000, 4096, 70001}) {
        Engine engine(small_engine(2, 2));
        const ScratchFile file;
        const bool direct = file.direct() >= 0 && short_bytes != 1000;
        const Body body = random_body(random, 20, 300000, direct, 512);
        const FaultScope faults;
        for (std::uint64_t nth = 1; nth < 12; nth += 3) {
            arm_fault({.call = Call::kWrite, .nth = nth, .short_bytes = short_bytes});
            arm_fault({.call = Call::kWrite, .nth = nth + 1, .error = EINTR});
        }
        const auto job = engine.submit(body.request(files_of(file, direct)));
        expect_written(engine, *job, body, file);
        EXPECT(!engine.progress(*job).direct_refused);
    }
}

CKPT_TEST(a_full_disk_stops_the_job_and_not_the_engine) {
    Random random(16);
    Engine engine(small_engine(2, 2));
    const ScratchFile file(false);
    const Body body = random_body(random, 30, 900000, false, 512);
    {
        const FaultScope faults;
        arm_fault({.call = Call::kWrite, .nth = 3, .error = ENOSPC, .sticky = true});
        const auto job = engine.submit(body.request(file.both()));
        EXPECT(engine.wait_written(*job, 60) == WaitResult::kStopped);
        EXPECT(engine.wait_captured(*job, {}, true, true, 60) != WaitResult::kTimeout);
        EXPECT(engine.state(*job) == JobState::kFailed);
        const auto error = engine.error(*job);
        EXPECT(error.has_value());
        EXPECT_EQ(error->code, ENOSPC);
        EXPECT_EQ(error->operation, "pwritev");
        EXPECT(engine.sync(*job).has_value());
    }
    {
        const FaultScope faults;
        arm_fault({.call = Call::kAllocate, .error = ENOSPC});
        const auto job = engine.submit(body.request(file.both()));
        EXPECT(engine.wait_written(*job, 60) == WaitResult::kStopped);
        EXPECT_EQ(engine.error(*job)->operation, "fallocate");
        EXPECT_EQ(engine.progress(*job).written_bytes, 0u);
    }
    const auto job = engine.submit(body.request(file.both()));
    expect_written(engine, *job, body, file);
}

CKPT_TEST(a_failed_flush_is_not_retried) {
    Random random(17);
    Engine engine(small_engine(2, 2));
    const ScratchFile file(false);
    const Body body = random_body(random, 3, 30000, false, 512);
    const FaultScope faults;
    arm_fault({.call = Call::kSync, .error = EIO});
    const auto job = engine.submit(body.request(file.both()));
    EXPECT(engine.wait_written(*job, 60) == WaitResult::kDone);
    EXPECT_EQ(engine.sync(*job)->code, EIO);
    EXPECT_EQ(engine.sync(*job)->code, EIO);  // sticky, although the next fdatasync would succeed
    EXPECT(engine.state(*job) == JobState::kFailed);
}

CKPT_TEST(refused_direct_writes_go_through_the_page_cache) {
    Random random(18);
    Engine engine(small_engine(2, 2));
    const ScratchFile file;
    const FilePair files{file.direct() >= 0 ? file.direct() : file.buffered(), file.buffered()};
    const Body body = random_body(random, 20, 700000, true, 512);
    const FaultScope faults;
    arm_fault({.call = Call::kWrite, .nth = 2, .error = EINVAL});
    const auto job = engine.submit(body.request(files));
    expect_written(engine, *job, body, file);
    EXPECT(engine.progress(*job).direct_refused);
}

// The caller writes a header before and a tail after the body through the page cache; where one of their pages was
// written directly as well, the cache's copy could win. Two files in place of two descriptors of one show who wrote what.
CKPT_TEST(a_page_that_the_body_shares_is_never_written_directly) {
    Random random(23);
    Engine engine(small_engine(2, 2));
    const ScratchFile direct(false);
    const ScratchFile buffered(false);
    Body body = random_body(random, 20, 700000, true, 512);
    while (body.options.body_begin % kPage == 0 || body.options.body_end % kPage == 0) {
        body = random_body(random, 20, 700000, true, 512);
    }
    const auto job = engine.submit(body.request({direct.buffered(), buffered.buffered()}));
    EXPECT(engine.wait_written(*job, 60) == WaitResult::kDone);
    const std::uint64_t first = (body.options.body_begin + kPage - 1) / kPage * kPage;
    const std::uint64_t last = body.options.body_end / kPage * kPage;
    EXPECT_EQ(static_cast<std::uint64_t>(::lseek(direct.buffered(), 0, SEEK_END)), last);
    auto joined = buffered.read(body.options.body_begin, first);
    const auto middle = direct.read(first, last);
    const auto tail = buffered.read(last, body.options.body_end);
    const auto head = direct.read(0, first);
    EXPECT(std::all_of(head.begin(), head.end(), [](std::uint8_t byte) { return byte == 0; }));
    joined.insert(joined.end(), middle.begin(), middle.end());
    joined.insert(joined.end(), tail.begin(), tail.end());
    EXPECT(joined == body.expected);
}

CKPT_TEST(cancel_returns_when_nobody_reads_memory_any_more) {
    Random random(19);
    for (int round = 0; round < 8; ++round) {
        Engine engine(small_engine(1 + round % 2 * 2, 3));
        const ScratchFile file(false);
        auto body = std::make_unique<Body>(random_body(random, 40, 900000, false, 512));
        const FaultScope faults;
        arm_fault({.call = Call::kWrite, .sticky = true, .delay_us = 2000});
        const auto job = engine.submit(body->request(file.both()));
        const auto ids = body->all();
        engine.hurry(*job, ids);
        EXPECT(engine.wait_captured(*job, ids, false, true, 0.0005 * round) != WaitResult::kStopped);
        engine.cancel(*job);
        body.reset();  // under the address sanitizer a late reader is caught
        EXPECT(engine.state(*job) != JobState::kRunning);
        EXPECT(engine.wait_written(*job, 0) != WaitResult::kTimeout);
        disarm_faults();
        // Every buffer came back: the next job can fill the whole arena.
        const ScratchFile next_file(false);
        const Body next = random_body(random, 20, 700000, false, 512);
        const auto next_job = engine.submit(next.request(next_file.both()));
        engine.hurry(*next_job, next.all());
        EXPECT(engine.wait_captured(*next_job, {}, true, true, 10) == WaitResult::kDone);
        expect_written(engine, *next_job, next, next_file);
    }
}

CKPT_TEST(closing_wakes_every_waiter) {
    Random random(20);
    const ScratchFile file(false);
    const Body body = random_body(random, 40, 900000, false, 512);
    const FaultScope faults;
    arm_fault({.call = Call::kWrite, .sticky = true, .delay_us = 5000});
    Engine engine(small_engine(2, 2));
    const auto job = engine.submit(body.request(file.both()));
    WaitResult result = WaitResult::kDone;
    {
        const std::jthread waiter([&] { result = engine.wait_written(*job, 60); });
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        engine.close();
    }
    EXPECT(result == WaitResult::kStopped);
    EXPECT_THROWS(std::runtime_error, engine.submit(body.request(file.both())));
}

CKPT_TEST(recheck_finds_memory_that_changed) {
    Random random(21);
    Engine engine(small_engine(2, 2));
    const ScratchFile file(false);
    Body body = random_body(random, 30, 300000, false, 512);
    const auto job = engine.submit(body.request(file.both()));
    expect_written(engine, *job, body, file);
    const auto ids = body.all();
    EXPECT(job->recheck(ids, 0, 1).empty());
    EXPECT(job->recheck(ids, 3, 1).empty());
    std::size_t changed = 0;
    while (body.extents[changed].size_bytes < 100000 || body.extents[changed].source_dims != 0) {
        ++changed;
    }
    auto* bytes = reinterpret_cast<std::uint8_t*>(body.extents[changed].address);
    bytes[0] ^= 1;  // the first granule is always looked at
    EXPECT_EQ(job->recheck(ids, 2, 1).size(), 1u);
    EXPECT_EQ(job->recheck(ids, 0, 1).at(0), changed);
    bytes[0] ^= 1;
    // Every other one is in the end.
    bytes[body.extents[changed].size_bytes - 1] ^= 1;
    std::size_t found = 0;
    for (std::uint64_t seed = 0; seed < 200; ++seed) {
        found += job->recheck(ids, 2, seed).size();
    }
    EXPECT(found > 0 && found < 200);
    bytes[body.extents[changed].size_bytes - 1] ^= 1;
    bytes[body.extents[changed].size_bytes / 2] ^= 1;
    EXPECT_EQ(job->recheck(ids, 0, 1).at(0), changed);
}

CKPT_TEST(a_bandwidth_cap_holds_until_a_fence_waits) {
    Random random(22);
    EngineOptions options = small_engine(2, 2);
    options.bytes_per_second = 20u << 20;
    options.io_priority = 1;
    options.niceness = 1;
    Engine engine(options);
    const ScratchFile file(false);
    Body body = random_body(random, 1, 1, false, 512);
    body.options.body_begin = 0;
    body.options.body_end = 3u << 20;
    body.extents.clear();
    body.packed.clear();
    body.expected.assign(3u << 20, 0);
    const auto begin = Clock::now();
    const auto capped = engine.submit(body.request(file.both()));
    expect_written(engine, *capped, body, file);
    EXPECT(Clock::now() - begin > std::chrono::milliseconds(100));
}

// What a fence has lifted is not made up for afterwards: the next save would stand still until the next fence.
CKPT_TEST(a_cap_that_a_fence_lifted_leaves_no_debt) {
    Random random(24);
    EngineOptions options = small_engine(2, 4);
    options.bytes_per_second = 2u << 20;
    Engine engine(options);
    const ScratchFile file(false);
    Body body;
    body.options.segment_bytes = kBuffer;
    body.options.body_end = 8u << 20;
    body.expected.assign(8u << 20, 0x5A);
    body.memory.push_back(body.expected);
    body.packed.push_back(body.expected);
    Extent extent{};
    extent.address = reinterpret_cast<std::uintptr_t>(body.memory[0].data());
    extent.size_bytes = body.expected.size();
    extent.device = kHost;
    body.options.granule_slots = extent.size_bytes / body.options.granule_bytes;
    body.extents.push_back(extent);
    auto begin = Clock::now();
    const auto fenced = engine.submit(body.request(file.both()));
    engine.hurry(*fenced, body.all());
    EXPECT(engine.wait_captured(*fenced, body.all(), false, true, 60) == WaitResult::kDone);
    engine.cancel(*fenced);
    EXPECT(Clock::now() - begin < std::chrono::milliseconds(2000));
    body.options.body_end = 2 * kBuffer;
    body.extents[0].size_bytes = body.options.body_end;
    begin = Clock::now();
    const auto next = engine.submit(body.request(file.both()));
    EXPECT(engine.wait_written(*next, 60) == WaitResult::kDone);
    EXPECT(Clock::now() - begin < std::chrono::milliseconds(1500));
}

CKPT_TEST(a_stopped_job_keeps_nobody_waiting) {
    Random random(25);
    Engine engine(small_engine(2, 2));
    const ScratchFile file(false);
    const Body body = random_body(random, 40, 900000, false, 512);
    const FaultScope faults;
    arm_fault({.call = Call::kWrite, .sticky = true, .delay_us = 300000});
    const auto job = engine.submit(body.request(file.both()));
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    const auto begin = Clock::now();
    engine.cancel(*job, false);
    EXPECT(Clock::now() - begin < std::chrono::milliseconds(150));
    EXPECT(engine.wait_written(*job, 60) == WaitResult::kStopped);
    EXPECT(engine.state(*job) == JobState::kCancelled);
}

}  // namespace
}  // namespace ckpt::test
