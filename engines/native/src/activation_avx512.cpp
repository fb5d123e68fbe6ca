// Gated activations compiled for AVX-512.

#if defined(__AVX512BF16__)

#include "activation.h"

namespace outrider::avx512 {

void gated_activation(const GatedActivationCall& call) { gated_activation_any(call); }

}  // namespace outrider::avx512

#endif
