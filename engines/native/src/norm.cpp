// RMSNorm on any machine, and the choice of instruction set.

#include "norm.h"

namespace outrider::portable {

void norm(const NormCall& call) { norm_any(call); }

}  // namespace outrider::portable

using namespace outrider;

OUTRIDER_EXPORT void outrider_norm(const void* input, void* output, const float* scale, int64_t rows, int64_t size,
                                   float epsilon, Dtype dtype, int32_t num_threads) {
    const NormCall call{input, output, scale, rows, size, epsilon, dtype, num_threads};
    switch (current_isa()) {
#if defined(__x86_64__)
        case Isa::avx512: return avx512::norm(call);
        case Isa::avx2: return avx2::norm(call);
#endif
        default: return portable::norm(call);
    }
}
