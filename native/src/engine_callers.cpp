// What callers ask of an engine about one job.
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <new>
#include <stdexcept>

#include "engine.hpp"

namespace ckpt {
namespace {

Clock::time_point deadline_after(double timeout_s) {
    constexpr double kForever = 1e9;
    const double bounded = std::isfinite(timeout_s) ? std::clamp(timeout_s, 0.0, kForever) : kForever;
    return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bounded));
}

// Counts a waiting fence for as long as it waits; used under the engine's lock.
class FenceWaits {
public:
    explicit FenceWaits(int* count) noexcept : count_(count) { add(1); }
    ~FenceWaits() { add(-1); }
    FenceWaits(const FenceWaits&) = delete;
    FenceWaits& operator=(const FenceWaits&) = delete;

private:
    void add(int change) noexcept { count_ != nullptr ? *count_ += change : 0; }
    int* count_;
};

}  // namespace

void Engine::hurry(WriteJob& job, std::span<const std::uint32_t> extents) {
    MutexLock lock(mutex_);
    for (const std::uint32_t extent : extents) {
        if (extent >= job.layout_.extents().size()) {
            throw std::out_of_range("hurry for an extent that does not exist");
        }
    }
    if (job.state_ != JobState::kRunning) {
        return;
    }
    job.hurried_ = true;
    std::vector<bool> listed(job.taken_.size());
    for (const std::uint32_t extent : extents) {
        const ByteRange range = job.layout_.segments_of(job.layout_.extents()[extent]);
        for (std::uint64_t i = range.begin; i < range.end; ++i) {
            if (!job.taken_[i] && !listed[i]) {
                listed[i] = true;
                Line& line = job.layout_.segments()[i].on_device ? job.device_ : job.host_;
                line.hot.push_back(static_cast<std::uint32_t>(i));
            }
        }
    }
    work_.notify_all();
}

// Copies one segment that a fence waits for into a free buffer. False when there is none to copy or none free.
bool Engine::help_capture(WriteJob& job) {
    Line& line = job.host_;
    while (!line.hot.empty() && job.taken_[line.hot.front()]) {
        line.hot.pop_front();
    }
    std::uint8_t* buffer = nullptr;
    if (stopping_ || line.hot.empty() || !take(job, line.hot.front(), buffer, true)) {
        return false;
    }
    const std::uint32_t index = line.hot.front();
    line.hot.pop_front();
    mutex_.unlock();
    const Segment& segment = job.layout_.segments()[index];
    const std::int64_t begin_ns = now_ns();
    try {
        SegmentBuilder builder(job.layout_, job.digests_);
        builder.build(segment, buffer, false);
        job.record(TraceKind::kGather, begin_ns, segment.begin, segment.end - segment.begin, -1);
    } catch (const std::bad_alloc&) {
        mutex_.lock();
        complete(job, buffer, IoError{ENOMEM, "allocation", 0, "out of memory while capturing"});
        return true;
    }
    job.gathered_bytes_.fetch_add(segment.end - segment.begin, std::memory_order_relaxed);
    job.add_captured(segment);
    mutex_.lock();
    --job.active_;
    if (job.state_ == JobState::kRunning) {
        job.ready_.push_back({index, buffer, true});
    } else {
        release(job, buffer);
        settle(job);
    }
    work_.notify_all();
    done_.notify_all();
    return true;
}

WaitResult Engine::wait_captured(WriteJob& job, std::span<const std::uint32_t> extents, bool all, bool help,
                                 double timeout_s) {
    const auto deadline = deadline_after(timeout_s);
    const std::size_t count = all ? job.layout_.extents().size() : extents.size();
    std::size_t next = 0;
    MutexLock lock(mutex_);
    const FenceWaits fence(help && job.hurried_ ? &fences_waiting_ : nullptr);
    work_.notify_all();
    for (;;) {
        for (; next < count; ++next) {
            const std::uint32_t extent = all ? static_cast<std::uint32_t>(next) : extents[next];
            if (extent >= job.layout_.extents().size()) {
                throw std::out_of_range("waiting for an extent that does not exist");
            }
            if (!job.captured(extent)) {
                break;
            }
        }
        if (next == count) {
            return WaitResult::kDone;
        }
        if (job.state_ != JobState::kRunning && job.active_ == 0) {
            return WaitResult::kStopped;
        }
        if (help && help_capture(job)) {
            continue;
        }
        if (Clock::now() >= deadline) {
            return WaitResult::kTimeout;
        }
        done_.wait_until(mutex_, deadline);
    }
}

WaitResult Engine::wait_written(WriteJob& job, double timeout_s) {
    const auto deadline = deadline_after(timeout_s);
    MutexLock lock(mutex_);
    while (job.state_ == JobState::kRunning || job.active_ != 0) {
        if (Clock::now() >= deadline) {
            return WaitResult::kTimeout;
        }
        done_.wait_until(mutex_, deadline);
    }
    return job.state_ == JobState::kWritten ? WaitResult::kDone : WaitResult::kStopped;
}

std::optional<IoError> Engine::sync(WriteJob& job) {
    {
        MutexLock lock(mutex_);
        if (job.state_ != JobState::kWritten) {
            return job.error_.has_value() ? job.error_
                                          : IoError{EINVAL, "fdatasync", 0, "the job is not written yet"};
        }
    }
    const std::int64_t begin_ns = now_ns();
    auto error = sync_data(job.files_.buffered >= 0 ? job.files_.buffered : job.files_.direct);
    job.record(TraceKind::kSync, begin_ns, 0, 0, -1);
    if (error.has_value()) {
        MutexLock lock(mutex_);
        job.error_ = error;
        job.state_ = JobState::kFailed;
    }
    return error;
}

void Engine::cancel(WriteJob& job, bool wait) {
    MutexLock lock(mutex_);
    stop(job, JobState::kCancelled);
    work_.notify_all();
    while (wait && job.active_ != 0) {
        done_.wait(mutex_);
    }
}

JobState Engine::state(const WriteJob& job) {
    MutexLock lock(mutex_);
    return job.state_;
}

std::optional<IoError> Engine::error(const WriteJob& job) {
    MutexLock lock(mutex_);
    return job.error_;
}

JobProgress Engine::progress(const WriteJob& job) {
    MutexLock lock(mutex_);
    const LayoutOptions& options = job.layout_.options();
    return {options.body_end - options.body_begin,
            job.captured_bytes_.load(std::memory_order_relaxed),
            job.written_bytes_.load(std::memory_order_relaxed),
            job.gathered_bytes_.load(std::memory_order_relaxed),
            job.peak_buffers_ * options_.buffer_bytes,
            job.submitted_ns_,
            job.captured_ns_.load(std::memory_order_relaxed),
            job.written_ns_.load(std::memory_order_relaxed),
            job.direct_refused_.load(std::memory_order_relaxed),
            job.starved_};
}

}  // namespace ckpt
