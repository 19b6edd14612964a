#include <algorithm>
#include <cerrno>
#include <memory>
#include <vector>

#include "engine_tools.hpp"

namespace ckpt::test {
namespace {

struct Hunted {
    ScratchFile file{};
    Body body;
    std::shared_ptr<WriteJob> job;
    bool released = false;
};

// Many jobs on one small arena; writes fail, stop short and stall at random, fences come for random extents, what they
// let go is overwritten, jobs are cancelled. A job is written exactly or it is not written.
CKPT_TEST(whatever_happens_a_job_is_exact_or_void) {
    for (std::uint64_t seed = 0; seed < 12; ++seed) {
        Random random(1000 + seed);
        Engine engine(small_engine(1 + static_cast<int>(below(random, 3)), 1 + below(random, 4)));
        const FaultScope faults;
        std::vector<std::unique_ptr<Hunted>> all;
        for (int round = 0; round < 10; ++round) {
            auto one = std::make_unique<Hunted>();
            const bool direct = one->file.direct() >= 0 && below(random, 2) == 0;
            one->body = random_body(random, 1 + below(random, 25), 600000, direct, below(random, 2) == 0 ? 512 : 4096);
            const std::uint64_t nth = 1 + below(random, 30);
            switch (below(random, 6)) {
                case 0: arm_fault({.call = Call::kWrite, .nth = nth, .error = EIO}); break;
                case 1: arm_fault({.call = Call::kWrite, .nth = nth, .error = EINTR}); break;
                case 2: arm_fault({.call = Call::kWrite, .nth = nth, .short_bytes = 4096}); break;
                case 3: arm_fault({.call = Call::kWrite, .nth = nth, .delay_us = 5000}); break;
                case 4: arm_fault({.call = Call::kAllocate, .error = ENOSPC}); break;
                default: break;
            }
            one->job = engine.submit(one->body.request(files_of(one->file, direct)));
            auto some = one->body.all();
            std::shuffle(some.begin(), some.end(), random);
            some.resize(below(random, some.size() + 1));
            engine.hurry(*one->job, some);
            if (below(random, 3) == 0) {
                (void)engine.wait_captured(*one->job, some, false, true, 0.001);
            }
            if (below(random, 2) == 0) {
                one->released = engine.wait_captured(*one->job, {}, true, below(random, 2) == 0, 60) == WaitResult::kDone;
                one->body.overwrite();  // captured, or void
            }
            if (below(random, 5) == 0) {
                engine.cancel(*one->job, below(random, 2) == 0);
            }
            all.push_back(std::move(one));
        }
        int written = 0;
        for (const auto& one : all) {
            if (engine.wait_written(*one->job, 60) == WaitResult::kDone) {
                ++written;
                expect_written(engine, *one->job, one->body, one->file);
            } else {
                EXPECT(engine.state(*one->job) == JobState::kCancelled || engine.error(*one->job).has_value());
            }
        }
        EXPECT(written > 0);
        // Every buffer came back.
        disarm_faults();
        const ScratchFile last(false);
        const Body body = random_body(random, 20, 700000, false, 512);
        const auto job = engine.submit(body.request(last.both()));
        expect_written(engine, *job, body, last);
    }
}

}  // namespace
}  // namespace ckpt::test
