// Attention's work for any machine: what the items of a call are, and who computes them.

#include "attention.h"

#include <algorithm>
#include <vector>

#include "attention_kernel.h"
#include "entries.h"
#include "threads.h"

namespace outrider {
namespace {

constexpr int64_t kSplitChunks = 8;  // a part of a split tile; shorter ones cost more than they balance
constexpr int64_t kItemsPerThread = 4;  // with so many, the last ones to finish leave nobody idle for long

AttentionKernel kernel_of(const AttentionArgs& args) {
    switch (current_isa()) {
#if defined(__x86_64__)
        case Isa::avx512: return avx512::attention_kernel(args.is_fp32, args.is_int8);
        case Isa::avx2: return avx2::attention_kernel(args.is_fp32, args.is_int8);
#endif
        default: return portable::attention_kernel(args.is_fp32, args.is_int8);
    }
}

// All tiles of one sequence: rows [first_row, ...) with as many KV heads as fit.
void add_tiles(const AttentionArgs& args, int32_t sequence, int64_t heads_per_item, std::vector<AttentionItem>& items) {
    const int64_t group = args.num_heads / args.num_kv_heads;
    const int64_t q_len = args.cu_seqlens_q[sequence + 1] - args.cu_seqlens_q[sequence];
    const int64_t first_position = args.kv_lens[sequence] - q_len;
    const int64_t tile_rows = std::max<int64_t>(1, kMaxTileRows / group);
    // The last rows see most: first.
    for (int64_t row = (q_len - 1) / tile_rows * tile_rows; row >= 0; row -= tile_rows) {
        const int64_t rows = std::min(tile_rows, q_len - row);
        const int64_t heads = std::clamp<int64_t>(kMaxTileRows / (rows * group), 1, heads_per_item);
        const int64_t from = args.window ? std::max<int64_t>(0, first_position + row - args.window + 1) : 0;
        const int64_t to = first_position + row + rows;
        for (int64_t head = 0; head < args.num_kv_heads; head += heads) {
            AttentionItem item{};
            item.sequence = sequence;
            item.first_row = static_cast<int32_t>(row);
            item.num_rows = static_cast<int32_t>(rows);
            item.first_head = static_cast<int32_t>(head);
            item.num_heads = static_cast<int32_t>(std::min(heads, args.num_kv_heads - head));
            item.first_chunk = static_cast<int32_t>(from / kChunk);
            item.end_chunk = static_cast<int32_t>((to + kChunk - 1) / kChunk);
            items.push_back(item);
        }
    }
}

std::vector<AttentionItem> plan_items(const AttentionArgs& args) {
    // KV heads together read memory in order; apart, they give every thread work.
    const int64_t wanted = args.num_threads == 1 ? 1 : args.num_threads * kItemsPerThread;
    const int64_t items_per_sequence = (wanted + args.num_sequences - 1) / args.num_sequences;
    const int64_t heads = std::max<int64_t>(1, args.num_kv_heads / items_per_sequence);
    std::vector<AttentionItem> items;
    for (int32_t sequence = 0; sequence < args.num_sequences; ++sequence) add_tiles(args, sequence, heads, items);
    return items;
}

// Tiles cut along their chunks where there are too few of them for the threads.
struct SplitPlan {
    std::vector<AttentionItem> parts;   // what is computed first, in any order
    std::vector<AttentionItem> merged;  // tiles whose parts have to be merged then
    std::vector<float> partials;
};

SplitPlan split_items(const AttentionArgs& args, const AttentionKernel& kernel, std::vector<AttentionItem> items) {
    SplitPlan plan;
    if (static_cast<int64_t>(items.size()) >= 2 * args.num_threads || args.num_threads == 1) {
        plan.parts = std::move(items);
        return plan;
    }
    int64_t floats = 0;
    const auto is_long = [](const AttentionItem& tile) {
        return tile.end_chunk - tile.first_chunk >= 2 * kSplitChunks;
    };
    for (const AttentionItem& item : items) {
        if (is_long(item)) floats += (item.end_chunk - item.first_chunk) * kernel.partial_floats(args, item);
    }
    plan.partials.resize(floats);
    float* partials = plan.partials.data();
    for (AttentionItem& item : items) {
        if (!is_long(item)) {
            plan.parts.push_back(item);
            continue;
        }
        const int64_t chunk_floats = kernel.partial_floats(args, item);
        item.partials = partials;
        for (int32_t chunk = item.first_chunk; chunk < item.end_chunk; chunk += kSplitChunks) {
            AttentionItem part = item;
            part.first_chunk = chunk;
            part.end_chunk = std::min<int32_t>(chunk + kSplitChunks, item.end_chunk);
            part.partials = partials + (chunk - item.first_chunk) * chunk_floats;
            plan.parts.push_back(part);
        }
        partials += (item.end_chunk - item.first_chunk) * chunk_floats;
        plan.merged.push_back(item);
    }
    return plan;
}

// This thread's work space, kept from call to call.
char* thread_scratch(int64_t bytes) {
    thread_local std::vector<char> memory;
    constexpr size_t kLine = 64;
    if (memory.size() < bytes + kLine) memory.resize(bytes + kLine);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (kLine - address % kLine) % kLine;
}

constexpr int64_t kTokensPerWrite = 16;  // one alone is too little work for a thread

void run(const AttentionArgs& args) {
    const AttentionKernel kernel = kernel_of(args);
    const SplitPlan plan = split_items(args, kernel, plan_items(args));
    const int64_t scratch_bytes = kernel.scratch_bytes(args);
    const auto num_parts = static_cast<int64_t>(plan.parts.size());
    const auto num_merged = static_cast<int64_t>(plan.merged.size());
    const auto num_threads = static_cast<int32_t>(args.num_threads);
    // A sequence may read blocks that another one writes in this step: all writes first.
    const int64_t num_writes = (args.num_tokens + kTokensPerWrite - 1) / kTokensPerWrite;
    parallel_for(num_threads, num_writes, [&](int64_t i) {
        const int64_t end = std::min(args.num_tokens, (i + 1) * kTokensPerWrite);
        for (int64_t token = i * kTokensPerWrite; token < end; ++token) kernel.write_token(args, token);
    });
    parallel_for(num_threads, num_parts,
                 [&](int64_t i) { kernel.attend(args, plan.parts[i], thread_scratch(scratch_bytes)); });
    parallel_for(num_threads, num_merged,
                 [&](int64_t i) { kernel.merge(args, plan.merged[i], thread_scratch(scratch_bytes)); });
}

}  // namespace
}  // namespace outrider

// Writes the step's keys and values to their slots and attends; see AttentionArgs.
OUTRIDER_EXPORT void outrider_attend(const outrider::AttentionArgs* args) { outrider::run(*args); }

// sizeof(AttentionArgs), for who mirrors it.
OUTRIDER_EXPORT int64_t outrider_attention_args_bytes() { return sizeof(outrider::AttentionArgs); }
