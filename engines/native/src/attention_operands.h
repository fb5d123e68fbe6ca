// How numbers of a cache become operands of products.
//
// Singles: fp32, one number a lane. Pairs: bf16, two numbers a lane, for the AVX-512 instruction that multiplies both
// and adds the two products to the lane's fp32 sum. For query . key a pair is two neighbouring dimensions of a vector;
// for weights . values it is the same dimension of two neighbouring positions, which is why a unit of 2 * kWidth
// dimensions comes as two vectors with its dimensions interleaved, to be put in order when they are stored.

#pragma once

#include "attention_simd.h"

namespace outrider::OUTRIDER_ISA {

template <class CacheNumber>
struct Singles {
    using Query = float;
    using Cache = CacheNumber;
    static constexpr int kPair = 1;

    // The numbers of a lane each; of the last lanes of a vector only `count`, 0 beyond them.
    static OUTRIDER_INLINE Vec load_whole(const Cache* from) { return load(from, kWidth); }
    static OUTRIDER_INLINE Vec load_part(const Cache* from, int count) { return load(from, count); }
    static OUTRIDER_INLINE Vec load_query(const float* from) { return load(from); }
    static OUTRIDER_INLINE Vec broadcast(const float* from) { return splat(*from); }
    static OUTRIDER_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }

    static OUTRIDER_INLINE void in_order(Vec (&)[1]) {}

    template <class T>
    static void copy_query(const T* from, int dim, int padded, float* to) {
        for (int i = 0; i < dim; ++i) to[i] = to_float(from[i]);
        for (int i = dim; i < padded; ++i) to[i] = 0.0f;
    }
    static OUTRIDER_INLINE void store_weights(float* to, Vec weights) { store(to, weights); }
};

#if defined(__AVX512BF16__)

OUTRIDER_INLINE Vec load_pairs(const bf16* from) { return _mm512_castsi512_ps(_mm512_loadu_si512(from)); }
OUTRIDER_INLINE Vec load_pairs(const bf16* from, int count) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << count) - 1u, from));
}

// int8 numbers are exact in bf16.
OUTRIDER_INLINE Vec to_pairs(Vec low, Vec high) {
    return _mm512_castsi512_ps(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}
OUTRIDER_INLINE Vec load_pairs(const int8_t* from) { return to_pairs(load(from, kWidth), load(from + kWidth, kWidth)); }
OUTRIDER_INLINE Vec load_pairs(const int8_t* from, int count) {
    return to_pairs(load(from, count), load(from + kWidth, count < kWidth ? 0 : count - kWidth));
}

template <class CacheNumber>
struct Pairs {
    using Query = bf16;
    using Cache = CacheNumber;
    static constexpr int kPair = 2;

    static OUTRIDER_INLINE Vec load_whole(const Cache* from) { return load_pairs(from); }
    static OUTRIDER_INLINE Vec load_part(const Cache* from, int count) { return load_pairs(from, count); }
    static OUTRIDER_INLINE Vec load_query(const bf16* from) { return load_pairs(from); }
    static OUTRIDER_INLINE Vec broadcast(const bf16* from) {
        int32_t pair;
        std::memcpy(&pair, from, sizeof(pair));
        return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
    }
    static OUTRIDER_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }

    // Of two positions' numbers, those of the same dimension become pairs.
    static OUTRIDER_INLINE void interleave(Vec even, Vec odd, Vec (&unit)[2]) {
        const __m512i a = _mm512_castps_si512(even), b = _mm512_castps_si512(odd);
        unit[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
        unit[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
    }
    static OUTRIDER_INLINE void in_order(Vec (&unit)[2]) {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        const Vec low = unit[0], high = unit[1];
        unit[0] = _mm512_permutex2var_ps(low, first, high);
        unit[1] = _mm512_permutex2var_ps(low, second, high);
    }

    static void copy_query(const bf16* from, int dim, int padded, bf16* to) {
        std::memcpy(to, from, dim * sizeof(bf16));
        std::memset(to + dim, 0, (padded - dim) * sizeof(bf16));
    }
    static OUTRIDER_INLINE void store_weights(bf16* to, Vec weights) { store(to, weights, kWidth); }
};

#endif

}  // namespace outrider::OUTRIDER_ISA
