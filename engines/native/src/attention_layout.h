// How long things are in one call, and where they lie in a thread's scratch memory.

#pragma once

#include <type_traits>

#include "attention_softmax.h"

namespace outrider::OUTRIDER_ISA {

template <class Op>
struct TileLayout {
    int group, rows;         // query heads of a KV head; most query rows of an item
    int key_dim, key_steps;  // numbers of a key; vectors of operands it makes
    int query_size;          // numbers of a query, padded to whole operands
    int value_dim, value_units, value_size;
    int64_t key_vector, value_vector;  // cache numbers from one head's vector to the next's

    explicit TileLayout(const AttentionArgs& args) {
        constexpr int kNumbers = kWidth * Op::kPair;
        group = static_cast<int>(args.num_heads / args.num_kv_heads);
        rows = group > kMaxTileRows ? group : kMaxTileRows;
        key_dim = static_cast<int>(args.head_dim);
        key_steps = (key_dim + kNumbers - 1) / kNumbers;
        query_size = key_steps * kNumbers;
        value_dim = static_cast<int>(args.value_dim);
        value_units = (value_dim + kNumbers - 1) / kNumbers;
        value_size = value_units * kNumbers;
        key_vector = key_dim + (args.is_int8 ? kScaleBytes : 0);
        value_vector = value_dim + (args.is_int8 ? kScaleBytes : 0);
    }
};

template <class Op>
struct TileScratch {
    using Query = typename Op::Query;
    Query* query;      // [rows, query_size]
    float* scores;     // [rows, kChunk]
    Query* weights;    // [rows, kChunk]
    float* keys;       // packed
    float* values;     // packed
    float* share;      // of one chunk and head
    float* sums;       // shares of all chunks so far
    float* key_scales;  // [kChunk]
    float* value_scales;
    int64_t* key_offsets;  // [2][kChunk]: of this chunk and the next
    int64_t* value_offsets;
    typename Op::Cache* zeros;  // a value
    int32_t* position;          // [rows]: of each query row, counted from the item's first
    char* end;

    TileScratch(const TileLayout<Op>& layout, char* memory) {
        const auto take = [&memory](auto*& part, int64_t count) {
            part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(memory);
            memory += (count * static_cast<int64_t>(sizeof(*part)) + 63) / 64 * 64;
        };
        const int rows = layout.rows;
        take(query, static_cast<int64_t>(rows) * layout.query_size);
        take(scores, rows * kChunk);
        take(weights, rows * kChunk);
        take(keys, static_cast<int64_t>(layout.key_steps) * kWidth * kChunk);
        take(values, static_cast<int64_t>(layout.value_size) * kChunk / Op::kPair);
        take(share, Shares::floats(rows, layout.value_size));
        take(sums, Shares::floats(rows, layout.value_size));
        take(key_scales, kChunk);
        take(value_scales, kChunk);
        take(key_offsets, 2 * kChunk);
        take(value_offsets, 2 * kChunk);
        take(zeros, layout.value_size);
        take(position, rows);
        end = memory;
    }
};

}  // namespace outrider::OUTRIDER_ISA
