// A mutex that Clang's thread-safety analysis understands, and the clock that everything is timed by.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

#if defined(__clang__)
#define CKPT_THREAD_ATTRIBUTE(x) __attribute__((x))
#else
#define CKPT_THREAD_ATTRIBUTE(x)
#endif
#define CKPT_CAPABILITY CKPT_THREAD_ATTRIBUTE(capability("mutex"))
#define CKPT_SCOPED CKPT_THREAD_ATTRIBUTE(scoped_lockable)
#define CKPT_GUARDED_BY(x) CKPT_THREAD_ATTRIBUTE(guarded_by(x))
#define CKPT_REQUIRES(...) CKPT_THREAD_ATTRIBUTE(requires_capability(__VA_ARGS__))
#define CKPT_EXCLUDES(...) CKPT_THREAD_ATTRIBUTE(locks_excluded(__VA_ARGS__))
#define CKPT_ACQUIRE(...) CKPT_THREAD_ATTRIBUTE(acquire_capability(__VA_ARGS__))
#define CKPT_RELEASE(...) CKPT_THREAD_ATTRIBUTE(release_capability(__VA_ARGS__))
#define CKPT_UNCHECKED CKPT_THREAD_ATTRIBUTE(no_thread_safety_analysis)

namespace ckpt {

class CKPT_CAPABILITY Mutex {
public:
    void lock() CKPT_ACQUIRE() { mutex_.lock(); }
    void unlock() CKPT_RELEASE() { mutex_.unlock(); }

private:
    friend class Condition;
    std::mutex mutex_;
};

class CKPT_SCOPED MutexLock {
public:
    explicit MutexLock(Mutex& mutex) CKPT_ACQUIRE(mutex) : mutex_(mutex) { mutex_.lock(); }
    ~MutexLock() CKPT_RELEASE() { mutex_.unlock(); }
    MutexLock(const MutexLock&) = delete;
    MutexLock& operator=(const MutexLock&) = delete;

private:
    Mutex& mutex_;
};

using Clock = std::chrono::steady_clock;  // CLOCK_MONOTONIC, the clock of Python's time.monotonic_ns

inline std::int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

// Waiting releases the mutex that the caller holds and takes it again.
class Condition {
public:
    void wait(Mutex& mutex) CKPT_REQUIRES(mutex) CKPT_UNCHECKED {
        std::unique_lock<std::mutex> lock(mutex.mutex_, std::adopt_lock);
        condition_.wait(lock);
        lock.release();
    }
    // False once `deadline` has passed.
    bool wait_until(Mutex& mutex, Clock::time_point deadline) CKPT_REQUIRES(mutex) CKPT_UNCHECKED {
        std::unique_lock<std::mutex> lock(mutex.mutex_, std::adopt_lock);
        const bool in_time = condition_.wait_until(lock, deadline) == std::cv_status::no_timeout;
        lock.release();
        return in_time;
    }
    void notify_one() noexcept { condition_.notify_one(); }
    void notify_all() noexcept { condition_.notify_all(); }

private:
    std::condition_variable condition_;
};

}  // namespace ckpt
