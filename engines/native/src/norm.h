// RMSNorm (arXiv 1910.07467): x / sqrt(mean(x^2) + epsilon) * scale, in fp32 for either dtype, rounded once; and the
// sums of residuals that stand between norms.

#pragma once

#include <algorithm>
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

struct AddCall {
    const void* first;
    const void* second;
    void* sum;  // may be one of them
    int64_t num_values;
    Dtype dtype;
    int32_t num_threads;
};

namespace portable {
void norm(const NormCall& call);
void add(const AddCall& call);
}
namespace avx2 {
void norm(const NormCall& call);
void add(const AddCall& call);
}
namespace avx512 {
void norm(const NormCall& call);
void add(const AddCall& call);
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

template <class Value>
void add_values(const AddCall& call) {
    const Value *first = static_cast<const Value*>(call.first), *second = static_cast<const Value*>(call.second);
    Value* sum = static_cast<Value*>(call.sum);
    const int64_t parts = (call.num_values + kValuesWorthThreads - 1) / kValuesWorthThreads;
    parallel_for(call.num_threads, parts, [&](int64_t part) {
        const int64_t begin = part * kValuesWorthThreads;
        const int64_t end = std::min(call.num_values, begin + kValuesWorthThreads);
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) store(sum + i, to_float(first[i]) + to_float(second[i]));
    });
}

inline void add_any(const AddCall& call) {
    if (call.dtype == Dtype::bf16) return add_values<bf16>(call);
    add_values<float>(call);
}

}  // namespace outrider::OUTRIDER_ISA
