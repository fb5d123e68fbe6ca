// Quantized linear layers with AVX-512 VNNI.

#if defined(__AVX512BF16__)

// GCC 12 takes the intrinsics' own undefined operands for ours (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "quantized_tiles.h"

namespace outrider::avx512 {
namespace {

struct Lanes {
    using Weights = __m512i;
    using Ints = __m512i;
    using Floats = __m512;
    static constexpr int kRows = 6, kTiles = 4, kWideRows = 3;
    static constexpr bool kPrefetches = true;
    static constexpr int32_t kOffset = 128;

    static Ints ints(int32_t value) { return _mm512_set1_epi32(value); }
    static Floats floats(float value) { return _mm512_set1_ps(value); }
    static Weights load(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static Floats load(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(mask(count), from); }
    static Floats load(const bf16* from) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    static Weights low(Weights bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
    static Weights high(Weights bytes) { return low(_mm512_srli_epi16(bytes, 4)); }
    static Ints dot(Ints sums, Weights weights, int32_t inputs) {
        return _mm512_dpbusd_epi32(sums, weights, _mm512_set1_epi32(inputs));
    }
    static Ints dot_nibbles(Ints sums, Weights weights, int32_t inputs) { return dot(sums, weights, inputs); }
    static Floats to_floats(Ints values) { return _mm512_cvtepi32_ps(values); }
    static Floats multiply(Floats values, float by) { return _mm512_mul_ps(values, _mm512_set1_ps(by)); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static void store(float* to, Floats values, int64_t count) { _mm512_mask_storeu_ps(to, mask(count), values); }
    static void store(bf16* to, Floats values, int64_t count) {
        // Not the conversion instruction, which flushes subnormal numbers.
        const __m512i bits = _mm512_castps_si512(values);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
        const __m512i result = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
        _mm256_mask_storeu_epi16(to, mask(count), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
    }
    static __mmask16 mask(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
};

}  // namespace

void quantized_linear(const QuantizedLinear& linear, const QuantizedCall& call) { run<Lanes>(linear, call); }

}  // namespace outrider::avx512

#endif
