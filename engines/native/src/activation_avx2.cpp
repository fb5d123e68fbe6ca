// Gated activations compiled for AVX2.

#if defined(__AVX2__)

#include "activation.h"

namespace outrider::avx2 {

void gated_activation(const GatedActivationCall& call) { gated_activation_any(call); }

}  // namespace outrider::avx2

#endif
