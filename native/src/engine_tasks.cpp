// What an engine's threads do with the work they have picked.
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>

#include "engine.hpp"

namespace ckpt {
namespace {

constexpr std::size_t kDeviceDepth = 4;  // segments whose copies from devices are under way at once

// Best effort: a system that refuses keeps the priorities of the process.
void lower_priority(int io_priority, int niceness) noexcept {
    constexpr int kWhoThread = 1;
    constexpr int kClassShift = 13;
    constexpr int kBestEffort = 2;
    constexpr int kIdle = 3;
    constexpr int kLowest = 7;
    if (io_priority != 0) {
        const int value = io_priority >= 2 ? kIdle << kClassShift : (kBestEffort << kClassShift) | kLowest;
        (void)::syscall(SYS_ioprio_set, kWhoThread, 0, value);
    }
    if (niceness != 0) {
        const auto thread = static_cast<id_t>(::syscall(SYS_gettid));
        const int now = ::getpriority(PRIO_PROCESS, thread);
        (void)::setpriority(PRIO_PROCESS, thread, now + niceness);
    }
}

IoError cuda_failed(const CudaError& error, const Segment& segment) {
    return {error.code(), error.call(), segment.begin, error.what()};
}

std::vector<iovec> whole_buffer(const Segment& segment, std::uint8_t* buffer) {
    return {{SegmentBuilder::place(segment, buffer, segment.begin),
             static_cast<std::size_t>(segment.end - segment.begin)}};
}

}  // namespace

void Engine::worker_loop(int number) {
    lower_priority(options_.io_priority, options_.niceness);
    mutex_.lock();
    for (;;) {
        std::optional<Task> task = pick();
        if (task.has_value()) {
            mutex_.unlock();
            std::optional<IoError> error;
            try {
                error = run(*task, number);
            } catch (const std::bad_alloc&) {
                error = IoError{ENOMEM, "allocation", 0, "out of memory while writing"};
            }
            mutex_.lock();
            task->job->reserved_ |= task->kind == Task::Kind::kReserve;
            complete(*task->job, task->buffer, std::move(error));
        } else if (stopping_) {
            break;
        } else {
            work_.wait(mutex_);
        }
    }
    mutex_.unlock();
}

std::optional<IoError> Engine::run(const Task& task, int thread) {
    WriteJob& job = *task.job;
    const std::int64_t begin_ns = now_ns();
    if (task.kind == Task::Kind::kReserve) {
        auto error = reserve(job.files_.buffered >= 0 ? job.files_.buffered : job.files_.direct, job.reserve_bytes_);
        job.record(TraceKind::kReserve, begin_ns, 0, job.reserve_bytes_, thread);
        return error;
    }
    const Segment& segment = job.layout_.segments()[task.segment];
    SegmentBuilder builder(job.layout_, job.digests_);
    if (task.kind == Task::Kind::kReady) {
        if (!task.digested) {
            builder.digest_buffer(segment, task.buffer);
            job.add_digested(segment);
            job.record(TraceKind::kGather, begin_ns, segment.begin, segment.end - segment.begin, thread);
        }
        return write(job, segment, whole_buffer(segment, task.buffer), thread);
    }
    const std::vector<iovec>& vectors = builder.build(segment, task.buffer, true);
    job.record(TraceKind::kGather, begin_ns, segment.begin, segment.end - segment.begin, thread);
    const std::uint64_t gathered_bytes = builder.gathered_bytes();
    const bool gathered = gathered_bytes == segment.end - segment.begin;
    job.gathered_bytes_.fetch_add(gathered_bytes, std::memory_order_relaxed);
    if (gathered) {
        announce_captured(job, segment);
    }
    auto error = write(job, segment, vectors, thread);
    if (!gathered && !error.has_value()) {
        announce_captured(job, segment);
    }
    return error;
}

std::optional<IoError> Engine::write(WriteJob& job, const Segment& segment, const std::vector<iovec>& vectors,
                                     int thread) {
    throttle(job, segment.end - segment.begin, thread);
    const std::int64_t begin_ns = now_ns();
    // A page is written either directly or through the page cache, never both: the tail that the caller writes through
    // the cache may begin in the body's last page.
    ByteRange direct{segment.begin, segment.end};
    if (job.files_.buffered >= 0) {
        direct.begin = (segment.begin + kPage - 1) / kPage * kPage;
        direct.end = segment.end / kPage * kPage;
    }
    if (job.files_.direct < 0 || job.direct_refused_.load(std::memory_order_relaxed) || direct.empty()) {
        direct = {segment.end, segment.end};
    }
    std::optional<IoError> error = write_range(job, vectors, segment, {segment.begin, direct.begin}, false);
    if (!error.has_value()) {
        error = write_range(job, vectors, segment, direct, true);
    }
    if (!error.has_value()) {
        error = write_range(job, vectors, segment, {direct.end, segment.end}, false);
    }
    job.record(TraceKind::kWrite, begin_ns, segment.begin, segment.end - segment.begin, thread);
    if (!error.has_value()) {
        job.written_bytes_.fetch_add(segment.end - segment.begin, std::memory_order_relaxed);
    }
    return error;
}

std::optional<IoError> Engine::write_range(WriteJob& job, const std::vector<iovec>& vectors, const Segment& segment,
                                           ByteRange range, bool direct) {
    if (range.empty()) {
        return std::nullopt;
    }
    auto part = slice_vectors(vectors, segment.begin, range.begin, range.end);
    if (direct) {
        auto error = write_fully(job.files_.direct, part, range.begin, job.layout_.options().offset_alignment);
        if (!error.has_value() || error->code != EINVAL || job.files_.buffered < 0) {
            return error;
        }
        job.direct_refused_.store(true, std::memory_order_relaxed);
        part = slice_vectors(vectors, segment.begin, range.begin, range.end);
    }
    auto error = write_fully(job.files_.buffered, part, range.begin, 1);
    if (!error.has_value()) {
        start_writeback(job.files_.buffered, range.begin, range.end - range.begin);
    }
    return error;
}

void Engine::throttle(WriteJob& job, std::uint64_t bytes, int thread) {
    if (options_.bytes_per_second == 0) {
        return;
    }
    const std::int64_t begin_ns = now_ns();
    bool waited = false;
    {
        MutexLock lock(mutex_);
        const auto start = std::max(Clock::now(), write_slot_);
        write_slot_ = start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(
                                  static_cast<double>(bytes) / static_cast<double>(options_.bytes_per_second)));
        while (!stopping_ && fences_waiting_ == 0 && job.state_ == JobState::kRunning && Clock::now() < start) {
            waited = true;
            work_.wait_until(mutex_, start);
        }
        if (fences_waiting_ != 0) {
            write_slot_ = Clock::now();  // what a fence lifts is not paid for later, or the next fence would wait for it
        }
    }
    if (waited) {
        job.record(TraceKind::kThrottle, begin_ns, 0, bytes, thread);
    }
}

