// Head norms and rotary embedding compiled for AVX2.

#if defined(__AVX2__)

#include "rotary.h"

namespace outrider::avx2 {

void rotary(const RotaryCall& call) { rotary_any(call); }

}  // namespace outrider::avx2

#endif
