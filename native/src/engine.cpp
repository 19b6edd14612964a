#include "engine.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <new>
#include <stdexcept>

namespace ckpt {
namespace {

constexpr std::size_t kDeviceDepth = 4;  // segments whose copies from devices are under way at once

// Signals belong to the threads of the caller.
template <typename Body>
std::thread start_thread(Body&& body) {
    sigset_t all;
    sigset_t before;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        std::thread thread(std::forward<Body>(body));
        ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return thread;
    } catch (...) {
        ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
        throw;
    }
}

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

Clock::time_point deadline_after(double timeout_s) {
    constexpr double kForever = 1e9;
    const double bounded = std::isfinite(timeout_s) ? std::clamp(timeout_s, 0.0, kForever) : kForever;
    return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bounded));
}

IoError cuda_failed(const CudaError& error, const Segment& segment) {
    return {error.code(), error.call(), segment.begin, error.what()};
}

std::vector<iovec> whole_buffer(const Segment& segment, std::uint8_t* buffer) {
    return {{SegmentBuilder::place(segment, buffer, segment.begin),
             static_cast<std::size_t>(segment.end - segment.begin)}};
}

}  // namespace

Engine::Engine(const EngineOptions& options) : options_(options), arena_(options.buffers, options.buffer_bytes) {
    if (options.workers < 1 || options.workers > 256) {
        throw std::invalid_argument("an engine has between 1 and 256 workers");
    }
    if (const CudaRuntime* runtime = options.pin ? CudaRuntime::find() : nullptr; runtime != nullptr) {
        runtime->pin(arena_.data(), arena_.size_bytes());
        pinned_ = true;
    }
    MutexLock lock(mutex_);
    for (int number = 0; number < options.workers; ++number) {
        threads_.push_back(start_thread([this, number] { worker_loop(number); }));
    }
}

Engine::~Engine() {
    shut_down();
    if (pinned_) {
        CudaRuntime::find()->unpin(arena_.data());
    }
}

