// Linear layers with int8 or int4 weights: y = x W^T + b, where only whole numbers are multiplied and added.
//
// Activations become int8 when the call begins, each row by itself: one scale a row for int8 weights, one for each of a
// row's groups for int4 weights. Products are summed in int32, exactly, so nothing depends on tiling, on threads, on the
// instruction set or on the other rows; the float operations after that have one order:
//
//     int8    y = fma(sum, row_scale * channel_scale, bias)
//     int4    t = fma(sum_g, row_scale_g * weight_scale_g, t) for the groups g in turn, from t = 0; y = t + bias
//
// A row that is not finite has a scale of NaN, hence outputs of NaN.
//
// Weights are packed for the byte dot product: 16 outputs are a tile, whose vector of 64 bytes holds 4 inputs of each
// (int8, stored plus 128) or 8 (int4, stored plus 8, inputs 0..3 in the low half of the bytes and 4..7 in the high); 4
// tiles, or what is left, are a panel, stored input by input: [panels][inputs / 4 or 8][tiles][16][4].

#pragma once

#include "common.h"

namespace outrider {

constexpr int64_t kTileOutputs = 16;
constexpr int64_t kPanelTiles = 4;
constexpr int64_t kPanelOutputs = kTileOutputs * kPanelTiles;
constexpr int64_t kVectorBytes = 64;

// A packed layer. Outputs are padded to whole tiles, inputs of int8 to a multiple of 4.
struct QuantizedLinear {
    const uint8_t* weights;
    const void* scales;  // int8: float [outputs]; int4: [panels][groups][tiles][16]
    const float* bias;   // [outputs], or null
    int64_t in_features;
    int64_t out_features;
    int64_t group_size;  // inputs of an int4 scale, a multiple of 8 that divides in_features; 0 for int8
    int32_t scales_are_bf16;
};

struct QuantizedCall {
    const void* input;  // [num_rows, in_features], bf16 or float
    void* output;       // [num_rows, out_features], of the same type
    int64_t num_rows;
    int32_t is_bf16;
    int32_t num_threads;
};

namespace OUTRIDER_ISA {

void quantized_linear(const QuantizedLinear& linear, const QuantizedCall& call);

}  // namespace OUTRIDER_ISA

}  // namespace outrider
