// RMSNorm on any machine, and the choice of instruction set.

#include "norm.h"

#include "entries.h"

namespace outrider::portable {

void norm(const NormCall& call) { norm_any(call); }

void add(const AddCall& call) { add_any(call); }

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

// first + second, value by value, in fp32, rounded once.
OUTRIDER_EXPORT void outrider_add(const void* first, const void* second, void* sum, int64_t num_values, Dtype dtype,
                                  int32_t num_threads) {
    const AddCall call{first, second, sum, num_values, dtype, num_threads};
    switch (current_isa()) {
#if defined(__x86_64__)
        case Isa::avx512: return avx512::add(call);
        case Isa::avx2: return avx2::add(call);
#endif
        default: return portable::add(call);
    }
}
