// Value types that kernels take, as they cross the C ABI.

#pragma once

#include <cstdint>

namespace outrider {

enum class Dtype : int32_t { bf16 = 0, fp32 = 1 };

// Work, in values, below which waking other threads costs more than it saves.
constexpr int64_t kValuesWorthThreads = 32768;

}  // namespace outrider
