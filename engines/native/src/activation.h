// Gated activations: activation(gate) * up, in fp32 for either dtype.

#pragma once

#include "common.h"
#include "dtype.h"
#include "threads.h"

namespace outrider {

enum class Activation : int32_t { silu = 1, gelu_tanh = 2 };

struct GatedActivationCall {
    const void* input;  // [rows, 2 * size], contiguous: gates, then ups
    void* output;       // [rows, size], contiguous
    int64_t rows;
    int64_t size;
    Activation activation;
    Dtype dtype;
    int32_t num_threads;
};

namespace portable {
void gated_activation(const GatedActivationCall& call);
}
namespace avx2 {
void gated_activation(const GatedActivationCall& call);
}
namespace avx512 {
void gated_activation(const GatedActivationCall& call);
}

}  // namespace outrider

namespace outrider::OUTRIDER_ISA {

// e^x, without branches, so that compilers turn loops over it into vectors. x is split into n ln 2 + r with
// |r| <= ln 2 / 2, and e^r is a polynomial (Cephes' expf); the result below -87 is that of -87 (1e-38) and above 88
// that of 88. NaN stays NaN.
inline float exp_of(float x) {
    constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    float bounded = x < -87.0f ? -87.0f : x;
    bounded = bounded > 88.0f ? 88.0f : bounded;
    const float shifted = bounded * kLog2E + kRoundingShift;
    const float n = shifted - kRoundingShift;
    const float r = (bounded - n * kLn2High) - n * kLn2Low;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    const uint32_t power_bits = (static_cast<uint32_t>(bits) + 127u) << 23;
    float power;
    std::memcpy(&power, &power_bits, sizeof(power));
    return p * power;
}

struct Silu {
    static float of(float x) { return x / (1.0f + exp_of(-x)); }
};

// 0.5 x (1 + tanh(y)) = x / (1 + e^-2y) with y = sqrt(2 / pi) (x + 0.044715 x^3)
struct GeluTanh {
    static float of(float x) { return x / (1.0f + exp_of(-1.5957691216f * (x + 0.044715f * x * x * x))); }
};

template <class Function, class From, class To>
void multiply_activated(const From* gate, const From* up, To* to, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(to + i, Function::of(to_float(gate[i])) * to_float(up[i]));
}

template <class Function, class Value>
void gated_activation_rows(const GatedActivationCall& call) {
    const Value* input = static_cast<const Value*>(call.input);
    Value* output = static_cast<Value*>(call.output);
    const bool parallel = call.num_threads > 1 && call.rows * call.size >= kValuesWorthThreads;
    parallel_for(parallel ? call.num_threads : 1, call.rows, [&](int64_t row) {
        const Value* gate = input + 2 * row * call.size;
        multiply_activated<Function>(gate, gate + call.size, output + row * call.size, call.size);
    });
}

template <class Value>
void gated_activation_of(const GatedActivationCall& call) {
    if (call.activation == Activation::silu) return gated_activation_rows<Silu, Value>(call);
    gated_activation_rows<GeluTanh, Value>(call);
}

inline void gated_activation_any(const GatedActivationCall& call) {
    if (call.dtype == Dtype::bf16) return gated_activation_of<bf16>(call);
    gated_activation_of<float>(call);
}

}  // namespace outrider::OUTRIDER_ISA
