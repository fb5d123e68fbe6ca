// Sampling for any machine, and the choice among what was compiled.

#include "sampling.h"
#include "sampling_rows.h"

namespace outrider {
#if defined(__x86_64__)
namespace avx2 {
void draw_rows(const Draws& draws);
void believe_rows(const Beliefs& beliefs);
}  // namespace avx2
namespace avx512 {
void draw_rows(const Draws& draws);
void believe_rows(const Beliefs& beliefs);
}  // namespace avx512
#endif
}  // namespace outrider

OUTRIDER_EXPORT void outrider_draw(const outrider::Draws* draws) {
#if defined(__x86_64__)
    if (outrider::current_isa() == outrider::Isa::avx512) return outrider::avx512::draw_rows(*draws);
    if (outrider::current_isa() == outrider::Isa::avx2) return outrider::avx2::draw_rows(*draws);
#endif
    outrider::portable::draw_rows(*draws);
}

OUTRIDER_EXPORT void outrider_believe(const outrider::Beliefs* beliefs) {
#if defined(__x86_64__)
    if (outrider::current_isa() == outrider::Isa::avx512) return outrider::avx512::believe_rows(*beliefs);
    if (outrider::current_isa() == outrider::Isa::avx2) return outrider::avx2::believe_rows(*beliefs);
#endif
    outrider::portable::believe_rows(*beliefs);
}
