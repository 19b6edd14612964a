// One rank file's body on its way to disk.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "cuda.hpp"
#include "file_io.hpp"
#include "job_digests.hpp"
#include "job_layout.hpp"
#include "sync.hpp"

namespace ckpt {

enum class JobState : int { kRunning = 0, kWritten = 1, kFailed = 2, kCancelled = 3 };
enum class WaitResult : int { kDone = 0, kTimeout = 1, kStopped = 2 };
enum class TraceKind : std::int32_t { kGather = 0, kWrite = 1, kReserve = 2, kSync = 3, kDeviceCopy = 4, kThrottle = 5 };

// Mirrored by TRACE in ckptengine/native.py. Times are nanoseconds of CLOCK_MONOTONIC.
struct TraceEvent {
    std::int64_t begin_ns;
    std::int64_t end_ns;
    std::uint64_t file_offset;
    std::uint64_t size_bytes;
    std::int32_t kind;
    std::int32_t thread;  // number of the worker; -1 the caller, -2 the device copier
};
static_assert(sizeof(TraceEvent) == 40);

struct WriteRequest {
    std::span<const Extent> extents;
    std::span<const Dim> dims;
    LayoutOptions layout;
    FilePair files;
    std::uint64_t reserve_bytes = 0;           // preallocated before the first write; 0 for none
    std::span<const std::uint32_t> order;      // extents to capture first; the rest follow in file order
    std::vector<ComputeStream> compute_streams;  // copies from a device begin after what these hold now
};

struct JobProgress {
    std::uint64_t body_bytes;
    std::uint64_t captured_bytes;  // of extents, whose memory is no longer needed
    std::uint64_t written_bytes;   // of the file
    std::uint64_t gathered_bytes;  // that went through the arena
    std::uint64_t peak_buffer_bytes;
    std::int64_t submitted_ns;     // times of CLOCK_MONOTONIC; 0 for what has not happened
    std::int64_t captured_ns;
    std::int64_t written_ns;
    bool direct_refused;           // direct I/O failed at run time and the buffered descriptor took over
    bool starved;                  // a fence has waited for it while no buffer was free
};

// Work of one kind (host or device segments), in the order in which it is to be done.
struct Line {
    std::vector<std::uint32_t> order;
    std::size_t next = 0;
    std::deque<std::uint32_t> hot;  // a fence waits for these
};

struct ReadySegment {
    std::uint32_t segment;
    std::uint8_t* buffer;
    bool digested;
};

class Engine;

// Filled by Engine; all scheduling state is guarded by the engine's mutex.
class WriteJob {
public:
    explicit WriteJob(const WriteRequest& request);
    ~WriteJob();
    WriteJob(const WriteJob&) = delete;
    WriteJob& operator=(const WriteJob&) = delete;

    const JobLayout& layout() const noexcept { return layout_; }
    const JobDigests& digests() const noexcept { return digests_; }
    bool captured(std::uint32_t extent) const noexcept {
        return uncaptured_[extent].load(std::memory_order_acquire) == 0;
    }
    std::vector<TraceEvent> trace() const;
    void record(TraceKind kind, std::int64_t begin_ns, std::uint64_t offset, std::uint64_t size, int thread);

    // Which of `extents` differ in live memory from what was captured. Looks at `samples` granules of each (0: all): the
    // first and others spread over the rest, chosen by `seed`; only at extents that are captured and digested, which those
    // in device memory (and what shares a segment with them) are once they are written. Throws std::out_of_range,
    // CudaError.
    std::vector<std::uint32_t> recheck(std::span<const std::uint32_t> extents, std::uint64_t samples,
                                       std::uint64_t seed) const;

private:
    friend class Engine;

    void add_captured(const Segment& segment) noexcept;
    void add_digested(const Segment& segment) noexcept;
    bool digested(std::uint32_t extent) const noexcept {
        return late_digests_ == nullptr || late_digests_[extent].load(std::memory_order_acquire) == 0;
    }
    bool granule_changed(std::uint32_t extent, std::uint64_t granule, std::vector<std::uint8_t>& scratch,
                         std::unique_ptr<CudaCopier>& copier) const;

    JobLayout layout_;
    JobDigests digests_;
    FilePair files_;
    std::uint64_t reserve_bytes_;
    std::unique_ptr<std::atomic<std::uint64_t>[]> uncaptured_;  // bytes per extent
    // Segments of each extent that are digested after their capture; nullptr where there is no device memory.
    std::unique_ptr<std::atomic<std::uint32_t>[]> late_digests_;
    std::atomic<std::uint64_t> captured_bytes_{0};
    std::atomic<std::uint64_t> written_bytes_{0};
    std::atomic<std::uint64_t> gathered_bytes_{0};
    std::atomic<bool> direct_refused_{false};
    std::uint64_t extent_bytes_ = 0;
    std::int64_t submitted_ns_ = now_ns();
    std::atomic<std::int64_t> captured_ns_{0};
    std::atomic<std::int64_t> written_ns_{0};
    std::vector<CudaCopier::Mark> order_marks_;  // recorded on compute streams; consumed by the device copier

    // Guarded by Engine::mutex_.
    std::vector<bool> taken_;
    Line host_;
    Line device_;
    std::deque<ReadySegment> ready_;
    std::size_t pending_ = 0;  // segments that nobody has taken
    std::size_t active_ = 0;   // tasks that threads are working on
    std::size_t buffers_ = 0;
    std::size_t peak_buffers_ = 0;
    bool reserve_started_ = false;
    bool reserved_ = false;
    bool hurried_ = false;
    bool starved_ = false;
    JobState state_ = JobState::kRunning;
    std::optional<IoError> error_;

    static constexpr std::size_t kTraceEvents = 16384;
    mutable Mutex trace_mutex_;
    std::vector<TraceEvent> trace_ CKPT_GUARDED_BY(trace_mutex_);
};

}  // namespace ckpt
