// Head norms and rotary embedding compiled for AVX-512.

#if defined(__AVX512BF16__)

#include "rotary.h"

namespace outrider::avx512 {

void rotary(const RotaryCall& call) { rotary_any(call); }

}  // namespace outrider::avx512

#endif
