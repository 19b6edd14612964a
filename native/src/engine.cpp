#include "engine.hpp"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <stdexcept>

namespace ckpt {
namespace {

// Signals belong to the threads of the caller.
template <typename Body>
std::thread start_thread(Body&& body) {
    sigset_t blocked;
    sigset_t before;
    ::sigfillset(&blocked);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) {  // a thread's own: a fault handler shall hear of them
        ::sigdelset(&blocked, fault);
    }
    ::pthread_sigmask(SIG_SETMASK, &blocked, &before);
    try {
        std::thread thread(std::forward<Body>(body));
        ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return thread;
    } catch (...) {
        ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
        throw;
    }
}

}  // namespace

Engine::Engine(const EngineOptions& options) : options_(options), arena_(options.buffers, options.buffer_bytes) {
    if (options.workers < 1 || options.workers > 256) {
        throw std::invalid_argument("an engine has between 1 and 256 workers");
    }
    try {
        if (options.pin && CudaRuntime::find() != nullptr) {
            pin();
        }
        MutexLock lock(mutex_);
        threads_.reserve(static_cast<std::size_t>(options.workers) + 1);
        for (int number = 0; number < options.workers; ++number) {
            threads_.push_back(start_thread([this, number] { worker_loop(number); }));
        }
    } catch (...) {
        close();
        throw;
    }
}

Engine::~Engine() {
    close();
    unpin();
}

void Engine::pin() {
    CudaRuntime::find()->pin(arena_.data(), arena_.size_bytes());
    pinned_ = true;
}

void Engine::unpin() noexcept {
    if (pinned_.exchange(false)) {
        CudaRuntime::find()->unpin(arena_.data());
    }
}

void Engine::close() {
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
        if (closing_) {
            return;  // somebody else is closing it or has closed it
        }
        closing_ = true;
        threads.swap(threads_);
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    unpin();
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
            if (!pinned()) {
                pin();
            }
            void* event = runtime->make_event();
            job->order_marks_.push_back({compute.device, event});
            runtime->record(event, compute.stream);
        }
    }
    MutexLock lock(mutex_);
    if (stopping_) {
        throw std::runtime_error("the engine is closed");
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

bool Engine::take(WriteJob& job, std::uint32_t segment, std::uint8_t*& buffer, bool always_buffer) {
    buffer = nullptr;
    if (always_buffer || !job.layout_.segments()[segment].live_only) {
        buffer = arena_.try_acquire();
        if (buffer == nullptr) {
            job.starved_ |= fences_waiting_ != 0 && job.hurried_;
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

// A task of the job is over, whatever became of it.
void Engine::complete(WriteJob& job, std::uint8_t* buffer, std::optional<IoError> error) {
    --job.active_;
    release(job, buffer);
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

}  // namespace ckpt
