// Threads and an arena that carry write jobs to disk, first come first served; a job that a fence waits for overtakes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "arena.hpp"
#include "segment_builder.hpp"
#include "sync.hpp"
#include "write_job.hpp"

namespace ckpt {

struct EngineOptions {
    int workers = 2;
    std::size_t buffers = 8;
    std::size_t buffer_bytes = 4u << 20;
    bool pin = false;                      // page-lock the arena for CUDA at once
    std::uint64_t bytes_per_second = 0;    // cap on writing; 0 for none. A fence that waits lifts it.
    int io_priority = 0;                   // 0 as the process, 1 lowest best-effort, 2 idle
    int niceness = 0;                      // added to the workers' CPU niceness
};

// Outlives every job submitted to it. The memory that extents name stays readable until the job has captured it or
// stopped and has no thread at work (cancel() and the destructor wait for that).
class Engine {
public:
    // Throws std::invalid_argument, std::system_error, CudaError.
    explicit Engine(const EngineOptions& options);
    ~Engine();
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    // Cancels every job, wakes every waiter and joins the threads. The destructor does it too.
    void close() CKPT_EXCLUDES(mutex_);

    // Throws std::invalid_argument for extents that make no sense, std::runtime_error when closed, CudaError. Nothing
    // is read before it returns.
    std::shared_ptr<WriteJob> submit(const WriteRequest& request) CKPT_EXCLUDES(mutex_);

    // Moves these extents to the front of everything.
    void hurry(WriteJob& job, std::span<const std::uint32_t> extents) CKPT_EXCLUDES(mutex_);
    // Until every byte of these extents is written or copied into the arena; `help` copies on the calling thread.
    // kStopped: the job failed or was cancelled and no longer reads their memory.
    WaitResult wait_captured(WriteJob& job, std::span<const std::uint32_t> extents, bool all, bool help,
                             double timeout_s) CKPT_EXCLUDES(mutex_);
    // Until the job is written, or has stopped and no thread works on it.
    WaitResult wait_written(WriteJob& job, double timeout_s) CKPT_EXCLUDES(mutex_);
    // fdatasync of a written job's file; a failure is kept as the job's error.
    std::optional<IoError> sync(WriteJob& job) CKPT_EXCLUDES(mutex_);
    // Drops what is not yet written and waits for the threads that work on the job; without `wait` they may still read
    // its memory for a while, and write what is void.
    void cancel(WriteJob& job, bool wait = true) CKPT_EXCLUDES(mutex_);

    JobState state(const WriteJob& job) CKPT_EXCLUDES(mutex_);
    std::optional<IoError> error(const WriteJob& job) CKPT_EXCLUDES(mutex_);
    JobProgress progress(const WriteJob& job) CKPT_EXCLUDES(mutex_);
    const EngineOptions& options() const noexcept { return options_; }
    // Page-locked for CUDA: from the beginning with EngineOptions::pin, else from the first job with device memory on.
    bool pinned() const noexcept { return pinned_.load(std::memory_order_relaxed); }

private:
    struct Task {
        enum class Kind { kReserve, kSegment, kReady };
        std::shared_ptr<WriteJob> job;
        Kind kind = Kind::kSegment;
        std::uint32_t segment = 0;
        std::uint8_t* buffer = nullptr;
        bool digested = true;
    };
    struct DeviceCopy {
        Task task;
        std::vector<CudaCopier::Mark> marks;
        std::int64_t begin_ns = 0;
    };

    void pin();
    void unpin() noexcept;
    void worker_loop(int number);
    void device_loop();
    std::optional<Task> pick() CKPT_REQUIRES(mutex_);
    std::optional<Task> pick_ready(const std::shared_ptr<WriteJob>& job) CKPT_REQUIRES(mutex_);
    std::optional<Task> pick_line(const std::shared_ptr<WriteJob>& job, Line& line, bool hot_only)
        CKPT_REQUIRES(mutex_);
    std::optional<Task> pick_device() CKPT_REQUIRES(mutex_);
    bool take(WriteJob& job, std::uint32_t segment, std::uint8_t*& buffer, bool always_buffer) CKPT_REQUIRES(mutex_);

    std::optional<IoError> run(const Task& task, int thread) CKPT_EXCLUDES(mutex_);
    std::optional<IoError> write(WriteJob& job, const Segment& segment, const std::vector<iovec>& vectors, int thread);
    std::optional<IoError> write_range(WriteJob& job, const std::vector<iovec>& vectors, const Segment& segment,
                                       ByteRange range, bool direct);
    bool begin_device_copy(DeviceCopy& copy, CudaCopier& copier) CKPT_EXCLUDES(mutex_);
    void finish_device_copy(DeviceCopy& copy, CudaCopier& copier) CKPT_EXCLUDES(mutex_);
    void throttle(WriteJob& job, std::uint64_t bytes, int thread) CKPT_EXCLUDES(mutex_);
    void announce_captured(WriteJob& job, const Segment& segment) CKPT_EXCLUDES(mutex_);
    bool help_capture(WriteJob& job) CKPT_REQUIRES(mutex_) CKPT_UNCHECKED;

    void release(WriteJob& job, std::uint8_t* buffer) CKPT_REQUIRES(mutex_);
    void complete(WriteJob& job, std::uint8_t* buffer, std::optional<IoError> error) CKPT_REQUIRES(mutex_);
    void stop(WriteJob& job, JobState state) CKPT_REQUIRES(mutex_);
    void settle(WriteJob& job) CKPT_REQUIRES(mutex_);

    EngineOptions options_;
    Arena arena_;
    std::atomic<bool> pinned_{false};
    Mutex mutex_;
    Condition work_;  // something to do, or a buffer came free
    Condition done_;  // something was captured, written or stopped
    std::deque<std::shared_ptr<WriteJob>> jobs_ CKPT_GUARDED_BY(mutex_);
    bool stopping_ CKPT_GUARDED_BY(mutex_) = false;
    bool closing_ CKPT_GUARDED_BY(mutex_) = false;
    int fences_waiting_ CKPT_GUARDED_BY(mutex_) = 0;
    Clock::time_point write_slot_ CKPT_GUARDED_BY(mutex_){};  // when the bandwidth cap allows the next write
    std::vector<std::thread> threads_ CKPT_GUARDED_BY(mutex_);
    bool device_thread_ = false;
};

}  // namespace ckpt
