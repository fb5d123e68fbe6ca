// A decoder layer by the kernels that are there; see decoder_layer.h.

#include "decoder_layer.h"

#include "entries.h"

namespace outrider {
namespace {

int64_t outputs_of(const LayerLinear& linear) {
    return linear.packed != nullptr ? linear.packed->out_features : linear.quantized->out_features;
}

int64_t inputs_of(const LayerLinear& linear) {
    return linear.packed != nullptr ? linear.packed->in_features : linear.quantized->in_features;
}

// Where intermediate values lie; counted without memory by a null start.
struct Workspace {
    Workspace(const DecoderLayer& layer, int64_t rows, void* start)
        : next(static_cast<char*>(start)), rows(rows), value_bytes(layer.dtype == Dtype::bf16 ? 2 : 4) {
        normed = take(layer.hidden_size);
        delta = take(layer.hidden_size);
        qkv = take(outputs_of(layer.qkv));
        attended = take(inputs_of(layer.out));
        gate_up = take(outputs_of(layer.gate_up));
        gated = layer.gate_up.packed != nullptr ? gate_up : take(inputs_of(layer.down));
        bytes = next - static_cast<char*>(start);
    }

    void* take(int64_t width) {
        constexpr int64_t kLine = 64;
        void* taken = next;
        next += (rows * width * value_bytes + kLine - 1) / kLine * kLine;
        return taken;
    }

    char* next;
    int64_t rows, value_bytes, bytes;
    void *normed, *delta, *qkv, *attended, *gate_up, *gated;
};

struct Run {
    const DecoderLayer& layer;
    const DecoderStep& step;
    const Workspace space;
    const int64_t rows = step.attention->num_tokens;
    const int32_t num_threads = static_cast<int32_t>(step.attention->num_threads);

    void whole() {
        norm(step.input, layer.attention_norm, layer.attention_epsilon);
        linear(layer.qkv, space.normed, space.qkv);
        outrider_rotary(layer.rotary, space.qkv, outputs_of(layer.qkv), step.cosines, step.sines, step.rotary_dim, rows,
                        num_threads);
        attend();
        linear(layer.out, space.attended, space.delta);
        add(step.input);
        norm(step.output, layer.mlp_norm, layer.mlp_epsilon);
        linear(layer.gate_up, space.normed, space.gate_up);
        if (space.gated != space.gate_up) {
            outrider_gated_activation(space.gate_up, space.gated, rows, inputs_of(layer.down), layer.activation,
                                      layer.dtype, num_threads);
        }
        linear(layer.down, space.gated, space.delta);
        add(step.output);
    }

    void norm(const void* input, const float* scale, float epsilon) const {
        outrider_norm(input, space.normed, scale, rows, layer.hidden_size, epsilon, layer.dtype, num_threads);
    }

    void linear(const LayerLinear& linear, const void* input, void* output) const {
        if (linear.packed != nullptr) {
            return outrider_linear(linear.packed, input, linear.packed->in_features, output, layer.dtype, rows,
                                   num_threads);
        }
        const QuantizedCall call{input, output, rows, layer.dtype == Dtype::bf16, num_threads};
        outrider_quantized_linear(linear.quantized, &call);
    }

    void add(const void* residual) const {
        outrider_add(residual, space.delta, step.output, rows * layer.hidden_size, layer.dtype, num_threads);
    }

    void attend() const {
        AttentionArgs& args = *step.attention;
        const RotaryLayer& heads = *layer.rotary;
        const int64_t stride = outputs_of(layer.qkv);
        const auto head = [&](int64_t index) {
            return static_cast<const char*>(space.qkv) + index * heads.head_dim * space.value_bytes;
        };
        args.query = head(0);
        args.key = head(heads.num_query_heads);
        args.value = head(heads.num_query_heads + heads.num_key_heads);
        args.output = space.attended;
        args.sinks = nullptr;
        args.query_stride = args.key_stride = args.value_stride = stride;
        args.query_head_stride = args.key_head_stride = args.value_head_stride = heads.head_dim;
        args.num_heads = heads.num_query_heads;
        args.num_kv_heads = heads.num_key_heads;
        args.head_dim = args.value_dim = heads.head_dim;
        args.window = layer.window;
        args.scaling = layer.scaling;
        args.softcap = layer.softcap;
        args.is_fp32 = layer.dtype == Dtype::fp32;
        outrider_attend(&args);
    }
};

}  // namespace
}  // namespace outrider

// Bytes of work space for so many rows.
OUTRIDER_EXPORT int64_t outrider_decoder_layer_bytes(const outrider::DecoderLayer* layer, int64_t rows) {
    return outrider::Workspace(*layer, rows, nullptr).bytes;
}

OUTRIDER_EXPORT void outrider_decoder_layer(const outrider::DecoderLayer* layer, const outrider::DecoderStep* step) {
    outrider::Run{*layer, *step, outrider::Workspace(*layer, step->attention->num_tokens, step->workspace)}.whole();
}
