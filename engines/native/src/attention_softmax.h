// Softmax in parts: a chunk's share of a row is its largest score, the total of e^(score - largest), and the values
// weighted with that. Shares merge by log-sum-exp.

#pragma once

#include "attention.h"
#include "attention_simd.h"

namespace outrider::OUTRIDER_ISA {

constexpr float kLowest = -3.402823466e38f;  // in place of -inf, whose difference to itself is NaN

// The shares of several rows.
struct Shares {
    float* values;   // [rows, size]
    float* largest;  // [rows]
    float* total;    // [rows]
    int size;

    static int64_t floats(int64_t rows, int64_t size) { return rows * (size + 2); }
    static Shares in(float* memory, int64_t rows, int size) {
        return {memory, memory + rows * size, memory + rows * (size + 1), size};
    }
    Shares from(int64_t row) const { return {values + row * size, largest + row, total + row, size}; }

    // A share of nothing: merging it changes no bit.
    void clear(int rows) const {
        std::memset(values, 0, sizeof(float) * rows * size);
        for (int row = 0; row < rows; ++row) {
            largest[row] = kLowest;
            total[row] = 0.0f;
        }
    }
};

inline void merge_row(const Shares& into, const Shares& part) {
    const float top = *into.largest > *part.largest ? *into.largest : *part.largest;
    const float old_weight = exp(*into.largest - top), new_weight = exp(*part.largest - top);
    *into.largest = top;
    *into.total = *into.total * old_weight + *part.total * new_weight;
    const Vec old_factor = splat(old_weight), new_factor = splat(new_weight);
    for (int i = 0; i < into.size; i += kWidth) {
        const Vec scaled = mul(load(into.values + i), old_factor);
        store(into.values + i, fma(load(part.values + i), new_factor, scaled));
    }
}

// What turns a product into a score.
struct Scoring {
    float scaling, softcap;
    const float* key_scales;    // [kChunk], null where keys are as they are
    const float* value_scales;  // the same for values

    OUTRIDER_INLINE Vec score(Vec product, int first) const {
        if (key_scales) product = mul(product, load(key_scales + first));
        const Vec score = mul(product, splat(scaling));
        return softcap == 0.0f ? score : mul(splat(softcap), tanh(div(score, splat(softcap))));
    }
};

// Scores [kChunk] of one row become its weights, of which those in [from, to) count; the others are 0 as far as a step
// may reach. Writes largest and total of `share`.
template <class Op>
inline void softmax_row(const Scoring& scoring, float* scores, int from, int to, typename Op::Query* weights,
                        const Shares& share) {
    const int start = from / kWidth * kWidth;
    Vec top = splat(kLowest);
    for (int first = start; first < to; first += kWidth) {
        const Vec score = keep(scoring.score(load(scores + first), first), from - first, to - first, kLowest);
        store(scores + first, score);
        top = max(top, score);
    }
    const float largest_score = largest(top);
    Vec total = splat(0.0f);
    for (int first = start; first < to; first += kWidth) {
        Vec weight = exp(sub(load(scores + first), splat(largest_score)));
        total = add(total, keep(weight, from - first, to - first, 0.0f));
        if (scoring.value_scales) weight = mul(weight, load(scoring.value_scales + first));
        Op::store_weights(weights + first, keep(weight, from - first, to - first, 0.0f));
    }
    *share.largest = largest_score;
    *share.total = sum(total);
}

}  // namespace outrider::OUTRIDER_ISA
