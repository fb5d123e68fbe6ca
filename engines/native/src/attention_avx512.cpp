// Attention with AVX-512 and its bf16 products.

#if defined(__AVX512BF16__)
#include "attention_kernel.h"
#endif
