// Head norms and rotary embedding on any machine, and the choice of instruction set.

#include "rotary.h"

#include "entries.h"

namespace outrider::portable {

void rotary(const RotaryCall& call) { rotary_any(call); }

}  // namespace outrider::portable

using namespace outrider;

OUTRIDER_EXPORT void outrider_rotary(const RotaryLayer* layer, void* heads, int64_t row_stride, const void* cosines,
                                     const void* sines, int64_t rotary_dim, int64_t rows, int32_t num_threads) {
    const RotaryCall call{layer, heads, row_stride, cosines, sines, rotary_dim, rows, num_threads};
    switch (current_isa()) {
#if defined(__x86_64__)
        case Isa::avx512: return avx512::rotary(call);
        case Isa::avx2: return avx2::rotary(call);
#endif
        default: return portable::rotary(call);
    }
}
