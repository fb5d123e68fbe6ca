// Linear layers with AVX2: bf16 pairs are widened to fp32 as they are read.

#if defined(__AVX2__)

#include <immintrin.h>

#include "linear.h"

namespace outrider::avx2 {
namespace {

constexpr int kColumns = 16;  // of a panel at a time: with 4 rows, 8 registers of sums

struct Bf16Words {
    template <int Rows>
    __attribute__((always_inline)) static void step(const uint32_t* words, const char* input, int64_t input_bytes,
                                                    bool half, __m256 (&sums)[Rows][2]) {
        const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
        const __m256i left = _mm256_load_si256(reinterpret_cast<const __m256i*>(words));
        const __m256i right = _mm256_load_si256(reinterpret_cast<const __m256i*>(words + 8));
        const __m256 even[2] = {_mm256_castsi256_ps(_mm256_slli_epi32(left, 16)),
                                _mm256_castsi256_ps(_mm256_slli_epi32(right, 16))};
        const __m256 odd[2] = {_mm256_castsi256_ps(_mm256_and_si256(left, upper)),
                               _mm256_castsi256_ps(_mm256_and_si256(right, upper))};
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) {
            bf16 values[2] = {0, 0};
            std::memcpy(values, input + row * input_bytes, half ? 2 : 4);
            const __m256 first = _mm256_set1_ps(to_float(values[0])), second = _mm256_set1_ps(to_float(values[1]));
            for (int v = 0; v < 2; ++v) sums[row][v] = _mm256_fmadd_ps(first, even[v], sums[row][v]);
            for (int v = 0; v < 2; ++v) sums[row][v] = _mm256_fmadd_ps(second, odd[v], sums[row][v]);
        }
    }
};

struct Fp32Words {
    template <int Rows>
    __attribute__((always_inline)) static void step(const uint32_t* words, const char* input, int64_t input_bytes, bool,
                                                    __m256 (&sums)[Rows][2]) {
        const float* weights = reinterpret_cast<const float*>(words);
        const __m256 left = _mm256_load_ps(weights), right = _mm256_load_ps(weights + 8);
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) {
            const __m256 value = _mm256_broadcast_ss(reinterpret_cast<const float*>(input + row * input_bytes));
            sums[row][0] = _mm256_fmadd_ps(value, left, sums[row][0]);
            sums[row][1] = _mm256_fmadd_ps(value, right, sums[row][1]);
        }
    }
};

template <class Words, int Rows>
void run_columns(const LinearTile& tile, int first_column) {
    __m256 sums[Rows][2];
    float* at = tile.sums + first_column;
    for (int row = 0; row < Rows; ++row) {
        for (int v = 0; v < 2; ++v) sums[row][v] = _mm256_load_ps(at + row * kPanel + v * 8);
    }
    const uint32_t* words = tile.words + first_column;
    const char* input = tile.input;
    const int64_t whole = tile.steps - tile.half_last;
    for (int64_t step = 0; step < whole; ++step, input += kWordBytes, words += kPanel) {
        Words::step(words, input, tile.input_bytes, false, sums);
    }
    if (tile.half_last) Words::step(words, input, tile.input_bytes, true, sums);
    for (int row = 0; row < Rows; ++row) {
        for (int v = 0; v < 2; ++v) _mm256_store_ps(at + row * kPanel + v * 8, sums[row][v]);
    }
}

template <class Words, int Rows>
void run_tile(const LinearTile& tile) {
    for (int column = 0; column < kPanel; column += kColumns) run_columns<Words, Rows>(tile, column);
}

template <class Words>
struct Kernel {
    static constexpr int64_t kRows = 4;

    static void run(const LinearTile& tile, int64_t rows) {
        switch (rows) {
            case 1: return run_tile<Words, 1>(tile);
            case 2: return run_tile<Words, 2>(tile);
            case 3: return run_tile<Words, 3>(tile);
            default: return run_tile<Words, 4>(tile);
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

}  // namespace outrider::avx2

#endif
