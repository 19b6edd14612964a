// Faults that tests inject into the system calls of this library. Inert, and one relaxed load, unless armed.
#pragma once

#include <cstdint>

namespace ckpt {

enum class Call : int { kWrite = 0, kRead = 1, kSync = 2, kAllocate = 3 };
inline constexpr int kCalls = 4;

struct Fault {
    Call call = Call::kWrite;
    std::uint64_t nth = 1;          // 1 is the next call of that kind
    int error = 0;                  // errno to fail with; 0 for none
    bool sticky = false;            // every later call of that kind fails too
    std::int64_t short_bytes = -1;  // transfer at most this many bytes
    bool kill = false;              // SIGKILL to this process instead of the call
    std::int64_t delay_us = 0;      // sleep before the call; with `sticky` a slow device
};

void arm_fault(const Fault& fault);
void disarm_faults();

struct FaultDecision {
    int error = 0;
    std::int64_t short_bytes = -1;
};
FaultDecision consult_faults(Call call);

}  // namespace ckpt
