// NumPy arrays in and out. Records travel as bytes of structured arrays; ckptengine/native.py owns their types.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "extent.hpp"
#include "file_io.hpp"

namespace ckpt::py {

namespace nb = nanobind;

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Words = nb::ndarray<const std::uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Loops = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <typename Record>
std::span<const Record> records(const Bytes& bytes) {
    if (bytes.size() % sizeof(Record) != 0 || reinterpret_cast<std::uintptr_t>(bytes.data()) % alignof(Record) != 0) {
        throw std::invalid_argument("an array of records of another size or alignment");
    }
    return {reinterpret_cast<const Record*>(bytes.data()), bytes.size() / sizeof(Record)};
}

inline std::span<const std::uint32_t> ids(const Ids& array) { return {array.data(), array.size()}; }

// A two-column array of (count, stride in bytes).
inline std::span<const Dim> dims(const Loops& array) {
    if (array.shape(1) != 2) {
        throw std::invalid_argument("loops are given as rows of (count, stride in bytes)");
    }
    return {reinterpret_cast<const Dim*>(array.data()), array.shape(0)};
}

template <typename Value>
nb::object to_numpy(std::vector<Value>&& values) {
    auto* kept = new std::vector<Value>(std::move(values));
    const nb::capsule owner(kept, [](void* data) noexcept { delete static_cast<std::vector<Value>*>(data); });
    return nb::cast(nb::ndarray<nb::numpy, Value, nb::ndim<1>>(kept->data(), {kept->size()}, owner));
}

template <typename Record>
nb::object records_to_numpy(const std::vector<Record>& values) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(values.data());
    return to_numpy(std::vector<std::uint8_t>(bytes, bytes + values.size() * sizeof(Record)));
}

// None, or (errno, operation, file offset, message).
inline nb::object error_tuple(const std::optional<IoError>& error) {
    if (!error.has_value()) {
        return nb::none();
    }
    return nb::make_tuple(error->code, error->operation, error->offset, error->message);
}

}  // namespace ckpt::py
