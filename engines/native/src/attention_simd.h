// fp32 vectors of kWidth lanes, for the instruction set this is compiled for.
//
// Sums across lanes always go by kLevelBits: level i adds the lanes that differ in bit kLevelBits[i]. `combine<i>` does
// so for two vectors at once: after all levels kWidth vectors, neighbours combined first, have become one that holds
// their sums, which `in_order` puts into the vectors' order.

#pragma once

#include <cmath>

#include "common.h"

#if defined(__AVX512BF16__) || defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own headers, bug 105593
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define OUTRIDER_INLINE inline __attribute__((always_inline))

namespace outrider::OUTRIDER_ISA {

#if defined(__AVX512BF16__)

using Vec = __m512;
constexpr int kWidth = 16;
constexpr int kLevelBits[] = {4, 8, 1, 2};
constexpr int kLevels = 4;
constexpr int kAccumulators = 16;  // registers that a product may sum into

OUTRIDER_INLINE __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
OUTRIDER_INLINE __mmask16 lanes(int count) { return count >= kWidth ? 0xffff : first_lanes(count); }

OUTRIDER_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
OUTRIDER_INLINE Vec load(const float* from) { return _mm512_loadu_ps(from); }
OUTRIDER_INLINE void store(float* to, Vec x) { _mm512_storeu_ps(to, x); }
OUTRIDER_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
OUTRIDER_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
OUTRIDER_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
OUTRIDER_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
OUTRIDER_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
OUTRIDER_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

// The lanes [from, to) of x, `other` elsewhere.
OUTRIDER_INLINE Vec keep(Vec x, int from, int to, float other) {
    const __mmask16 kept = lanes(to < 0 ? 0 : to) & static_cast<__mmask16>(~lanes(from < 0 ? 0 : from));
    return _mm512_mask_blend_ps(kept, splat(other), x);
}

OUTRIDER_INLINE Vec load(const float* from, int count) { return _mm512_maskz_loadu_ps(lanes(count), from); }
OUTRIDER_INLINE Vec load(const bf16* from, int count) {
    const __m256i halves = _mm256_maskz_loadu_epi16(lanes(count), from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
OUTRIDER_INLINE Vec load(const int8_t* from, int count) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(count), from)));
}
OUTRIDER_INLINE void store(float* to, Vec x, int count) { _mm512_mask_storeu_ps(to, lanes(count), x); }
OUTRIDER_INLINE void store(bf16* to, Vec x, int count) {
    _mm256_mask_storeu_epi16(to, lanes(count), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

template <int kLevel>
OUTRIDER_INLINE Vec combine(Vec a, Vec b) {
    if constexpr (kLevel < 2) return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    return add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

OUTRIDER_INLINE Vec in_order(Vec sums) {
    const __m512i lane = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_ps(lane, sums);
}

// rows[i] lane j becomes rows[j] lane i.
OUTRIDER_INLINE void transpose(Vec (&rows)[kWidth]) {
    Vec half[kWidth];
    for (int i = 0; i < kWidth; i += 2) {
        half[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        half[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < kWidth; i += 4) {
        for (int j = 0; j < 2; ++j) {
            const __m512d a = _mm512_castps_pd(half[i + j]), b = _mm512_castps_pd(half[i + j + 2]);
            rows[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            rows[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    for (int i = 0; i < 4; ++i) {
        const Vec even = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
        const Vec odd = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
        const Vec even2 = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
        const Vec odd2 = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
        half[i] = _mm512_shuffle_f32x4(even, even2, 0x88);
        half[i + 8] = _mm512_shuffle_f32x4(even, even2, 0xdd);
        half[i + 4] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
        half[i + 12] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
    }
    for (int i = 0; i < kWidth; ++i) rows[i] = half[i];
}

OUTRIDER_INLINE Vec round_to_integer(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
OUTRIDER_INLINE Vec times_power_of_two(Vec x, Vec exponent) { return _mm512_scalef_ps(x, exponent); }

#elif defined(__AVX2__)

using Vec = __m256;
constexpr int kWidth = 8;
constexpr int kLevelBits[] = {4, 1, 2};
constexpr int kLevels = 3;
constexpr int kAccumulators = 8;

OUTRIDER_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
OUTRIDER_INLINE Vec load(const float* from) { return _mm256_loadu_ps(from); }
OUTRIDER_INLINE void store(float* to, Vec x) { _mm256_storeu_ps(to, x); }
OUTRIDER_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
OUTRIDER_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
OUTRIDER_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
OUTRIDER_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
OUTRIDER_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
OUTRIDER_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

OUTRIDER_INLINE Vec keep(Vec x, int from, int to, float other) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i late = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(from - 1));
    const __m256i early = _mm256_cmpgt_epi32(_mm256_set1_epi32(to), lane);
    return _mm256_blendv_ps(splat(other), x, _mm256_castsi256_ps(_mm256_and_si256(late, early)));
}

OUTRIDER_INLINE Vec load(const float* from, int) { return load(from); }
OUTRIDER_INLINE Vec load(const bf16* from, int) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
OUTRIDER_INLINE Vec load(const int8_t* from, int) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

template <int kLevel>
OUTRIDER_INLINE Vec combine(Vec a, Vec b) {
    if constexpr (kLevel == 0) return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    return add(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}

OUTRIDER_INLINE Vec in_order(Vec sums) {
    return _mm256_permutevar8x32_ps(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

OUTRIDER_INLINE void transpose(Vec (&rows)[kWidth]) {
    Vec half[kWidth];
    for (int i = 0; i < kWidth; i += 2) {
        half[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        half[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < kWidth; i += 4) {
        for (int j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm256_shuffle_ps(half[i + j], half[i + j + 2], 0x44);
            rows[i + 2 * j + 1] = _mm256_shuffle_ps(half[i + j], half[i + j + 2], 0xee);
        }
    }
    for (int i = 0; i < 4; ++i) {
        half[i] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20);
        half[i + 4] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31);
    }
    for (int i = 0; i < kWidth; ++i) rows[i] = half[i];
}

OUTRIDER_INLINE Vec round_to_integer(Vec x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Right where the result is a normal number; exp() sees to that.
OUTRIDER_INLINE Vec times_power_of_two(Vec x, Vec exponent) {
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127)), 23);
    return mul(x, _mm256_castsi256_ps(bits));
}

#else

struct Vec {
    float lane[4];
};
constexpr int kWidth = 4;
constexpr int kLevelBits[] = {1, 2};
constexpr int kLevels = 2;
constexpr int kAccumulators = 8;

template <class Make>
OUTRIDER_INLINE Vec each_lane(Make make) {
    return {{make(0), make(1), make(2), make(3)}};
}

OUTRIDER_INLINE Vec splat(float x) { return {{x, x, x, x}}; }
OUTRIDER_INLINE Vec load(const float* from) { return each_lane([=](int i) { return from[i]; }); }
OUTRIDER_INLINE void store(float* to, Vec x) { std::memcpy(to, x.lane, sizeof(x.lane)); }
OUTRIDER_INLINE Vec add(Vec a, Vec b) { return each_lane([=](int i) { return a.lane[i] + b.lane[i]; }); }
OUTRIDER_INLINE Vec sub(Vec a, Vec b) { return each_lane([=](int i) { return a.lane[i] - b.lane[i]; }); }
OUTRIDER_INLINE Vec mul(Vec a, Vec b) { return each_lane([=](int i) { return a.lane[i] * b.lane[i]; }); }
OUTRIDER_INLINE Vec div(Vec a, Vec b) { return each_lane([=](int i) { return a.lane[i] / b.lane[i]; }); }
// As the machine's: the second if either is NaN.
OUTRIDER_INLINE Vec max(Vec a, Vec b) {
    return each_lane([=](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
OUTRIDER_INLINE Vec fma(Vec a, Vec b, Vec c) { return add(mul(a, b), c); }

OUTRIDER_INLINE Vec keep(Vec x, int from, int to, float other) {
    return each_lane([=](int i) { return i >= from && i < to ? x.lane[i] : other; });
}

template <class T>
OUTRIDER_INLINE Vec load(const T* from, int) {
    return each_lane([=](int i) { return to_float(from[i]); });
}
OUTRIDER_INLINE Vec load(const int8_t* from, int) {
    return each_lane([=](int i) { return static_cast<float>(from[i]); });
}

template <int kLevel>
OUTRIDER_INLINE Vec combine(Vec a, Vec b) {
    return {{a.lane[0] + a.lane[1], a.lane[2] + a.lane[3], b.lane[0] + b.lane[1], b.lane[2] + b.lane[3]}};
}

OUTRIDER_INLINE Vec in_order(Vec sums) { return sums; }

OUTRIDER_INLINE void transpose(Vec (&rows)[kWidth]) {
    for (int i = 0; i < kWidth; ++i) {
        for (int j = 0; j < i; ++j) {
            const float kept = rows[i].lane[j];
            rows[i].lane[j] = rows[j].lane[i];
            rows[j].lane[i] = kept;
        }
    }
}

OUTRIDER_INLINE Vec round_to_integer(Vec x) {
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: what is added to it loses its fraction
    return sub(add(x, magic), magic);
}
OUTRIDER_INLINE Vec times_power_of_two(Vec x, Vec exponent) {
    return each_lane([=](int i) {
        const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(exponent.lane[i]) + 127) << 23;
        float power;
        std::memcpy(&power, &bits, sizeof(power));
        return x.lane[i] * power;
    });
}

#endif

#if !defined(__AVX512BF16__)
template <class T>
OUTRIDER_INLINE void store(T* to, Vec x, int) {
    float lane[kWidth];
    store(lane, x);
    for (int i = 0; i < kWidth; ++i) store(to + i, lane[i]);
}
#endif

// Sum of all lanes, in the order of kLevelBits.
OUTRIDER_INLINE float sum(Vec x) {
    float lane[kWidth];
    store(lane, x);
    for (int bit : kLevelBits) {
        for (int i = 0; i < kWidth; ++i) {
            if (!(i & bit)) lane[i] += lane[i + bit];
        }
    }
    return lane[0];
}

OUTRIDER_INLINE float largest(Vec x) {
    float lane[kWidth];
    store(lane, x);
    float result = lane[0];
    for (int i = 1; i < kWidth; ++i) result = result > lane[i] ? result : lane[i];
    return result;
}

// e^x within 2 ulp for x below 88; at least 1e-38, also where the true one is less. NaN stays NaN.
OUTRIDER_INLINE Vec exp(Vec x) {
    x = max(splat(-87.3f), x);
    const Vec exponent = round_to_integer(mul(x, splat(1.44269504f)));
    const Vec high = fma(exponent, splat(-0.693359375f), x);
    const Vec r = fma(exponent, splat(2.12194440e-4f), high);
    constexpr float kSeries[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f};
    Vec series = splat(1.9875691500e-4f);
    for (float coefficient : kSeries) series = fma(series, r, splat(coefficient));
    return times_power_of_two(fma(mul(r, r), series, add(r, splat(1.0f))), exponent);
}

OUTRIDER_INLINE float exp(float x) {
    float lane[kWidth];
    store(lane, exp(splat(x)));
    return lane[0];
}

OUTRIDER_INLINE Vec tanh(Vec x) {
    const Vec bound = splat(-20.0f);  // there it is 1 to the last bit
    x = max(bound, x);
    x = sub(splat(0.0f), max(bound, sub(splat(0.0f), x)));
    const Vec power = exp(add(x, x));
    return div(sub(power, splat(1.0f)), add(power, splat(1.0f)));
}

}  // namespace outrider::OUTRIDER_ISA
