// A whole decoder layer in one call, of the kind that most models are made of:
//
//     y = x + out(attention(rotary(qkv(norm(x)))))
//     z = y + down(activation(gate(norm(y))) * up(norm(y)))
//
// These are the other kernels in their order, so the bits are theirs. What is saved is the way from one to the next
// through Python, some 0.1 ms a layer: a tenth of a step of few rows, and most of one of a small draft model.

#pragma once

#include "attention.h"
#include "linear.h"
#include "quantized.h"
#include "rotary.h"

namespace outrider {

// A linear layer of either kind; the other one is null.
struct LayerLinear {
    const PackedWeight* packed;
    const QuantizedLinear* quantized;
};

// What is the same in every call of a layer. Mirrored by engines/native/decoder_layer.py.
struct DecoderLayer {
    const float* attention_norm;  // [hidden_size]
    const float* mlp_norm;        // [hidden_size]
    LayerLinear qkv;              // queries, keys and values side by side
    LayerLinear out;
    LayerLinear gate_up;  // packed: gated, so that the output is the product; quantized: gates, then ups
    LayerLinear down;
    const RotaryLayer* rotary;
    int64_t hidden_size;
    int64_t window;  // of AttentionArgs, as what follows
    float scaling;
    float softcap;
    float attention_epsilon;
    float mlp_epsilon;
    Activation activation;
    Dtype dtype;
};

// One call.
struct DecoderStep {
    AttentionArgs* attention;  // the step's part and the caches are set; the rest is filled in
    const void* input;         // [num_tokens, hidden_size], contiguous
    void* output;              // the same
    void* workspace;           // of outrider_decoder_layer_bytes
    const void* cosines;       // [num_tokens, rotary_dim], contiguous
    const void* sines;
    int64_t rotary_dim;
};

}  // namespace outrider
