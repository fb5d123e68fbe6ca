// Gated activations on any machine, and the choice of instruction set.

#include "activation.h"

#include "entries.h"

namespace outrider::portable {

void gated_activation(const GatedActivationCall& call) { gated_activation_any(call); }

}  // namespace outrider::portable

using namespace outrider;

// activation(gate) * up, [rows, size], of an input [rows, 2 * size] that has the gates first.
OUTRIDER_EXPORT void outrider_gated_activation(const void* input, void* output, int64_t rows, int64_t size,
                                               Activation activation, Dtype dtype, int32_t num_threads) {
    const GatedActivationCall call{input, output, rows, size, activation, dtype, num_threads};
    switch (current_isa()) {
#if defined(__x86_64__)
        case Isa::avx512: return avx512::gated_activation(call);
        case Isa::avx2: return avx2::gated_activation(call);
#endif
        default: return portable::gated_activation(call);
    }
}