bool Engine::begin_device_copy(DeviceCopy& copy, CudaCopier& copier) {
    WriteJob& job = *copy.task.job;
    const Segment& segment = job.layout_.segments()[copy.task.segment];
    std::vector<int> devices;
    copy.begin_ns = now_ns();
    try {
        while (!job.order_marks_.empty()) {
            const CudaCopier::Mark mark = job.order_marks_.back();
            copier.wait_for(mark.device, mark.event);
            CudaRuntime::find()->destroy_event(mark.event);
            job.order_marks_.pop_back();
        }
        SegmentBuilder builder(job.layout_, job.digests_);
        builder.copy_from_devices(segment, copy.task.buffer, copier, devices);
        copy.marks = copier.mark(devices);
        return true;
    } catch (const CudaError& error) {
        copier.settle(devices);  // no copy may arrive in a buffer that serves another segment by then
        MutexLock lock(mutex_);
        complete(job, copy.task.buffer, cuda_failed(error, segment));
        return false;
    }
}

void Engine::finish_device_copy(DeviceCopy& copy, CudaCopier& copier) {
    WriteJob& job = *copy.task.job;
    const Segment& segment = job.layout_.segments()[copy.task.segment];
    std::optional<IoError> error;
    try {
        copier.reach(copy.marks);
        job.record(TraceKind::kDeviceCopy, copy.begin_ns, segment.begin, segment.end - segment.begin, -2);
        job.gathered_bytes_.fetch_add(segment.end - segment.begin, std::memory_order_relaxed);
        job.add_captured(segment);
    } catch (const CudaError& failure) {
        error = cuda_failed(failure, segment);
    }
    MutexLock lock(mutex_);
    if (error.has_value() || job.state_ != JobState::kRunning) {
        complete(job, copy.task.buffer, std::move(error));
        return;
    }
    job.ready_.push_back({copy.task.segment, copy.task.buffer, false});
    --job.active_;
    work_.notify_all();
    done_.notify_all();
}

void Engine::device_loop() {
    lower_priority(0, options_.niceness);
    CudaCopier copier(*CudaRuntime::find());
    std::deque<DeviceCopy> under_way;
    mutex_.lock();
    for (;;) {
        std::optional<Task> task;
        if (under_way.size() < kDeviceDepth && (task = pick_device()).has_value()) {
            mutex_.unlock();
            DeviceCopy copy{std::move(*task), {}, 0};
            if (begin_device_copy(copy, copier)) {
                under_way.push_back(std::move(copy));
            }
            mutex_.lock();
        } else if (!under_way.empty()) {
            mutex_.unlock();
            finish_device_copy(under_way.front(), copier);
            under_way.pop_front();
            mutex_.lock();
        } else if (stopping_) {
            break;
        } else {
            work_.wait(mutex_);
        }
    }
    mutex_.unlock();
}

}  // namespace ckpt
