// What all kernels share: how functions are exported, instruction sets, bf16.
//
// The interface to Python is a C ABI, called through ctypes: pointers, sizes and plain structs. A kernel that exists for
// several instruction sets is compiled once in each of <name>_avx512.cpp, <name>_avx2.cpp and <name>.cpp (any machine),
// in a namespace of its own (OUTRIDER_ISA): inline functions compiled for one must never be linked into another.
//
// Threads are those of threads.h; every entry takes `num_threads`, which is torch's setting.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define OUTRIDER_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__AVX512BF16__)
#define OUTRIDER_ISA avx512
#elif defined(__AVX2__)
#define OUTRIDER_ISA avx2
#else
#define OUTRIDER_ISA portable
#endif

namespace outrider {

enum class Isa : int32_t { portable = 0, avx2 = 1, avx512 = 2 };

// The best instruction set of this machine, or what outrider_limit_isa has lowered it to.
Isa current_isa();

}  // namespace outrider

namespace outrider::OUTRIDER_ISA {

using bf16 = uint16_t;  // the upper half of a float

inline float to_float(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

inline float to_float(float value) { return value; }

// Round to nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40u);
    return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void store(bf16* to, float value) { *to = to_bf16(value); }
inline void store(float* to, float value) { *to = value; }

}  // namespace outrider::OUTRIDER_ISA
