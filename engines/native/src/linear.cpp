// Linear layers on any machine, the packing of weights, and the choice of instruction set.

#include "linear.h"

#include "entries.h"
#include "threads.h"

namespace outrider::portable {
namespace {

struct Bf16Words {
    static void step(const uint32_t* words, const char* input, bool half, float* sums) {
        bf16 values[2] = {0, 0};
        std::memcpy(values, input, half ? 2 : 4);
        const float first = to_float(values[0]), second = to_float(values[1]);
        for (int64_t column = 0; column < kPanel; ++column) {
            const float even = to_float(static_cast<bf16>(words[column])),
                        odd = to_float(static_cast<bf16>(words[column] >> 16));
            sums[column] = (sums[column] + first * even) + second * odd;
        }
    }
};

struct Fp32Words {
    static void step(const uint32_t* words, const char* input, bool, float* sums) {
        float value;
        std::memcpy(&value, input, sizeof(value));
        const float* weights = reinterpret_cast<const float*>(words);
        for (int64_t column = 0; column < kPanel; ++column) sums[column] += value * weights[column];
    }
};

template <class Words>
struct Kernel {
    static constexpr int64_t kRows = 1;

    static void run(const LinearTile& tile, int64_t) {
        for (int64_t step = 0; step < tile.steps; ++step) {
            const bool half = tile.half_last && step + 1 == tile.steps;
            Words::step(tile.words + step * kPanel, tile.input + step * kWordBytes, half, tile.sums);
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

}  // namespace outrider::portable

namespace outrider {
namespace {

// Where to put outputs [first_column, first_column + out_features) of the packed matrix.
struct Packing {
    uint32_t* words;
    int64_t steps;
    int64_t first_column;
    bool gated;

    // Word 0 of a layer's output. Gated: outputs [0, n) are gates and [n, 2n) are ups of the same panels.
    uint32_t* column(int64_t output, int64_t packed_outputs) const {
        int64_t panel = (first_column + output) / kPanel, at = (first_column + output) % kPanel;
        if (gated) {
            const int64_t half = packed_outputs / 2, width = kPanel / 2;
            const int64_t index = (first_column + output) % half;
            panel = index / width;
            at = index % width + ((first_column + output) < half ? 0 : width);
        }
        return words + panel * steps * kPanel + at;
    }
};

void pack_bf16(const uint16_t* from, int64_t in_features, uint32_t* to) {
    for (int64_t i = 0; i < in_features; i += 2, to += kPanel) {
        const uint32_t odd = i + 1 < in_features ? from[i + 1] : 0;
        *to = from[i] | odd << 16;
    }
}

void pack_fp32(const uint32_t* from, int64_t in_features, uint32_t* to) {
    for (int64_t i = 0; i < in_features; ++i, to += kPanel) *to = from[i];
}

}  // namespace
}  // namespace outrider

using namespace outrider;

// Pack a weight [out_features, in_features], contiguous, as columns from `first_column` of `words`, which the caller
// has cleared; `packed_outputs` is the number of columns of all weights that are packed there together.
OUTRIDER_EXPORT void outrider_pack_linear(uint32_t* words, int64_t packed_outputs, int64_t first_column,
                                          const void* weight, int64_t out_features, int64_t in_features, Dtype dtype,
                                          bool gated, int32_t num_threads) {
    const int64_t steps = dtype == Dtype::bf16 ? (in_features + 1) / 2 : in_features;
    const Packing packing{words, steps, first_column, gated};
    parallel_for(num_threads, out_features, [&](int64_t output) {
        uint32_t* to = packing.column(output, packed_outputs);
        if (dtype == Dtype::bf16) {
            pack_bf16(static_cast<const uint16_t*>(weight) + output * in_features, in_features, to);
        } else {
            pack_fp32(static_cast<const uint32_t*>(weight) + output * in_features, in_features, to);
        }
    });
}

// Output [rows, out_features] of the packed layer for an input [rows, in_features] whose rows are `input_stride` values
// apart.
OUTRIDER_EXPORT void outrider_linear(const PackedWeight* weight, const void* input, int64_t input_stride, void* output,
                                     Dtype output_dtype, int64_t rows, int32_t num_threads) {
    const LinearCall call{weight, input, input_stride, output, output_dtype, rows, num_threads};
    switch (current_isa()) {
#if defined(__x86_64__)
        case Isa::avx512: return avx512::linear(call);
        case Isa::avx2: return avx2::linear(call);
#endif
        default: return portable::linear(call);
    }
}
