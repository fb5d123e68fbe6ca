// What happens to queries and keys between their projection and attention: an RMSNorm of each head, where the model has
// one, and the rotary embedding (arXiv 2104.09864) of the first `rotary_dim` values of each head, in transformers'
// layout (value i turns with value i + rotary_dim / 2). In place, in fp32, rounded once.

#pragma once

#include "norm.h"
#include "threads.h"

namespace outrider {

constexpr int64_t kMaxHeadDim = 1024;

struct HeadNorm {
    const float* scale;  // [head_dim], or null: no norm
    float epsilon;
};

// What is the same in every call of a layer.
struct RotaryLayer {
    int64_t num_query_heads;
    int64_t num_key_heads;
    int64_t head_dim;
    HeadNorm query_norm;
    HeadNorm key_norm;
    Dtype dtype;  // of heads, cosines and sines
};

struct RotaryCall {
    const RotaryLayer* layer;
    void* heads;         // rows of query heads, then key heads, then whatever is left alone
    int64_t row_stride;  // values
    const void* cosines;  // [rows, rotary_dim], contiguous
    const void* sines;
    int64_t rotary_dim;
    int64_t rows;
    int32_t num_threads;
};

namespace portable {
void rotary(const RotaryCall& call);
}
namespace avx2 {
void rotary(const RotaryCall& call);
}
namespace avx512 {
void rotary(const RotaryCall& call);
}

}  // namespace outrider

namespace outrider::OUTRIDER_ISA {

template <class Value>
void load_head(const Value* head, int64_t size, const HeadNorm& norm, float* values) {
    if (norm.scale == nullptr) {
        for (int64_t i = 0; i < size; ++i) values[i] = to_float(head[i]);
        return;
    }
    const float inverse = inverse_rms(head, size, norm.epsilon);
    for (int64_t i = 0; i < size; ++i) values[i] = to_float(head[i]) * inverse * norm.scale[i];
}

template <class Value>
void rotate(const float* values, const Value* cosines, const Value* sines, int64_t rotary_dim, Value* head) {
    const int64_t half = rotary_dim / 2;
    const float *low = values, *high = values + half;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) store(head + i, low[i] * to_float(cosines[i]) - high[i] * to_float(sines[i]));
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        store(head + half + i, high[i] * to_float(cosines[half + i]) + low[i] * to_float(sines[half + i]));
    }
}

template <class Value>
void rotary_row(const RotaryCall& call, int64_t row) {
    const RotaryLayer& layer = *call.layer;
    const Value* cosines = static_cast<const Value*>(call.cosines) + row * call.rotary_dim;
    const Value* sines = static_cast<const Value*>(call.sines) + row * call.rotary_dim;
    Value* head = static_cast<Value*>(call.heads) + row * call.row_stride;
    alignas(64) float values[kMaxHeadDim];
    for (int64_t index = 0; index < layer.num_query_heads + layer.num_key_heads; ++index, head += layer.head_dim) {
        const HeadNorm& norm = index < layer.num_query_heads ? layer.query_norm : layer.key_norm;
        load_head(head, layer.head_dim, norm, values);
        rotate(values, cosines, sines, call.rotary_dim, head);
        if (norm.scale == nullptr) continue;
        for (int64_t i = call.rotary_dim; i < layer.head_dim; ++i) store(head + i, values[i]);
    }
}

template <class Value>
void rotary_rows(const RotaryCall& call) {
    const int64_t values = call.rows * (call.layer->num_query_heads + call.layer->num_key_heads) * call.layer->head_dim;
    const bool parallel = call.num_threads > 1 && values >= kValuesWorthThreads;
    parallel_for(parallel ? call.num_threads : 1, call.rows, [&](int64_t row) { rotary_row<Value>(call, row); });
}

inline void rotary_any(const RotaryCall& call) {
    if (call.layer->dtype == Dtype::bf16) return rotary_rows<bf16>(call);
    rotary_rows<float>(call);
}

}  // namespace outrider::OUTRIDER_ISA
