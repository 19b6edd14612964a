#include "cuda.hpp"

#include <dlfcn.h>

#include <optional>

namespace ckpt {
namespace {

constexpr unsigned kNonBlockingStream = 1;    // cudaStreamNonBlocking
constexpr unsigned kPlainEvent = 2 | 1;       // cudaEventDisableTiming | cudaEventBlockingSync: waiting takes no core
constexpr unsigned kPortableRegistration = 1;  // cudaHostRegisterPortable
constexpr int kDeviceToHost = 2;              // cudaMemcpyDeviceToHost
constexpr int kAlreadyRegistered = 712;       // cudaErrorHostMemoryAlreadyRegistered

constexpr const char* kLibraries[] = {"libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so"};

template <typename Function>
bool look_up(void* library, const char* name, Function& function) noexcept {
    function = reinterpret_cast<Function>(::dlsym(library, name));
    return function != nullptr;
}

}  // namespace

bool CudaRuntime::resolve(void* library) noexcept {
    int devices = 0;
    return look_up(library, "cudaGetDeviceCount", get_device_count_) &&
           look_up(library, "cudaGetDevice", get_device_) && look_up(library, "cudaSetDevice", set_device_) &&
           look_up(library, "cudaStreamCreateWithFlags", stream_create_) &&
           look_up(library, "cudaStreamDestroy", stream_destroy_) &&
           look_up(library, "cudaEventCreateWithFlags", event_create_) &&
           look_up(library, "cudaEventDestroy", event_destroy_) &&
           look_up(library, "cudaEventRecord", event_record_) &&
           look_up(library, "cudaStreamWaitEvent", stream_wait_event_) &&
           look_up(library, "cudaEventSynchronize", event_synchronize_) &&
           look_up(library, "cudaStreamSynchronize", stream_synchronize_) &&
           look_up(library, "cudaMemcpyAsync", memcpy_async_) &&
           look_up(library, "cudaHostRegister", host_register_) &&
           look_up(library, "cudaHostUnregister", host_unregister_) &&
           look_up(library, "cudaGetErrorString", get_error_string_) && get_device_count_(&devices) == 0 &&
           devices > 0;
}

const CudaRuntime* CudaRuntime::find() noexcept {
    static const CudaRuntime* found = []() -> const CudaRuntime* {
        static CudaRuntime runtime;
        for (const int flags : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW}) {
            for (const char* name : kLibraries) {
                if (void* library = ::dlopen(name, flags); library != nullptr && runtime.resolve(library)) {
                    void* driver = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
                    (void)look_up(driver != nullptr ? driver : RTLD_DEFAULT, "cuDevicePrimaryCtxGetState",
                                  runtime.primary_context_state_);
                    return &runtime;
                }
            }
        }
        return nullptr;
    }();
    return found;
}

void CudaRuntime::check(const char* call, int code) const {
    if (code != 0) {
        throw CudaError(call, code, std::string(call) + ": " + get_error_string_(code));
    }
}

void CudaRuntime::set_device(int device) const { check("cudaSetDevice", set_device_(device)); }

int CudaRuntime::device() const {
    int device = 0;
    check("cudaGetDevice", get_device_(&device));
    return device;
}

void* CudaRuntime::make_stream() const {
    void* stream = nullptr;
    check("cudaStreamCreateWithFlags", stream_create_(&stream, kNonBlockingStream));
    return stream;
}

void CudaRuntime::destroy_stream(void* stream) const noexcept { (void)stream_destroy_(stream); }

void* CudaRuntime::make_event() const {
    void* event = nullptr;
    check("cudaEventCreateWithFlags", event_create_(&event, kPlainEvent));
    return event;
}

void CudaRuntime::destroy_event(void* event) const noexcept { (void)event_destroy_(event); }

void CudaRuntime::record(void* event, void* stream) const { check("cudaEventRecord", event_record_(event, stream)); }

void CudaRuntime::make_wait(void* stream, void* event) const {
    check("cudaStreamWaitEvent", stream_wait_event_(stream, event, 0));
}

void CudaRuntime::synchronize(void* event) const { check("cudaEventSynchronize", event_synchronize_(event)); }

void CudaRuntime::synchronize_stream(void* stream) const {
    check("cudaStreamSynchronize", stream_synchronize_(stream));
}

void CudaRuntime::copy_to_host(void* target, const void* source, std::size_t size, void* stream) const {
    check("cudaMemcpyAsync", memcpy_async_(target, source, size, kDeviceToHost, stream));
}

void CudaRuntime::pin(void* memory, std::size_t size) const {
    const int code = host_register_(memory, size, kPortableRegistration);
    check("cudaHostRegister", code == kAlreadyRegistered ? 0 : code);
}

void CudaRuntime::unpin(void* memory) const noexcept { (void)host_unregister_(memory); }

bool CudaRuntime::has_context(int device) const noexcept {
    unsigned flags = 0;
    int active = 0;
    return primary_context_state_ == nullptr || primary_context_state_(device, &flags, &active) != 0 || active != 0;
}

CudaDeviceScope::CudaDeviceScope(const CudaRuntime& runtime, int device) : runtime_(runtime), before_(runtime.device()) {
    if (before_ != device) {
        runtime_.set_device(device);
    }
}

CudaDeviceScope::~CudaDeviceScope() {
    try {
        if (runtime_.device() != before_ && runtime_.has_context(before_)) {
            runtime_.set_device(before_);
        }
    } catch (const CudaError&) {
        // The device was current a moment ago; if it no longer can be, the next real call says so.
    }
}

CudaCopier::~CudaCopier() {
    for (auto& [index, device] : devices_) {
        for (void* event : device.events) {
            runtime_.destroy_event(event);
        }
        runtime_.destroy_stream(device.stream);
    }
}

CudaCopier::Device& CudaCopier::at(int device) {
    Device& found = devices_[device];
    if (found.stream == nullptr) {
        const CudaDeviceScope scope(runtime_, device);
        found.stream = runtime_.make_stream();
    }
    return found;
}

void CudaCopier::copy(int device, void* target, const void* source, std::size_t size) {
    void* const stream = at(device).stream;
    const CudaDeviceScope scope(runtime_, device);
    runtime_.copy_to_host(target, source, size, stream);
}

void CudaCopier::wait_for(int device, void* event) {
    void* const stream = at(device).stream;
    const CudaDeviceScope scope(runtime_, device);
    runtime_.make_wait(stream, event);
}

std::vector<CudaCopier::Mark> CudaCopier::mark(const std::vector<int>& devices) {
    std::vector<Mark> marks;
    for (const int index : devices) {
        Device& device = at(index);
        const CudaDeviceScope scope(runtime_, index);
        void* event = nullptr;
        if (device.events.empty()) {
            event = runtime_.make_event();
        } else {
            event = device.events.back();
            device.events.pop_back();
        }
        marks.push_back({index, event});
        runtime_.record(event, device.stream);
    }
    return marks;
}

void CudaCopier::reach(std::vector<Mark>& marks) {
    std::optional<CudaError> failure;
    for (const Mark& mark : marks) {
        try {
            runtime_.synchronize(mark.event);
        } catch (const CudaError& error) {
            failure = error;
        }
        at(mark.device).events.push_back(mark.event);
    }
    marks.clear();
    if (failure.has_value()) {
        throw *failure;
    }
}

void CudaCopier::settle(const std::vector<int>& devices) noexcept {
    for (const int index : devices) {
        try {
            runtime_.synchronize_stream(at(index).stream);
        } catch (const CudaError&) {
            // A device that refuses even this runs nothing any more.
        }
    }
}

}  // namespace ckpt
