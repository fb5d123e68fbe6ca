// Attention with AVX2.

#if defined(__AVX2__)
#include "attention_kernel.h"
#endif
