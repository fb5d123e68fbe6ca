// Paged attention (arXiv 2309.06180): a step's keys and values go to their slots, its queries walk the block table.
//
// The numbers of a row never depend on who else is in the batch. Each sequence is cut into chunks of kChunk positions,
// counted from its own beginning; a row takes its dot products, the softmax of a chunk and its weighted values in an
// order fixed by positions alone, and the chunks are merged by log-sum-exp in ascending order. Tiles of rows, items of
// work, packed operands and the number of threads change who computes, never what.

#pragma once

#include "common.h"

namespace outrider {

constexpr int kChunk = 128;       // positions; a multiple of twice the widest vector
constexpr int kScaleBytes = 4;    // behind the int8 numbers of a vector: its fp32 scale
constexpr int kMaxTileRows = 64;  // query rows times the heads of a group, unless one position has more

// One layer's call. Strides are in numbers; the last dimension is contiguous. Mirrored by engines/native/attention.py.
struct AttentionArgs {
    // The step's; the same for all layers.
    const int32_t* block_table;   // [num_sequences, max_blocks]
    const int32_t* cu_seqlens_q;  // [num_sequences + 1]
    const int32_t* kv_lens;       // [num_sequences], this step's tokens included
    const int64_t* slot_mapping;  // [num_tokens]
    int64_t num_sequences;
    int64_t max_blocks;
    int64_t num_tokens;
    int64_t block_size;
    int64_t num_threads;
    // The layer's.
    const void* query;  // [num_tokens, num_heads, head_dim]
    const void* key;    // [num_tokens, num_kv_heads, head_dim]
    const void* value;  // [num_tokens, num_kv_heads, value_dim]
    void* key_cache;    // [num_blocks, block_size, num_kv_heads, head_dim (+ kScaleBytes)], contiguous
    void* value_cache;
    void* output;        // [num_tokens, num_heads, value_dim], contiguous
    const float* sinks;  // [num_heads] or null
    int64_t query_stride, query_head_stride;
    int64_t key_stride, key_head_stride;
    int64_t value_stride, value_head_stride;
    int64_t num_heads, num_kv_heads, head_dim, value_dim;
    int64_t window;   // positions a row sees, its own included; 0 is no limit
    float scaling;
    float softcap;    // 0 is none
    int32_t is_fp32;  // query, key, value and output: fp32, else bf16
    int32_t is_int8;  // the caches: int8 with a scale per vector, else as the query
};

// Query rows [first_row, first_row + num_rows) of one sequence with some KV heads, over some chunks.
struct AttentionItem {
    int32_t sequence;
    int32_t first_row, num_rows;
    int32_t first_head, num_heads;
    int32_t first_chunk, end_chunk;
    float* partials;  // where each chunk's share is kept, to be merged later; null: merge and finish here
};

// What is compiled for each instruction set and each pair of dtypes.
struct AttentionKernel {
    void (*write_token)(const AttentionArgs&, int64_t token);
    int64_t (*scratch_bytes)(const AttentionArgs&);
    int64_t (*partial_floats)(const AttentionArgs&, const AttentionItem&);  // of one chunk
    void (*attend)(const AttentionArgs&, const AttentionItem&, char* scratch);
    void (*merge)(const AttentionArgs&, const AttentionItem&, char* scratch);  // the partials of a tile's chunks
};

namespace portable { AttentionKernel attention_kernel(bool is_fp32, bool is_int8); }
namespace avx2 { AttentionKernel attention_kernel(bool is_fp32, bool is_int8); }
namespace avx512 { AttentionKernel attention_kernel(bool is_fp32, bool is_int8); }

}  // namespace outrider
