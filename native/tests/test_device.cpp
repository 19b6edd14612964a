// Capture from CUDA devices, against the stand-in runtime.
#include <dlfcn.h>

#include "cuda.hpp"
#include "scratch.hpp"

namespace ckpt::test {
namespace {

struct Fake {
    void (*launch)(void*, void (*)(void*), void*);
    int (*live_objects)();
    void (*fail_copy_after)(int);
    int (*pending)();
    int (*has_context)(int);
    void (*drop_contexts)();
};

const Fake& fake() {
    static const Fake functions = [] {
        void* library = ::dlopen(CKPT_FAKE_CUDART, RTLD_NOW | RTLD_GLOBAL);
        if (library == nullptr) {
            throw std::runtime_error(::dlerror());
        }
        return Fake{reinterpret_cast<void (*)(void*, void (*)(void*), void*)>(::dlsym(library, "fakeLaunch")),
                    reinterpret_cast<int (*)()>(::dlsym(library, "fakeLiveObjects")),
                    reinterpret_cast<void (*)(int)>(::dlsym(library, "fakeFailCopyAfter")),
                    reinterpret_cast<int (*)()>(::dlsym(library, "fakePending")),
                    reinterpret_cast<int (*)(int)>(::dlsym(library, "fakeHasContext")),
                    reinterpret_cast<void (*)()>(::dlsym(library, "fakeDropContexts"))};
    }();
    return functions;
}

EngineOptions pinned_engine(std::size_t buffers) {
    EngineOptions options;
    options.buffers = buffers;
    options.buffer_bytes = 256u << 10;
    options.pin = true;
    return options;
}

// A body whose contiguous extents lie on two devices.
Body device_body(Random& random) {
    Body body = random_body(random, 40, 900000, false, 512);
    for (Extent& extent : body.extents) {
        if (extent.source_dims == 0 && below(random, 3) != 0) {
            extent.device = static_cast<std::int32_t>(below(random, 2));
        }
    }
    return body;
}

CKPT_TEST(device_memory_is_read_only_after_its_copies_arrived) {
    Random random(40);
    EXPECT(fake().live_objects() == 0);
    EXPECT(CudaRuntime::find() != nullptr);
    for (const std::size_t buffers : {1, 3, 64}) {
        Engine engine(pinned_engine(buffers));
        EXPECT(engine.pinned());
        for (int round = 0; round < 4; ++round) {
            const ScratchFile file(false);
            Body body = device_body(random);
            const auto job = engine.submit(body.request(file.both()));
            if (round % 2 == 0) {
                const auto ids = body.all();
                engine.hurry(*job, ids);
                EXPECT(engine.wait_captured(*job, ids, false, true, 60) == WaitResult::kDone);
                EXPECT(job->recheck(ids, 0, 0).empty());
                body.overwrite();
            }
            expect_written(engine, *job, body, file);
            EXPECT(job->recheck(body.all(), 0, 0).empty() == (round % 2 != 0));
        }
    }
    EXPECT_EQ(fake().live_objects(), 0);
}

CKPT_TEST(copies_come_after_what_the_compute_stream_holds) {
    Random random(41);
    const CudaRuntime& runtime = *CudaRuntime::find();
    Engine engine(pinned_engine(2));
    const ScratchFile file(false);
    Body body = device_body(random);
    for (Extent& extent : body.extents) {
        extent.device = extent.device == kHost ? kHost : 0;
    }
    // The step that produces the values is still queued on the compute stream when the save is registered.
    auto& bytes = *std::max_element(body.memory.begin(), body.memory.end(),
                                    [](const auto& a, const auto& b) { return a.size() < b.size(); });
    const auto index = static_cast<std::size_t>(&bytes - body.memory.data());
    body.extents[index].device = 0;
    body.extents[index].source_dims = 0;
    body.packed[index].assign(body.packed[index].size(), 0x42);
    std::fill_n(body.expected.begin() +
                    static_cast<std::ptrdiff_t>(body.extents[index].file_offset - body.options.body_begin),
                body.packed[index].size(), std::uint8_t{0x42});
    void* compute = runtime.make_stream();
    fake().launch(compute, [](void* target) {
        auto& filled = *static_cast<std::vector<std::uint8_t>*>(target);
        std::fill(filled.begin(), filled.end(), std::uint8_t{0x42});
    }, &bytes);
    auto request = body.request(file.both());
    request.compute_streams = {{0, compute}};
    const auto job = engine.submit(request);
    expect_written(engine, *job, body, file);
    runtime.destroy_stream(compute);
}

CKPT_TEST(a_failing_device_stops_the_job) {
    Random random(42);
    Engine engine(pinned_engine(3));
    const ScratchFile file(false);
    const Body body = device_body(random);
    fake().fail_copy_after(3);
    const auto job = engine.submit(body.request(file.both()));
    EXPECT(engine.wait_written(*job, 60) == WaitResult::kStopped);
    EXPECT_EQ(engine.error(*job)->operation, "cudaMemcpyAsync");
    EXPECT_EQ(fake().pending(), 0);  // else a copy could arrive in a buffer that serves the next job
    fake().fail_copy_after(-1);
    const auto next = engine.submit(body.request(file.both()));
    expect_written(engine, *next, body, file);
}

CKPT_TEST(cancelling_a_device_job_leaves_nothing_behind) {
    Random random(43);
    const int before = fake().live_objects();
    for (int round = 0; round < 10; ++round) {
        Engine engine(pinned_engine(2));
        const ScratchFile file(false);
        auto body = std::make_unique<Body>(device_body(random));
        const auto job = engine.submit(body->request(file.both()));
        engine.cancel(*job);
        body.reset();
    }
    EXPECT_EQ(fake().live_objects(), before);
}

// A rank uses one device of several; whatever makes another one current, if only for a moment, takes memory of it.
CKPT_TEST(devices_that_the_process_does_not_use_stay_untouched) {
    Random random(44);
    fake().drop_contexts();
    EngineOptions options = pinned_engine(3);
    options.pin = false;
    Engine engine(options);
    const ScratchFile file(false);
    Body body = device_body(random);
    for (Extent& extent : body.extents) {
        extent.device = extent.device == kHost ? kHost : 1;
    }
    void* compute = nullptr;
    {
        const CudaDeviceScope scope(*CudaRuntime::find(), 1);
        compute = CudaRuntime::find()->make_stream();
    }
    auto request = body.request(file.both());
    request.compute_streams = {{1, compute}};
    EXPECT(!engine.pinned());
    const auto job = engine.submit(request);
    EXPECT(engine.pinned());
    expect_written(engine, *job, body, file);
    EXPECT(job->recheck(body.all(), 0, 0).empty());
    EXPECT(fake().has_context(1) != 0 && fake().has_context(0) == 0);
    CudaRuntime::find()->destroy_stream(compute);
}

}  // namespace
}  // namespace ckpt::test
