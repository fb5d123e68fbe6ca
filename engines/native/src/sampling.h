// Gumbel-max over rows of logits: the same law, noise and ties as engines/sampler.py has in torch, without its work.
//
// A row wants argmax over tokens of score + noise, where the noise of a token is a function of (seed, position, token):
//
//     bits  = SplitMix64 of the three       u = (upper 52 bits of it + 1/2) / 2^52       noise = -log(-log(u))
//
// Hashing every token is cheap, two logarithms in double are not. With v = 1 - u, -log(u) >= v, so noise <= -log(v), and
// the leading zeros of the hash's complement bound that: v >= 2^-(zeros + 1). Only tokens whose score plus that bound
// reaches the best value so far are worked out, a few dozen of a vocabulary.

#pragma once

#include <cmath>
#include <limits>

#include "common.h"

namespace outrider {

// One call's rows. `temperatures` of 0 mean the argmax without noise. Seeds and positions are as in drafting/noise.py.
struct Draws {
    const void* logits;  // [num_rows, vocab], bf16 or float
    int64_t row_stride;  // in elements
    int64_t num_rows;
    int64_t vocab;
    const float* temperatures;  // [num_rows]
    const int64_t* seeds;       // [num_rows]
    const int64_t* positions;   // [num_rows]
    int64_t* token_ids;         // [num_rows], written
    int32_t is_bf16;
    int32_t num_threads;
};

// Softmax probabilities of `token_ids`, one a row; logits as above, NaN counting as banned there too.
struct Beliefs {
    const void* logits;
    int64_t row_stride;
    int64_t num_rows;
    int64_t vocab;
    const int64_t* token_ids;
    float* probabilities;  // [num_rows], written
    int32_t is_bf16;
    int32_t num_threads;
};

namespace OUTRIDER_ISA {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
constexpr uint64_t kMix1 = 0xBF58476D1CE4E5B9ull;
constexpr uint64_t kMix2 = 0x94D049BB133111EBull;
constexpr float kLog2 = 0.69314724f;  // rounded up: what is computed with it is a bound

inline uint64_t mix(uint64_t bits) {
    bits = (bits ^ (bits >> 30)) * kMix1;
    bits = (bits ^ (bits >> 27)) * kMix2;
    return bits ^ (bits >> 31);
}

inline uint64_t noise_key(int64_t seed, int64_t position) {
    return mix(mix(static_cast<uint64_t>(seed) + kGolden) + static_cast<uint64_t>(position) * kGolden);
}

inline float gumbel(uint64_t bits) {
    const double uniform = (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
    return static_cast<float>(-std::log(-std::log(uniform)));
}

// What a model that overflows says is made harmless: NaN is banned, infinity is the largest number.
inline float sane(float logit) {
    if (std::isnan(logit)) return -std::numeric_limits<float>::infinity();
    return std::fmin(logit, std::numeric_limits<float>::max());
}

struct Best {
    float value;
    int64_t token;

    void offer(float other, int64_t at) {
        if (other > value || (other == value && at < token)) {
            value = other;
            token = at;
        }
    }
};

void draw_rows(const Draws& draws);
void believe_rows(const Beliefs& beliefs);

}  // namespace OUTRIDER_ISA

}  // namespace outrider
