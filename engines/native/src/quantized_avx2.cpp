// Quantized linear layers with AVX2, whose byte product adds pairs in 16 bits and saturates: int8 weights go in as
// magnitudes, their signs moved to the inputs, and 128 * 127 * 2 fits.

#if defined(__AVX2__)

#include <immintrin.h>

#include "quantized_tiles.h"

namespace outrider::avx2 {
namespace {

struct Lanes {
    struct Weights {
        __m256i first, second;
    };
    using Ints = Weights;
    struct Floats {
        __m256 first, second;
    };
    static constexpr int kRows = 4, kTiles = 1, kWideRows = 4;
    static constexpr bool kPrefetches = false;
    static constexpr int32_t kOffset = 0;

    static Ints ints(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
    static Floats floats(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    static Weights load(const uint8_t* from) { return {bytes(from), bytes(from + 32)}; }
    static Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
    static Floats load(const float* from, int64_t count) {
        float padded[kTileOutputs] = {};
        std::memcpy(padded, from, count * sizeof(float));
        return load(padded);
    }
    static Floats load(const bf16* from) { return {half(from), half(from + 8)}; }
    static Weights low(Weights w) {
        const __m256i mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(w.first, mask), _mm256_and_si256(w.second, mask)};
    }
    static Weights high(Weights w) { return low({_mm256_srli_epi16(w.first, 4), _mm256_srli_epi16(w.second, 4)}); }
    static Ints dot(Ints sums, Weights weights, int32_t inputs) {
        const __m256i four = _mm256_set1_epi32(inputs);
        return {dot_signed(sums.first, weights.first, four), dot_signed(sums.second, weights.second, four)};
    }
    static Ints dot_nibbles(Ints sums, Weights weights, int32_t inputs) {
        const __m256i four = _mm256_set1_epi32(inputs);
        return {dot_unsigned(sums.first, weights.first, four), dot_unsigned(sums.second, weights.second, four)};
    }
    static Floats to_floats(Ints values) { return {_mm256_cvtepi32_ps(values.first), _mm256_cvtepi32_ps(values.second)}; }
    static Floats multiply(Floats values, float by) {
        const __m256 factor = _mm256_set1_ps(by);
        return {_mm256_mul_ps(values.first, factor), _mm256_mul_ps(values.second, factor)};
    }
    static Floats add(Floats a, Floats b) {
        return {_mm256_add_ps(a.first, b.first), _mm256_add_ps(a.second, b.second)};
    }
    static Floats fma(Floats a, Floats b, Floats c) {
        return {_mm256_fmadd_ps(a.first, b.first, c.first), _mm256_fmadd_ps(a.second, b.second, c.second)};
    }
    template <class Out>
    static void store(Out* to, Floats values, int64_t count) {
        float buffer[kTileOutputs];
        _mm256_storeu_ps(buffer, values.first);
        _mm256_storeu_ps(buffer + 8, values.second);
        for (int64_t i = 0; i < count; ++i) avx2::store(to + i, buffer[i]);
    }

private:
    static __m256i bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
    static __m256 half(const bf16* from) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    static __m256i dot_unsigned(__m256i sums, __m256i weights, __m256i inputs) {
        const __m256i pairs = _mm256_maddubs_epi16(weights, inputs);
        return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static __m256i dot_signed(__m256i sums, __m256i weights, __m256i inputs) {
        weights = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
        return dot_unsigned(sums, _mm256_abs_epi8(weights), _mm256_sign_epi8(inputs, weights));
    }
};

}  // namespace

void quantized_linear(const QuantizedLinear& linear, const QuantizedCall& call) { run<Lanes>(linear, call); }

}  // namespace outrider::avx2

#endif
