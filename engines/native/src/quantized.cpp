// Quantized linear layers for any machine, and the choice among what was compiled.

#include "quantized.h"

#include "entries.h"
#include "quantized_tiles.h"

namespace outrider {
namespace portable {
namespace {

struct Lanes {
    struct Weights {
        uint8_t bytes[kVectorBytes];
    };
    struct Ints {
        int32_t values[kTileOutputs];
    };
    struct Floats {
        float values[kTileOutputs];
    };
    static constexpr int kRows = 1, kTiles = 1, kWideRows = 1;
    static constexpr bool kPrefetches = false;
    static constexpr int32_t kOffset = 0;

    template <class Out, class Function>
    static Out each(Function function) {
        Out out;
        for (int i = 0; i < kTileOutputs; ++i) out.values[i] = function(i);
        return out;
    }
    static Ints ints(int32_t value) {
        return each<Ints>([=](int) { return value; });
    }
    static Floats floats(float value) {
        return each<Floats>([=](int) { return value; });
    }
    static Weights load(const uint8_t* from) {
        Weights weights;
        std::memcpy(weights.bytes, from, sizeof(weights.bytes));
        return weights;
    }
    template <class In>
    static Floats load(const In* from, int64_t count = kTileOutputs) {
        return each<Floats>([=](int i) { return i < count ? to_float(from[i]) : 0.0f; });
    }
    static Weights low(Weights weights) {
        for (uint8_t& byte : weights.bytes) byte &= 15;
        return weights;
    }
    static Weights high(Weights weights) {
        for (uint8_t& byte : weights.bytes) byte >>= 4;
        return weights;
    }
    static Ints dot(const Ints& sums, const Weights& weights, int32_t inputs) {
        return dot_less(sums, weights, inputs, 128);
    }
    static Ints dot_nibbles(const Ints& sums, const Weights& weights, int32_t inputs) {
        return dot_less(sums, weights, inputs, 0);
    }
    static Floats to_floats(const Ints& ints) {
        return each<Floats>([&](int i) { return static_cast<float>(ints.values[i]); });
    }
    static Floats multiply(const Floats& floats, float by) {
        return each<Floats>([&](int i) { return floats.values[i] * by; });
    }
    static Floats add(const Floats& a, const Floats& b) {
        return each<Floats>([&](int i) { return a.values[i] + b.values[i]; });
    }
    static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
        return each<Floats>([&](int i) { return __builtin_fmaf(a.values[i], b.values[i], c.values[i]); });
    }
    template <class Out>
    static void store(Out* to, const Floats& floats, int64_t count) {
        for (int64_t i = 0; i < count; ++i) portable::store(to + i, floats.values[i]);
    }

private:
    static Ints dot_less(const Ints& sums, const Weights& weights, int32_t inputs, int32_t offset) {
        int8_t four[4];
        std::memcpy(four, &inputs, sizeof(four));
        return each<Ints>([&](int i) {
            int32_t sum = sums.values[i];
            for (int k = 0; k < 4; ++k) sum += (weights.bytes[4 * i + k] - offset) * four[k];
            return sum;
        });
    }
};

}  // namespace

void quantized_linear(const QuantizedLinear& linear, const QuantizedCall& call) { run<Lanes>(linear, call); }

}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
void quantized_linear(const QuantizedLinear& linear, const QuantizedCall& call);
}
namespace avx512 {
void quantized_linear(const QuantizedLinear& linear, const QuantizedCall& call);
}
#endif
}  // namespace outrider

// One layer over some rows. Not for two threads with the same output.
OUTRIDER_EXPORT void outrider_quantized_linear(const outrider::QuantizedLinear* linear,
                                               const outrider::QuantizedCall* call) {
#if defined(__x86_64__)
    if (outrider::current_isa() == outrider::Isa::avx512) return outrider::avx512::quantized_linear(*linear, *call);
    if (outrider::current_isa() == outrider::Isa::avx2) return outrider::avx2::quantized_linear(*linear, *call);
#endif
    outrider::portable::quantized_linear(*linear, *call);
}
