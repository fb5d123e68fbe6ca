// RMSNorm (arXiv 1910.07467): x / sqrt(mean(x^2) + epsilon) * scale, in fp32 for either dtype, rounded once.

#pragma once

#include <cmath>

#include "common.h"
#include "dtype.h"
#include "threads.h"

namespace outrider {

struct NormCall {
    const void* input;  // [rows, size], contiguous
    void* output;       // [rows, size], contiguous; may be the input
    const float* scale;  // [size]
    int64_t rows;
    int64_t size;
    float epsilon;
    Dtype dtype;
    int32_t num_threads;
};

namespace portable {
void norm(const NormCall& call);
}
namespace avx2 {
void norm(const NormCall& call);
}
namespace avx512 {
void norm(const NormCall& call);
}

}  // namespace outrider

namespace outrider::OUTRIDER_ISA {

// The sum is taken in 16 lanes, written out: compilers make vectors of them, and the order is the same everywhere.
constexpr int64_t kLanes = 16;

template <class Value>
float inverse_rms(const Value* input, int64_t size, float epsilon) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            const float value = to_float(input[i + lane]);
            lanes[lane] += value * value;
        }
    }
    for (int64_t lane = 0; i + lane < size; ++lane) {
        const float value = to_float(input[i + lane]);
        lanes[lane] += value * value;
    }
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
        for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return 1.0f / std::sqrt(lanes[0] / static_cast<float>(size) + epsilon);
}

template <class Value>
void norm_rows(const NormCall& call) {
    const Value* input = static_cast<const Value*>(call.input);
    Value* output = static_cast<Value*>(call.output);
    const bool parallel = call.num_threads > 1 && call.rows * call.size >= kValuesWorthThreads;
    parallel_for(parallel ? call.num_threads : 1, call.rows, [&](int64_t row) {
        const Value* from = input + row * call.size;
        Value* to = output + row * call.size;
        const float inverse = inverse_rms(from, call.size, call.epsilon);
#pragma omp simd
        for (int64_t i = 0; i < call.size; ++i) store(to + i, to_float(from[i]) * inverse * call.scale[i]);
    });
}

inline void norm_any(const NormCall& call) {
    if (call.dtype == Dtype::bf16) return norm_rows<bf16>(call);
    norm_rows<float>(call);
}

}  // namespace outrider::OUTRIDER_ISA
