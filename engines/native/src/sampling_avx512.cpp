#if defined(__AVX512BF16__)
#include "sampling_rows.h"
#endif
