#include "fault.hpp"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <thread>
#include <vector>

#include "sync.hpp"

namespace ckpt {
namespace {

struct Armed {
    Fault fault;
    std::uint64_t left;
};

std::atomic<bool> any_armed{false};
Mutex faults_mutex;
std::vector<Armed>& armed_faults() CKPT_REQUIRES(faults_mutex) {
    static std::vector<Armed> faults;
    return faults;
}

}  // namespace

void arm_fault(const Fault& fault) {
    MutexLock lock(faults_mutex);
    armed_faults().push_back({fault, fault.nth == 0 ? 1 : fault.nth});
    any_armed.store(true, std::memory_order_relaxed);
}

void disarm_faults() {
    MutexLock lock(faults_mutex);
    armed_faults().clear();
    any_armed.store(false, std::memory_order_relaxed);
}

FaultDecision consult_faults(Call call) {
    FaultDecision decision;
    if (!any_armed.load(std::memory_order_relaxed)) {
        return decision;
    }
    std::int64_t delay_us = 0;
    {
        MutexLock lock(faults_mutex);
        for (Armed& armed : armed_faults()) {
            if (armed.fault.call != call || armed.left == 0 || --armed.left != 0) {
                continue;
            }
            if (armed.fault.kill) {
                ::kill(::getpid(), SIGKILL);
            }
            armed.left = armed.fault.sticky ? 1 : 0;
            decision.error = armed.fault.error != 0 ? armed.fault.error : decision.error;
            decision.short_bytes = armed.fault.short_bytes >= 0 ? armed.fault.short_bytes : decision.short_bytes;
            delay_us += armed.fault.delay_us;
        }
    }
    if (delay_us > 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
    }
    return decision;
}

}  // namespace ckpt
