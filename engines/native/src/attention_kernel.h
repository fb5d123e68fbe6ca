// The kernels of one instruction set as a table of functions, and the write of keys and values to their slots.

#pragma once


#include <type_traits>

#include "attention_tile.h"

namespace outrider::OUTRIDER_ISA {

template <class T>
inline void write_vector(const T* from, int64_t dim, T* to) {
    std::memcpy(to, from, dim * sizeof(T));
}

// int8 = round(number / scale), half to even, scale = largest magnitude / 127; all 0 where the scale is 0 or NaN, which
// it is if any number is NaN or infinite.
template <class T>
inline void write_vector(const T* from, int64_t dim, int8_t* to) {
    float largest = 0.0f, poison = 0.0f;
    for (int64_t i = 0; i < dim; ++i) {
        const float number = to_float(from[i]), magnitude = number < 0.0f ? -number : number;
        largest = magnitude > largest ? magnitude : largest;
        poison += number * 0.0f;
    }
    const float scale = largest / 127.0f + poison;
    const float divisor = scale > 0.0f ? scale : 1.0f;
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: a float that adds it has no room for a fraction
    for (int64_t i = 0; i < dim; ++i) {
        const float rounded = (to_float(from[i]) / divisor + kMagic) - kMagic;
        const float bounded = rounded > 127.0f ? 127.0f : rounded < -127.0f ? -127.0f : rounded;
        to[i] = scale > 0.0f ? static_cast<int8_t>(bounded) : 0;
    }
    std::memcpy(to + dim, &scale, sizeof(scale));
}

template <class T, class Cache>
struct AttentionFunctions {
#if defined(__AVX512BF16__)
    using Op = std::conditional_t<std::is_same_v<T, bf16>, Pairs<Cache>, Singles<Cache>>;
#else
    using Op = Singles<Cache>;
#endif

    static void write_token(const AttentionArgs& args, int64_t token) {
        constexpr int64_t kExtra = std::is_same_v<Cache, int8_t> ? kScaleBytes : 0;
        const int64_t row = args.slot_mapping[token] * args.num_kv_heads;
        const T* key = static_cast<const T*>(args.key) + token * args.key_stride;
        const T* value = static_cast<const T*>(args.value) + token * args.value_stride;
        Cache* key_to = static_cast<Cache*>(args.key_cache) + row * (args.head_dim + kExtra);
        Cache* value_to = static_cast<Cache*>(args.value_cache) + row * (args.value_dim + kExtra);
        for (int64_t head = 0; head < args.num_kv_heads; ++head) {
            write_vector(key + head * args.key_head_stride, args.head_dim, key_to + head * (args.head_dim + kExtra));
            write_vector(value + head * args.value_head_stride, args.value_dim,
                         value_to + head * (args.value_dim + kExtra));
        }
    }

    static int64_t scratch_bytes(const AttentionArgs& args) {
        return TileScratch<Op>(TileLayout<Op>(args), nullptr).end - static_cast<char*>(nullptr);
    }

    static void attend(const AttentionArgs& args, const AttentionItem& item, char* scratch) {
        Tile<Op, T>(args, item, scratch).attend();
    }

    static void merge(const AttentionArgs& args, const AttentionItem& item, char* scratch) {
        Tile<Op, T>(args, item, scratch).merge();
    }

    static constexpr AttentionKernel table() {
        return {write_token, scratch_bytes, Tile<Op, T>::partial_floats, attend, merge};
    }
};

AttentionKernel attention_kernel(bool is_fp32, bool is_int8) {
    if (is_fp32) {
        return is_int8 ? AttentionFunctions<float, int8_t>::table() : AttentionFunctions<float, float>::table();
    }
    return is_int8 ? AttentionFunctions<bf16, int8_t>::table() : AttentionFunctions<bf16, bf16>::table();
}

}  // namespace outrider::OUTRIDER_ISA
