// Which instruction set the kernels use.

#include <algorithm>
#include <atomic>

#include "common.h"

namespace outrider {
namespace {

Isa best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    if (has_avx2 && has_avx512) return Isa::avx512;
    if (has_avx2) return Isa::avx2;
#endif
    return Isa::portable;
}

std::atomic<Isa> chosen{best()};

}  // namespace

Isa current_isa() { return chosen.load(std::memory_order_relaxed); }

}  // namespace outrider

// What the Python side compares with its own number: calls and layouts of another one are not understood.
OUTRIDER_EXPORT int32_t outrider_interface() { return 2; }

// The instruction set in use: 0 portable, 1 AVX2, 2 AVX-512 with bf16 and VNNI.
OUTRIDER_EXPORT int32_t outrider_isa() { return static_cast<int32_t>(outrider::current_isa()); }

// Use no better instruction set than `limit`; returns the one in use from now on. For tests.
OUTRIDER_EXPORT int32_t outrider_limit_isa(int32_t limit) {
    outrider::chosen = std::min(outrider::best(), static_cast<outrider::Isa>(limit));
    return outrider_isa();
}
