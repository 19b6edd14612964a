#include "runs.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>

namespace ckpt {
namespace {

// Horner's rule over pieces in ascending order; remembers the few distances that nested loops repeat.
class Horner {
public:
    // `end` is where the piece ends in the tensor.
    void add(std::uint64_t raw, std::uint64_t end) noexcept {
        if (sum_ != 0) {
            sum_ = crc_multiply(sum_, power(end - end_));
        }
        sum_ ^= raw;
        end_ = end;
    }
    std::uint64_t positioned(std::uint64_t tensor_end) const noexcept { return crc_shift(sum_, tensor_end - end_); }

private:
    struct Memo {
        std::uint64_t bytes = 0;
        std::uint64_t power = 0;
    };

    std::uint64_t power(std::uint64_t bytes) noexcept {
        Memo& memo = memos_[(bytes * 0x9E3779B97F4A7C15ull) >> 61];
        if (memo.power == 0 || memo.bytes != bytes) {
            memo = {bytes, crc_byte_power(bytes)};
        }
        return memo.power;
    }

    std::uint64_t sum_ = 0;
    std::uint64_t end_ = 0;
    std::array<Memo, 8> memos_{};
};

}  // namespace

PositionedRuns::PositionedRuns(std::size_t run_bytes, std::span<const Dim> dims, std::uint64_t follow_bytes)
    : run_bytes_(run_bytes), size_bytes_(run_bytes), follow_bytes_(follow_bytes), span_bytes_(run_bytes) {
    if (run_bytes == 0) {
        throw std::invalid_argument("runs of zero bytes");
    }
    for (std::size_t i = dims.size(); i-- > 0;) {
        const Dim& dim = dims[i];
        if (dim.count == 1) {
            continue;
        }
        const auto stride = static_cast<std::uint64_t>(dim.stride_bytes);
        std::uint64_t reach = 0;
        if (dim.count < 1 || dim.stride_bytes < 0 || stride < span_bytes_ ||
            __builtin_mul_overflow(static_cast<std::uint64_t>(dim.count - 1), stride, &reach) ||
            __builtin_add_overflow(span_bytes_, reach, &span_bytes_)) {
            throw std::invalid_argument("runs of a tensor digest that are empty, descend, overlap or overflow");
        }
        size_bytes_ *= static_cast<std::size_t>(dim.count);  // cannot overflow: it is at most the span
        if (dims_.empty() && stride == run_bytes_) {
            run_bytes_ *= static_cast<std::size_t>(dim.count);
        } else if (std::int64_t inner = 0; !dims_.empty() &&
                   !__builtin_mul_overflow(dims_.back().count, dims_.back().stride_bytes, &inner) &&
                   inner == dim.stride_bytes) {
            dims_.back().count *= dim.count;
        } else {
            dims_.push_back(dim);
        }
    }
    std::reverse(dims_.begin(), dims_.end());
    if (span_bytes_ > UINT64_MAX - follow_bytes) {
        throw std::invalid_argument("runs of a tensor digest that overflow");
    }
    if (!dims_.empty()) {
        step_ = crc_run_step(static_cast<std::uint64_t>(dims_.back().stride_bytes));
    }
}

std::uint64_t PositionedRuns::position(std::size_t run) const noexcept {
    std::uint64_t offset = 0;
    for (std::size_t dim = dims_.size(); dim-- > 0;) {
        const auto count = static_cast<std::size_t>(dims_[dim].count);
        offset += static_cast<std::uint64_t>(run % count) * static_cast<std::uint64_t>(dims_[dim].stride_bytes);
        run /= count;
    }
    return offset;
}

std::uint64_t PositionedRuns::contribution(const std::uint8_t* data, std::size_t begin,
                                           std::size_t end) const noexcept {
    if (begin >= end) {
        return 0;
    }
    const std::uint64_t tensor_end = span_bytes_ + follow_bytes_;
    if (single()) {
        return crc_shift(crc_digest(data, end - begin), tensor_end - end);
    }
    const auto inner_count = static_cast<std::size_t>(dims_.back().count);
    const auto inner_stride = static_cast<std::uint64_t>(dims_.back().stride_bytes);
    Horner sum;
    while (begin < end) {
        const std::size_t run = begin / run_bytes_;
        const std::size_t skip = begin % run_bytes_;
        const std::size_t left = end - begin;
        const std::uint64_t start = position(run);
        std::size_t taken = 0;
        if (skip != 0 || left < run_bytes_) {
            taken = std::min(run_bytes_ - skip, left);
            sum.add(crc_digest(data, taken), start + skip + taken);
        } else {
            const std::size_t runs = std::min(inner_count - run % inner_count, left / run_bytes_);
            taken = runs * run_bytes_;
            sum.add(crc_backend().digest_runs(data, run_bytes_, runs, step_),
                    start + static_cast<std::uint64_t>(runs - 1) * inner_stride + run_bytes_);
        }
        data += taken;
        begin += taken;
    }
    return sum.positioned(tensor_end);
}

}  // namespace ckpt
