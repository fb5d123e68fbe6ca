// Linear layers with AVX-512: bf16 pairs through vdpbf16ps, fp32 through fused multiply-add.

#if defined(__AVX512BF16__)

#include <immintrin.h>

#include "linear.h"

namespace outrider::avx512 {
namespace {

constexpr int kVectors = kPanel / 16;

struct Bf16Words {
    static __m512 dot(__m512 sum, __m512i input, __m512i weight) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(input), reinterpret_cast<__m512bh>(weight));
    }
};

struct Fp32Words {
    static __m512 dot(__m512 sum, __m512i input, __m512i weight) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(input), _mm512_castsi512_ps(weight), sum);
    }
};

inline int32_t word_at(const char* from) {
    int32_t word;
    std::memcpy(&word, from, sizeof(word));
    return word;
}

inline int32_t half_word_at(const char* from) {
    uint16_t half;
    std::memcpy(&half, from, sizeof(half));
    return half;
}

template <class Words, int Rows>
struct Sums {
    __m512 values[Rows][kVectors];

    template <class LoadInput>
    __attribute__((always_inline)) void step(const uint32_t* words, LoadInput load_input) {
        __m512i weight[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) weight[v] = _mm512_load_si512(words + v * 16);
#pragma GCC unroll 8
        for (int row = 0; row < Rows; ++row) {
            const __m512i input = _mm512_set1_epi32(load_input(row));
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) values[row][v] = Words::dot(values[row][v], input, weight[v]);
        }
    }
};

template <class Words, int Rows>
void run_tile(const LinearTile& tile) {
    Sums<Words, Rows> sums;
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums.values[row][v] = _mm512_load_ps(tile.sums + row * kPanel + v * 16);
    }
    const int64_t whole = tile.steps - tile.half_last;
    const char* prefetch = tile.prefetch;
    const char* input = tile.input;
    const uint32_t* words = tile.words;
    for (int64_t step = 0; step < whole; ++step, input += kWordBytes, words += kPanel) {
        for (int64_t line = 0; line < tile.prefetch_lines; ++line, prefetch += 64) _mm_prefetch(prefetch, _MM_HINT_T0);
        sums.step(words, [&](int row) { return word_at(input + row * tile.input_bytes); });
    }
    if (tile.half_last) sums.step(words, [&](int row) { return half_word_at(input + row * tile.input_bytes); });
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) _mm512_store_ps(tile.sums + row * kPanel + v * 16, sums.values[row][v]);
    }
}

template <class Words>
struct Kernel {
    static constexpr int64_t kRows = 6;  // 24 registers of sums, 4 of weights, 1 of input

    static void run(const LinearTile& tile, int64_t rows) {
        switch (rows) {
            case 1: return run_tile<Words, 1>(tile);
            case 2: return run_tile<Words, 2>(tile);
            case 3: return run_tile<Words, 3>(tile);
            case 4: return run_tile<Words, 4>(tile);
            case 5: return run_tile<Words, 5>(tile);
            default: return run_tile<Words, 6>(tile);
        }
    }
};

}  // namespace

void linear(const LinearCall& call) {
    if (call.weight->dtype == Dtype::bf16) {
        run_panels<Kernel<Bf16Words>>(call);
    } else {
        run_panels<Kernel<Fp32Words>>(call);
    }
}

}  // namespace outrider::avx512

#endif
