#if defined(__AVX2__)
#include "sampling_rows.h"
#endif
