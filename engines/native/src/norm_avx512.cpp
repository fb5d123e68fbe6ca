// RMSNorm compiled for AVX-512.

#if defined(__AVX512BF16__)

#include "norm.h"

namespace outrider::avx512 {

void norm(const NormCall& call) { norm_any(call); }

void add(const AddCall& call) { add_any(call); }

}  // namespace outrider::avx512

#endif
