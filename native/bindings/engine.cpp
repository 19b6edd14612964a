#include "engine.hpp"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <memory>
#include <stdexcept>
#include <utility>

#include "arrays.hpp"

namespace ckpt::py {
namespace {

// An engine in a forked child has no threads and possibly a locked mutex: it is never touched there, only left alone.
class EngineHandle {
public:
    explicit EngineHandle(const EngineOptions& options)
        : engine_(std::make_unique<Engine>(options)), owner_(::getpid()) {}
    ~EngineHandle() {
        if (!usable()) {
            (void)engine_.release();
        }
    }
    EngineHandle(const EngineHandle&) = delete;
    EngineHandle& operator=(const EngineHandle&) = delete;

    bool usable() const noexcept { return ::getpid() == owner_; }
    Engine& get() const {
        if (!usable()) {
            throw std::runtime_error("this engine belongs to the process that made it; a forked child makes its own");
        }
        return *engine_;
    }

private:
    std::unique_ptr<Engine> engine_;
    pid_t owner_;
};

struct JobHandle {
    JobHandle(std::shared_ptr<EngineHandle> engine_handle, std::shared_ptr<WriteJob> write_job)
        : engine(std::move(engine_handle)), job(std::move(write_job)) {}
    ~JobHandle() {
        if (engine->usable()) {
            const nb::gil_scoped_release release;
            engine->get().cancel(*job);  // nothing reads the caller's memory once the handle is gone
        }
    }
    JobHandle(const JobHandle&) = delete;
    JobHandle& operator=(const JobHandle&) = delete;

