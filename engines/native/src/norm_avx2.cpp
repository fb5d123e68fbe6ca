// RMSNorm compiled for AVX2.

#if defined(__AVX2__)

#include "norm.h"

namespace outrider::avx2 {

void norm(const NormCall& call) { norm_any(call); }

void add(const AddCall& call) { add_any(call); }

}  // namespace outrider::avx2

#endif
