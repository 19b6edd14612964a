#include <nanobind/nanobind.h>

#include <stdexcept>

#include "arrays.hpp"
#include "crc64.hpp"
#include "cuda.hpp"
#include "fault.hpp"
#include "reader.hpp"
#include "runs.hpp"
#include "strided.hpp"
#include "witness.hpp"

namespace ckpt::py {

void bind_engine(nb::module_& module);

namespace {

const std::uint8_t* readable(std::uint64_t address) { return reinterpret_cast<const std::uint8_t*>(address); }
std::uint8_t* writable(std::uint64_t address) { return reinterpret_cast<std::uint8_t*>(address); }

void bind_digests(nb::module_& module) {
    module.def("crc_backend", [] { return std::string(crc_backend().name); });
    module.def("select_crc_backend", [](const std::string& name) { return select_crc_backend(name.c_str()); });
    module.def("crc_shift", &crc_shift);
    module.def("crc_digest", [](std::uint64_t address, std::uint64_t size) {
        const nb::gil_scoped_release release;
        return crc_digest(readable(address), size);
    });
    module.def("crc_copy_digest", [](std::uint64_t target, std::uint64_t source, std::uint64_t size) {
        const nb::gil_scoped_release release;
        return crc_copy_digest(writable(target), readable(source), size);
    });
    module.def("crc_granules", [](std::uint64_t address, std::uint64_t size, std::uint64_t granule_bytes) {
        if (granule_bytes == 0) {
            throw std::invalid_argument("granules of zero bytes");
        }
        std::vector<std::uint64_t> values;
        {
            const nb::gil_scoped_release release;
            values.reserve((size + granule_bytes - 1) / granule_bytes);
            for (std::uint64_t at = 0; at < size; at += granule_bytes) {
                values.push_back(crc_digest(readable(address + at), std::min(granule_bytes, size - at)));
            }
        }
        return to_numpy(std::move(values));
    });
    module.def("witnesses", [](const Words& addresses, const Words& sizes, std::uint64_t whole_bytes,
                               std::uint64_t lines, std::uint64_t seed) {
        std::vector<std::uint64_t> values;
        {
            const nb::gil_scoped_release release;
            values = witnesses({addresses.data(), addresses.size()}, {sizes.data(), sizes.size()}, whole_bytes, lines,
                               seed);
        }
        return to_numpy(std::move(values));
    });
    module.def("crc_positioned", [](std::uint64_t address, std::uint64_t begin, std::uint64_t end,
                                    std::uint64_t run_bytes, const Loops& loops, std::uint64_t follow_bytes) {
        const PositionedRuns runs(run_bytes, dims(loops), follow_bytes);
        if (begin > end || end > runs.size_bytes()) {
            throw std::invalid_argument("a range outside the runs");
        }
        const nb::gil_scoped_release release;
        return runs.contribution(readable(address), begin, end);
    });
}

void bind_copies(nb::module_& module) {
    module.def("gather", [](std::uint64_t target, std::uint64_t base, std::uint64_t item_bytes, const Loops& loops,
                            std::uint64_t begin, std::uint64_t end) {
        const StridedRegion region(item_bytes, dims(loops));
        if (begin > end || end > region.size_bytes()) {
            throw std::invalid_argument("a range outside the region");
        }
        const nb::gil_scoped_release release;
        region.gather(writable(target), readable(base), begin, end);
    });
    module.def("scatter", [](std::uint64_t base, std::uint64_t source, std::uint64_t item_bytes, const Loops& loops,
                             std::uint64_t begin, std::uint64_t end) {
        const StridedRegion region(item_bytes, dims(loops));
        if (begin > end || end > region.size_bytes()) {
            throw std::invalid_argument("a range outside the region");
        }
        const nb::gil_scoped_release release;
        region.scatter(writable(base), readable(source), begin, end);
    });
}

void bind_files(nb::module_& module) {
    module.def(
        "read_ranges",
        [](int direct, int buffered, const Bytes& ranges, int threads, std::uint64_t block_bytes,
           std::uint64_t memory_alignment, std::uint64_t offset_alignment, std::uint64_t granule_bytes,
           std::uint64_t granule_slots) {
            ReadOptions options;
            options.threads = threads;
            options.block_bytes = block_bytes;
            options.memory_alignment = memory_alignment;
            options.offset_alignment = offset_alignment;
            options.granule_bytes = granule_bytes;
            options.granule_slots = granule_slots;
            const auto wanted = records<ReadRange>(ranges);
            ReadResult result;
            {
                const nb::gil_scoped_release release;
                result = read_ranges({direct, buffered}, wanted, options);
            }
            return nb::make_tuple(to_numpy(std::move(result.digests)), to_numpy(std::move(result.granules)),
                                  error_tuple(result.error), result.failed_range, result.direct_refused);
        },
        nb::kw_only(), nb::arg("direct"), nb::arg("buffered"), nb::arg("ranges"), nb::arg("threads"),
        nb::arg("block_bytes"), nb::arg("memory_alignment"), nb::arg("offset_alignment"), nb::arg("granule_bytes"),
        nb::arg("granule_slots"));
    module.def("drop_cache", &drop_cache);
    module.def("sync_data", [](int descriptor) {
        std::optional<IoError> error;
        {
            const nb::gil_scoped_release release;
            error = sync_data(descriptor);
        }
        return error_tuple(error);
    });
    module.def("write_fully", [](int descriptor, const Bytes& data, std::uint64_t offset) {
        std::vector<iovec> vectors{{const_cast<std::uint8_t*>(data.data()), data.size()}};
        std::optional<IoError> error;
        {
            const nb::gil_scoped_release release;
            error = write_fully(descriptor, vectors, offset, 1);
        }
        return error_tuple(error);
    });
    module.def("probe_direct", [](const std::string& directory) {
        DirectSupport support;
        {
            const nb::gil_scoped_release release;
            support = probe_direct(directory);
        }
        return nb::make_tuple(support.supported, support.memory_alignment, support.offset_alignment, support.reason);
    });
}

void bind_faults(nb::module_& module) {
    module.def(
        "arm_fault",
        [](int call, std::uint64_t nth, int error, bool sticky, std::int64_t short_bytes, bool kill,
           std::int64_t delay_us) {
            if (call < 0 || call >= kCalls) {
                throw std::invalid_argument("no such call");
            }
            arm_fault({static_cast<Call>(call), nth, error, sticky, short_bytes, kill, delay_us});
        },
        nb::kw_only(), nb::arg("call"), nb::arg("nth"), nb::arg("error"), nb::arg("sticky"), nb::arg("short_bytes"),
        nb::arg("kill"), nb::arg("delay_us"));
    module.def("disarm_faults", [] {
        const nb::gil_scoped_release release;
        disarm_faults();
    });
}

}  // namespace
}  // namespace ckpt::py

NB_MODULE(_native, module) {
    nanobind::set_leak_warnings(false);  // engines may live until the interpreter is gone
    ckpt::py::bind_digests(module);
    ckpt::py::bind_copies(module);
    ckpt::py::bind_files(module);
    ckpt::py::bind_faults(module);
    ckpt::py::bind_engine(module);
    module.def("cuda_available", [] { return ckpt::CudaRuntime::find() != nullptr; });
}