    std::shared_ptr<EngineHandle> engine;
    std::shared_ptr<WriteJob> job;
};

std::unique_ptr<JobHandle> submit(const std::shared_ptr<EngineHandle>& engine, const Bytes& extents,
                                  const Loops& loops, int direct, int buffered, std::uint64_t body_begin,
                                  std::uint64_t body_end, std::uint64_t segment_bytes, std::uint64_t granule_bytes,
                                  std::uint64_t granule_slots, std::uint64_t memory_alignment,
                                  std::uint64_t offset_alignment, std::uint64_t min_live_bytes,
                                  std::uint64_t reserve_bytes, const Ids& order,
                                  const std::vector<std::pair<int, std::uint64_t>>& compute_streams) {
    WriteRequest request;
    request.extents = records<Extent>(extents);
    request.dims = dims(loops);
    request.layout = {body_begin,       body_end,         segment_bytes,   granule_bytes, granule_slots,
                      memory_alignment, offset_alignment, min_live_bytes};
    request.files = {direct, buffered};
    request.reserve_bytes = reserve_bytes;
    request.order = ids(order);
    for (const auto& [device, stream] : compute_streams) {
        request.compute_streams.push_back({device, reinterpret_cast<void*>(stream)});
    }
    Engine& running = engine->get();
    std::shared_ptr<WriteJob> job;
    {
        const nb::gil_scoped_release release;
        job = running.submit(request);
    }
    return std::make_unique<JobHandle>(engine, std::move(job));
}

nb::dict progress(const JobHandle& handle) {
    const JobProgress now = handle.engine->get().progress(*handle.job);
    nb::dict result;
    result["body_bytes"] = now.body_bytes;
    result["captured_bytes"] = now.captured_bytes;
    result["written_bytes"] = now.written_bytes;
    result["gathered_bytes"] = now.gathered_bytes;
    result["peak_buffer_bytes"] = now.peak_buffer_bytes;
    result["submitted_ns"] = now.submitted_ns;
    result["captured_ns"] = now.captured_ns;
    result["written_ns"] = now.written_ns;
    result["direct_refused"] = now.direct_refused;
    result["starved"] = now.starved;
    return result;
}

void bind_job(nb::module_& module) {
    nb::class_<JobHandle>(module, "WriteJob")
        .def("hurry",
             [](const JobHandle& handle, const Ids& extents) {
                 Engine& engine = handle.engine->get();
                 const nb::gil_scoped_release release;
                 engine.hurry(*handle.job, ids(extents));
             })
        .def("wait_captured",
             [](const JobHandle& handle, const Ids& extents, bool all, bool help, double timeout_s) {
                 Engine& engine = handle.engine->get();
                 const nb::gil_scoped_release release;
                 return static_cast<int>(engine.wait_captured(*handle.job, ids(extents), all, help, timeout_s));
             })
        .def("wait_written",
             [](const JobHandle& handle, double timeout_s) {
                 Engine& engine = handle.engine->get();
                 const nb::gil_scoped_release release;
                 return static_cast<int>(engine.wait_written(*handle.job, timeout_s));
             })
        .def("sync",
             [](const JobHandle& handle) {
                 Engine& engine = handle.engine->get();
                 std::optional<IoError> error;
                 {
                     const nb::gil_scoped_release release;
                     error = engine.sync(*handle.job);
                 }
                 return error_tuple(error);
             })
        .def("cancel",
             [](const JobHandle& handle) {
                 if (handle.engine->usable()) {
                     const nb::gil_scoped_release release;
                     handle.engine->get().cancel(*handle.job);
                 }
             })
        .def("stop",
             [](const JobHandle& handle) {
                 Engine& engine = handle.engine->get();
                 const nb::gil_scoped_release release;
                 engine.cancel(*handle.job, false);
             })
        .def("state", [](const JobHandle& handle) {
            return static_cast<int>(handle.engine->get().state(*handle.job));
        })
        .def("error", [](const JobHandle& handle) { return error_tuple(handle.engine->get().error(*handle.job)); })
        .def("progress", &progress)
        .def("captured",
             [](const JobHandle& handle, std::uint32_t extent) {
                 if (extent >= handle.job->layout().extents().size()) {
                     throw std::out_of_range("no such extent");
                 }
                 return handle.job->captured(extent);
             })
        .def("recheck",
             [](const JobHandle& handle, const Ids& extents, std::uint64_t samples, std::uint64_t seed) {
                 std::vector<std::uint32_t> changed;
                 {
                     const nb::gil_scoped_release release;
                     changed = handle.job->recheck(ids(extents), samples, seed);
                 }
                 return to_numpy(std::move(changed));
             })
        .def("granules", [](const JobHandle& handle) { return to_numpy(handle.job->digests().granules()); })
        .def("extent_digests",
             [](const JobHandle& handle) { return to_numpy(handle.job->digests().extent_digests()); })
        .def("tensor_contributions",
             [](const JobHandle& handle) { return to_numpy(handle.job->digests().tensor_contributions()); })
        .def("trace", [](const JobHandle& handle) { return records_to_numpy(handle.job->trace()); });
}

}  // namespace

void bind_engine(nb::module_& module);

void bind_engine(nb::module_& module) {
    nb::class_<EngineHandle>(module, "Engine")
        .def(
            "__init__",
            [](EngineHandle* self, int workers, std::size_t buffers, std::size_t buffer_bytes, bool pin,
               std::uint64_t bytes_per_second, int io_priority, int niceness) {
                const nb::gil_scoped_release release;
                new (self) EngineHandle({workers, buffers, buffer_bytes, pin, bytes_per_second, io_priority, niceness});
            },
            nb::kw_only(), nb::arg("workers"), nb::arg("buffers"), nb::arg("buffer_bytes"), nb::arg("pin"),
            nb::arg("bytes_per_second"), nb::arg("io_priority"), nb::arg("niceness"))
        .def("submit", &submit, nb::kw_only(), nb::arg("extents"), nb::arg("loops"), nb::arg("direct"),
             nb::arg("buffered"), nb::arg("body_begin"), nb::arg("body_end"), nb::arg("segment_bytes"),
             nb::arg("granule_bytes"), nb::arg("granule_slots"), nb::arg("memory_alignment"),
             nb::arg("offset_alignment"), nb::arg("min_live_bytes"), nb::arg("reserve_bytes"), nb::arg("order"),
             nb::arg("compute_streams"))
        .def("pinned", [](const EngineHandle& engine) { return engine.get().pinned(); })
        .def("close", [](EngineHandle& engine) {
            if (engine.usable()) {
                const nb::gil_scoped_release release;
                engine.get().close();
            }
        });
    bind_job(module);
}

}  // namespace ckpt::py