void Engine::shut_down() {
    std::vector<std::thread> threads;
    {
        MutexLock lock(mutex_);
        stopping_ = true;
        const auto jobs = jobs_;  // stop() removes from jobs_
        for (const auto& job : jobs) {
            stop(*job, JobState::kCancelled);
        }
        work_.notify_all();
        done_.notify_all();
        threads.swap(threads_);
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
}

std::shared_ptr<WriteJob> Engine::submit(const WriteRequest& request) {
    if (request.layout.segment_bytes > options_.buffer_bytes) {
        throw std::invalid_argument("segments are larger than the arena's buffers");
    }
    auto job = std::make_shared<WriteJob>(request);
    const bool on_device = !job->device_.order.empty();
    if (on_device) {
        const CudaRuntime* runtime = CudaRuntime::find();
        if (runtime == nullptr) {
            throw std::invalid_argument("extents in device memory, but the CUDA runtime cannot be found");
        }
        for (const ComputeStream& compute : request.compute_streams) {
            const CudaDeviceScope scope(*runtime, compute.device);
            void* event = runtime->make_event();
            job->order_marks_.push_back({compute.device, event});
            runtime->record(event, compute.stream);
        }
    }
    MutexLock lock(mutex_);
    if (stopping_) {
        throw std::invalid_argument("the engine is shutting down");
    }
    if (on_device && !device_thread_) {
        threads_.push_back(start_thread([this] { device_loop(); }));
        device_thread_ = true;
    }
    jobs_.push_back(job);
    settle(*job);
    work_.notify_all();
    return job;
}

// ---- choosing work -------------------------------------------------------------------------------------------------

bool Engine::take(WriteJob& job, std::uint32_t segment, std::uint8_t*& buffer, bool always_buffer) {
    buffer = nullptr;
    if (always_buffer || !job.layout_.segments()[segment].live_only) {
        buffer = arena_.try_acquire();
        if (buffer == nullptr) {
            return false;
        }
        job.peak_buffers_ = std::max(job.peak_buffers_, ++job.buffers_);
    }
    job.taken_[segment] = true;
    --job.pending_;
    ++job.active_;
    return true;
}

std::optional<Engine::Task> Engine::pick_line(const std::shared_ptr<WriteJob>& job, Line& line, bool hot_only) {
    const bool always_buffer = &line == &job->device_;
    std::uint8_t* buffer = nullptr;
    while (!line.hot.empty() && job->taken_[line.hot.front()]) {
        line.hot.pop_front();
    }
    if (!line.hot.empty()) {
        const std::uint32_t segment = line.hot.front();
        if (take(*job, segment, buffer, always_buffer)) {
            line.hot.pop_front();
            return Task{job, Task::Kind::kSegment, segment, buffer};
        }
    }
    if (hot_only) {
        return std::nullopt;
    }
    while (line.next < line.order.size() && job->taken_[line.order[line.next]]) {
        ++line.next;
    }
    if (line.next < line.order.size()) {
        const std::uint32_t segment = line.order[line.next];
        if (take(*job, segment, buffer, always_buffer)) {
            ++line.next;
            return Task{job, Task::Kind::kSegment, segment, buffer};
        }
    }
    return std::nullopt;
}

std::optional<Engine::Task> Engine::pick_ready(const std::shared_ptr<WriteJob>& job) {
    if (job->ready_.empty()) {
        return std::nullopt;
    }
    const ReadySegment ready = job->ready_.front();
    job->ready_.pop_front();
    ++job->active_;
    return Task{job, Task::Kind::kReady, ready.segment, ready.buffer, ready.digested};
}

// Never waits for a buffer: whoever holds one is a running task or a ready segment, and those are always picked, so
// buffers come free again whatever the arena's size.
std::optional<Engine::Task> Engine::pick() {
    if (stopping_) {
        return std::nullopt;
    }
    for (const auto& job : jobs_) {
        if (!job->reserve_started_) {
            job->reserve_started_ = true;
            ++job->active_;
            return Task{job, Task::Kind::kReserve};
        }
    }
    for (const auto& job : jobs_) {  // live memory that a fence waits for, before what is safe in the arena
        if (auto task = job->reserved_ ? pick_line(job, job->host_, true) : std::nullopt) {
            return task;
        }
    }
    for (const auto& job : jobs_) {
        if (auto task = job->reserved_ ? pick_ready(job) : std::nullopt) {
            return task;
        }
    }
    for (const auto& job : jobs_) {
        if (auto task = job->reserved_ ? pick_line(job, job->host_, false) : std::nullopt) {
            return task;
        }
    }
    return std::nullopt;
}

std::optional<Engine::Task> Engine::pick_device() {
    if (stopping_) {
        return std::nullopt;
    }
    for (const bool hot_only : {true, false}) {
        for (const auto& job : jobs_) {
            if (auto task = pick_line(job, job->device_, hot_only)) {
                return task;
            }
        }
    }
    return std::nullopt;
}

// ---- finishing work ------------------------------------------------------------------------------------------------

void Engine::release(WriteJob& job, std::uint8_t* buffer) {
    if (buffer != nullptr) {
        arena_.release(buffer);
        --job.buffers_;
    }
}

// The job takes no more work; threads that are at it finish what they hold.
void Engine::stop(WriteJob& job, JobState state) {
    if (job.state_ != JobState::kRunning) {
        return;
    }
    job.state_ = state;
    job.pending_ = 0;
    job.host_ = {};
    job.device_ = {};
    for (const ReadySegment& ready : job.ready_) {
        release(job, ready.buffer);
    }
    job.ready_.clear();
    settle(job);
}

// Takes the job out of the queue when nothing of it is left to do.
void Engine::settle(WriteJob& job) {
    const bool running = job.state_ == JobState::kRunning;
    if (running && (job.pending_ != 0 || job.active_ != 0 || !job.ready_.empty() || !job.reserved_)) {
        return;
    }
    if (running) {
        job.state_ = JobState::kWritten;
        job.written_ns_.store(now_ns(), std::memory_order_relaxed);
    }
    std::erase_if(jobs_, [&](const auto& queued) { return queued.get() == &job; });
    done_.notify_all();
}

void Engine::complete(const Task& task, std::optional<IoError> error) {
    WriteJob& job = *task.job;
    --job.active_;
    release(job, task.buffer);
    if (task.kind == Task::Kind::kReserve) {
        job.reserved_ = true;
    }
    if (error.has_value() && job.state_ == JobState::kRunning) {
        job.error_ = std::move(error);
        stop(job, JobState::kFailed);
    }
    settle(job);
    work_.notify_all();
    done_.notify_all();
}

void Engine::announce_captured(WriteJob& job, const Segment& segment) {
    job.add_captured(segment);
    MutexLock lock(mutex_);  // a waiter that has just looked must be waiting before it is told
    done_.notify_all();
}

// ---- doing work ----------------------------------------------------------------------------------------------------

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
            complete(*task, std::move(error));
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
            job.record(TraceKind::kGather, begin_ns, segment.begin, segment.end - segment.begin, thread);
        }
        return write(job, segment, whole_buffer(segment, task.buffer), thread);
    }
    const std::vector<iovec>& vectors = builder.build(segment, task.buffer, true);
    job.record(TraceKind::kGather, begin_ns, segment.begin, segment.end - segment.begin, thread);
    const bool gathered = task.buffer != nullptr && vectors.size() == 1 &&
                          vectors.front().iov_base == SegmentBuilder::place(segment, task.buffer, segment.begin);
    if (gathered) {
        job.gathered_bytes_.fetch_add(segment.end - segment.begin, std::memory_order_relaxed);
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
        while (!stopping_ && !job.hurried_ && job.state_ == JobState::kRunning && Clock::now() < start) {
            waited = true;
            work_.wait_until(mutex_, start);
        }
    }
    if (waited) {
        job.record(TraceKind::kThrottle, begin_ns, 0, bytes, thread);
    }
}

// ---- devices -------------------------------------------------------------------------------------------------------

bool Engine::begin_device_copy(DeviceCopy& copy, CudaCopier& copier) {
    WriteJob& job = *copy.task.job;
    const Segment& segment = job.layout_.segments()[copy.task.segment];
    copy.begin_ns = now_ns();
    try {
        for (const CudaCopier::Mark& mark : job.order_marks_) {
            copier.wait_for(mark.device, mark.event);
            CudaRuntime::find()->destroy_event(mark.event);
        }
        job.order_marks_.clear();
        SegmentBuilder builder(job.layout_, job.digests_);
        copy.marks = copier.mark(builder.copy_from_devices(segment, copy.task.buffer, copier));
        return true;
    } catch (const CudaError& error) {
        MutexLock lock(mutex_);
        complete(copy.task, cuda_failed(error, segment));
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
        complete(copy.task, std::move(error));
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

// ---- callers -------------------------------------------------------------------------------------------------------

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
    SegmentBuilder builder(job.layout_, job.digests_);
    builder.build(segment, buffer, false);
    job.record(TraceKind::kGather, begin_ns, segment.begin, segment.end - segment.begin, -1);
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

void Engine::cancel(WriteJob& job) {
    MutexLock lock(mutex_);
    stop(job, JobState::kCancelled);
    work_.notify_all();
    while (job.active_ != 0) {
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
            job.direct_refused_.load(std::memory_order_relaxed)};
}

}  // namespace ckpt
