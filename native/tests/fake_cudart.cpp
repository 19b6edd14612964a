// A stand-in for the CUDA runtime that runs nothing before somebody waits for it: copies issued to a stream happen when
// an event recorded after them is synchronised, so a reader that does not wait reads rubbish.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <vector>

namespace {

struct Stream {
    std::vector<std::function<void()>> work;
    std::size_t done = 0;
};
struct Event {
    Stream* stream = nullptr;
    std::size_t position = 0;
};

std::recursive_mutex mutex;
thread_local int current_device = 0;
bool contexts[2] = {false, false};
std::vector<Stream*> streams;
int live_objects = 0;
int copies_until_failure = -1;

void run_until(Event event) {
    if (event.stream == nullptr) {
        return;
    }
    while (event.stream->done < event.position) {
        const auto work = event.stream->work[event.stream->done++];
        work();
    }
}

using Lock = std::lock_guard<std::recursive_mutex>;

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int cudaGetDeviceCount(int* count) { *count = 2; return 0; }
EXPORT int cudaGetDevice(int* device) { Lock lock(mutex); *device = current_device; return 0; }
EXPORT int cudaSetDevice(int device) {
    Lock lock(mutex);
    if (device < 0 || device > 1) {
        return 101;
    }
    current_device = device;
    contexts[device] = true;
    return 0;
}
EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
    Lock lock(mutex);
    *flags = 0;
    *active = contexts[device] ? 1 : 0;
    return 0;
}
EXPORT int cudaStreamCreateWithFlags(void** stream, unsigned) {
    Lock lock(mutex);
    ++live_objects;
    contexts[current_device] = true;
    streams.push_back(new Stream);
    *stream = streams.back();
    return 0;
}
EXPORT int cudaStreamDestroy(void* stream) {
    Lock lock(mutex);
    --live_objects;
    std::erase(streams, stream);
    delete static_cast<Stream*>(stream);
    return 0;
}
EXPORT int cudaStreamSynchronize(void* stream) {
    Lock lock(mutex);
    run_until({static_cast<Stream*>(stream), static_cast<Stream*>(stream)->work.size()});
    return 0;
}
EXPORT int cudaEventCreateWithFlags(void** event, unsigned flags) {
    Lock lock(mutex);
    ++live_objects;
    contexts[current_device] = true;
    *event = new Event;
    return flags == 3 ? 0 : 1;  // without timing, and no spinning while waiting
}
EXPORT int cudaEventDestroy(void* event) { Lock lock(mutex); --live_objects; delete static_cast<Event*>(event); return 0; }
EXPORT int cudaEventRecord(void* event, void* stream) {
    Lock lock(mutex);
    *static_cast<Event*>(event) = {static_cast<Stream*>(stream), static_cast<Stream*>(stream)->work.size()};
    return 0;
}
EXPORT int cudaStreamWaitEvent(void* stream, void* event, unsigned) {
    Lock lock(mutex);
    const Event reached = *static_cast<Event*>(event);
    static_cast<Stream*>(stream)->work.push_back([reached] { run_until(reached); });
    return 0;
}
EXPORT int cudaEventSynchronize(void* event) { Lock lock(mutex); run_until(*static_cast<Event*>(event)); return 0; }
EXPORT int cudaMemcpyAsync(void* target, const void* source, std::size_t size, int kind, void* stream) {
    Lock lock(mutex);
    if (kind != 2 || (copies_until_failure >= 0 && copies_until_failure-- == 0)) {
        return 700;
    }
    contexts[current_device] = true;
    std::memset(target, 0xBD, size);  // what a reader that does not wait would find
    static_cast<Stream*>(stream)->work.push_back([=] { std::memcpy(target, source, size); });
    return 0;
}
EXPORT int cudaHostRegister(void*, std::size_t, unsigned) { Lock lock(mutex); ++live_objects; return 0; }
EXPORT int cudaHostUnregister(void*) { Lock lock(mutex); --live_objects; return 0; }
EXPORT const char* cudaGetErrorString(int) { return "an illegal memory access was encountered"; }

// For tests.
EXPORT void fakeLaunch(void* stream, void (*kernel)(void*), void* argument) {
    Lock lock(mutex);
    static_cast<Stream*>(stream)->work.push_back([=] { kernel(argument); });
}
EXPORT int fakeLiveObjects() { Lock lock(mutex); return live_objects; }
EXPORT int fakePending() {
    Lock lock(mutex);
    std::size_t pending = 0;
    for (const Stream* stream : streams) {
        pending += stream->work.size() - stream->done;
    }
    return static_cast<int>(pending);
}
EXPORT int fakeHasContext(int device) { Lock lock(mutex); return contexts[device] ? 1 : 0; }
EXPORT void fakeDropContexts() { Lock lock(mutex); contexts[0] = contexts[1] = false; }
EXPORT void fakeFailCopyAfter(int copies) { Lock lock(mutex); copies_until_failure = copies; }
