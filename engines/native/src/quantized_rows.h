// Activations as int8: for each group of a row, or for the whole row, the scale that maps its largest entry to 127.

#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "quantized.h"

namespace outrider::OUTRIDER_ISA {

// A call's activations. The number of groups is 1 for int8 weights.
struct QuantizedRows {
    int8_t* values;  // [num_rows, stride], zero behind in_features
    float* scales;   // [num_rows, num_groups]
    int32_t* sums;   // [num_rows, num_groups], of the values
    int64_t stride;
    int64_t num_groups;
};

// Below this an entry counts as zero: the reciprocal of 1/127 of it could overflow.
constexpr float kSmallest = 1e-35f;
constexpr float kLargestInt8 = 127.0f;

// The bits of the largest magnitude: as integers, magnitudes are ordered as they are as floats, NaN last.
inline uint32_t largest_magnitude(const float* input, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, input + i, sizeof(bits));
        largest = std::max(largest, bits & 0x7fffffffu);
    }
    return largest;
}

inline uint32_t largest_magnitude(const bf16* input, int64_t count) {
    uint16_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        largest = std::max(largest, static_cast<uint16_t>(input[i] & 0x7fffu));
    }
    return static_cast<uint32_t>(largest) << 16;
}

template <class In>
void quantize_group(const In* input, int64_t count, int8_t* values, float* scale, int32_t* sum) {
    const uint32_t bits = largest_magnitude(input, count);
    float largest;
    std::memcpy(&largest, &bits, sizeof(largest));
    const bool is_finite = bits < 0x7f800000u;
    if (!is_finite || largest < kSmallest) {
        std::memset(values, 0, count);
        *scale = is_finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        *sum = 0;
        return;
    }
    const float inverse = kLargestInt8 * (1.0f / largest);
    int32_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t value = static_cast<int32_t>(__builtin_rintf(to_float(input[i]) * inverse));
        values[i] = static_cast<int8_t>(value);
        total += value;
    }
    *scale = largest * (1.0f / kLargestInt8);
    *sum = total;
}

template <class In>
void quantize_row(const QuantizedLinear& linear, const In* input, const QuantizedRows& rows, int64_t row) {
    const int64_t group = linear.group_size ? linear.group_size : linear.in_features;
    const In* from = input + row * linear.in_features;
    int8_t* values = rows.values + row * rows.stride;
    for (int64_t g = 0; g < rows.num_groups; ++g) {
        const int64_t at = row * rows.num_groups + g;
        quantize_group(from + g * group, group, values + g * group, rows.scales + at, rows.sums + at);
    }
    std::memset(values + linear.in_features, 0, rows.stride - linear.in_features);
}

// Room for a call's rows, kept by the calling thread for its next call.
inline QuantizedRows make_room(const QuantizedLinear& linear, int64_t num_rows) {
    thread_local std::vector<int8_t> values;
    thread_local std::vector<float> scales;
    thread_local std::vector<int32_t> sums;
    const int64_t stride = (linear.in_features + 3) / 4 * 4;
    const int64_t num_groups = linear.group_size ? linear.in_features / linear.group_size : 1;
    values.resize(std::max<size_t>(values.size(), num_rows * stride));
    scales.resize(std::max<size_t>(scales.size(), num_rows * num_groups));
    sums.resize(std::max<size_t>(sums.size(), num_rows * num_groups));
    return {values.data(), scales.data(), sums.data(), stride, num_groups};
}

}  // namespace outrider::OUTRIDER_ISA
