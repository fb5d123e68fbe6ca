// The exported kernels that other kernels call; each is described where it is defined, and includes this so that the two
// cannot differ.

#pragma once

#include "activation.h"
#include "attention.h"
#include "common.h"
#include "linear.h"
#include "quantized.h"
#include "rotary.h"

OUTRIDER_EXPORT void outrider_norm(const void* input, void* output, const float* scale, int64_t rows, int64_t size,
                                   float epsilon, outrider::Dtype dtype, int32_t num_threads);
OUTRIDER_EXPORT void outrider_add(const void* first, const void* second, void* sum, int64_t num_values,
                                  outrider::Dtype dtype, int32_t num_threads);
OUTRIDER_EXPORT void outrider_linear(const outrider::PackedWeight* weight, const void* input, int64_t input_stride,
                                     void* output, outrider::Dtype output_dtype, int64_t rows, int32_t num_threads);
OUTRIDER_EXPORT void outrider_quantized_linear(const outrider::QuantizedLinear* linear,
                                               const outrider::QuantizedCall* call);
OUTRIDER_EXPORT void outrider_rotary(const outrider::RotaryLayer* layer, void* heads, int64_t row_stride,
                                     const void* cosines, const void* sines, int64_t rotary_dim, int64_t rows,
                                     int32_t num_threads);
OUTRIDER_EXPORT void outrider_attend(const outrider::AttentionArgs* args);
OUTRIDER_EXPORT void outrider_gated_activation(const void* input, void* output, int64_t rows, int64_t size,
                                               outrider::Activation activation, outrider::Dtype dtype,
                                               int32_t num_threads);
