// The few CUDA runtime calls that capture needs, found at run time. Without CUDA every lookup says so and nothing runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ckpt {

class CudaError : public std::runtime_error {
public:
    CudaError(const char* call, int code, const std::string& message)
        : std::runtime_error(message), call_(call), code_(code) {}
    const char* call() const noexcept { return call_; }
    int code() const noexcept { return code_; }

private:
    const char* call_;
    int code_;
};

class CudaRuntime {
public:
    // The process's libcudart: the copy that is already loaded (torch's own), else one that the loader finds.
    // nullptr without one or without a device. Never unloaded.
    static const CudaRuntime* find() noexcept;

    // Each throws CudaError.
    void set_device(int device) const;
    int device() const;
    void* make_stream() const;
    void destroy_stream(void* stream) const noexcept;
    void* make_event() const;
    void destroy_event(void* event) const noexcept;
    void record(void* event, void* stream) const;
    void make_wait(void* stream, void* event) const;
    void synchronize(void* event) const;
    void synchronize_stream(void* stream) const;
    void copy_to_host(void* target, const void* source, std::size_t size, void* stream) const;
    void pin(void* memory, std::size_t size) const;
    void unpin(void* memory) const noexcept;
    // Whether the process uses a device already. True where that cannot be told.
    bool has_context(int device) const noexcept;

private:
    CudaRuntime() = default;
    bool resolve(void* library) noexcept;
    void check(const char* call, int code) const;

    using Status = int;
    Status (*get_device_count_)(int*) = nullptr;
    Status (*get_device_)(int*) = nullptr;
    Status (*set_device_)(int) = nullptr;
    Status (*stream_create_)(void**, unsigned) = nullptr;
    Status (*stream_destroy_)(void*) = nullptr;
    Status (*event_create_)(void**, unsigned) = nullptr;
    Status (*event_destroy_)(void*) = nullptr;
    Status (*event_record_)(void*, void*) = nullptr;
    Status (*stream_wait_event_)(void*, void*, unsigned) = nullptr;
    Status (*event_synchronize_)(void*) = nullptr;
    Status (*stream_synchronize_)(void*) = nullptr;
    Status (*memcpy_async_)(void*, const void*, std::size_t, int, void*) = nullptr;
    Status (*host_register_)(void*, std::size_t, unsigned) = nullptr;
    Status (*host_unregister_)(void*) = nullptr;
    const char* (*get_error_string_)(Status) = nullptr;
    Status (*primary_context_state_)(int, unsigned*, int*) = nullptr;  // of the driver; may stay nullptr
};

// Makes a device current for a scope. A device that the process does not use is not made current again afterwards: that
// would make a context on it, which takes hundreds of MiB of its memory.
class CudaDeviceScope {
public:
    CudaDeviceScope(const CudaRuntime& runtime, int device);
    ~CudaDeviceScope();
    CudaDeviceScope(const CudaDeviceScope&) = delete;
    CudaDeviceScope& operator=(const CudaDeviceScope&) = delete;

private:
    const CudaRuntime& runtime_;
    int before_;
};

// Where the values of a device's tensors are written: its compute stream.
struct ComputeStream {
    int device;
    void* stream;
};

// One copy stream and a reserve of events per device. Used by one thread at a time.
class CudaCopier {
public:
    explicit CudaCopier(const CudaRuntime& runtime) : runtime_(runtime) {}
    ~CudaCopier();
    CudaCopier(const CudaCopier&) = delete;
    CudaCopier& operator=(const CudaCopier&) = delete;

    void copy(int device, void* target, const void* source, std::size_t size);
    // Lets the copy stream of every device wait for these events, which were recorded on compute streams.
    void wait_for(int device, void* event);
    // Marks what has been issued to the given devices so far.
    struct Mark {
        int device;
        void* event;
    };
    std::vector<Mark> mark(const std::vector<int>& devices);
    // Blocks until the marks have been reached, all of them even where one has failed, and takes their events back.
    void reach(std::vector<Mark>& marks);
    // Blocks until nothing that was issued to these devices is under way. For the way out of a failure.
    void settle(const std::vector<int>& devices) noexcept;

private:
    struct Device {
        void* stream = nullptr;
        std::vector<void*> events;
    };
    Device& at(int device);

    const CudaRuntime& runtime_;
    std::map<int, Device> devices_;
};

}  // namespace ckpt
