// What a tile's rows see: positions of each, and where in the caches those are.
//
// The query heads of a KV head are rows beside each other (row = position * group + head in the group), so that each
// key and value is read once for all of them.

#pragma once

#include "attention_layout.h"
#include "attention_products.h"

namespace outrider::OUTRIDER_ISA {

struct Range {
    int from, to;
    bool empty() const { return from >= to; }
    Range within(Range other) const { return {from > other.from ? from : other.from, to < other.to ? to : other.to}; }
};

template <class Op>
class TileRows {
protected:
    using Cache = typename Op::Cache;

    TileRows(const AttentionArgs& args, const AttentionItem& item, char* memory)
        : args_(args), item_(item), layout_(args), scratch_(layout_, memory), rows_(item.num_rows * layout_.group) {
        const int64_t q_begin = args.cu_seqlens_q[item.sequence], q_end = args.cu_seqlens_q[item.sequence + 1];
        first_token_ = q_begin + item.first_row;
        first_position_ = args.kv_lens[item.sequence] - (q_end - q_begin) + item.first_row;
        for (int row = 0; row < rows_; ++row) scratch_.position[row] = row / layout_.group;
        std::memset(scratch_.zeros, 0, layout_.value_size * sizeof(Cache));
    }

    // Positions of a chunk, counted from its beginning, that the query at `position` sees.
    Range seen(int64_t position, int chunk) const {
        const int64_t start = static_cast<int64_t>(chunk) * kChunk;
        const int64_t from = args_.window ? position - args_.window + 1 - start : 0;
        const int64_t to = position + 1 - start;
        return {static_cast<int>(from < 0 ? 0 : from < kChunk ? from : kChunk),
                static_cast<int>(to < 0 ? 0 : to < kChunk ? to : kChunk)};
    }
    Range seen_by_row(int row, int chunk) const { return seen(first_position_ + scratch_.position[row], chunk); }
    // By any of the item's rows [first, first + count).
    Range seen_by_any(int chunk, int first, int count) const {
        return {seen_by_row(first, chunk).from, seen_by_row(first + count - 1, chunk).to};
    }

    // Offsets of the chunk's positions in the caches. What no row sees borrows the place of a position that is seen: it
    // may be read, and counts for nothing.
    void find_chunk(int chunk) {
        const Range range = seen_by_any(chunk, 0, rows_);
        const int32_t* table = args_.block_table + item_.sequence * args_.max_blocks;
        int64_t* key_offsets = scratch_.key_offsets + chunk % 2 * kChunk;
        int64_t* value_offsets = scratch_.value_offsets + chunk % 2 * kChunk;
        const int64_t start = static_cast<int64_t>(chunk) * kChunk;
        int64_t block = (start + range.from) / args_.block_size, offset = (start + range.from) % args_.block_size;
        for (int position = range.from; position < range.to; ++block, offset = 0) {
            int64_t slot = table[block] * args_.block_size + offset;
            const int64_t left = args_.block_size - offset;
            const int stop = left < range.to - position ? position + static_cast<int>(left) : range.to;
            for (; position < stop; ++position, ++slot) {
                key_offsets[position] = slot * args_.num_kv_heads * layout_.key_vector;
                value_offsets[position] = slot * args_.num_kv_heads * layout_.value_vector;
            }
        }
        for (int position = 0; position < kChunk; ++position) {
            if (position >= range.from && position < range.to) continue;
            const int borrowed = position < range.from ? range.from : range.to - 1;
            key_offsets[position] = key_offsets[borrowed];
            value_offsets[position] = value_offsets[borrowed];
        }
    }

    Vectors<Cache> keys_of(int chunk, int head) const {
        const Cache* base = static_cast<const Cache*>(args_.key_cache) + (item_.first_head + head) * layout_.key_vector;
        return {base, scratch_.key_offsets + chunk % 2 * kChunk};
    }
    Vectors<Cache> values_of(int chunk, int head) const {
        const Cache* base =
            static_cast<const Cache*>(args_.value_cache) + (item_.first_head + head) * layout_.value_vector;
        return {base, scratch_.value_offsets + chunk % 2 * kChunk};
    }

    // Calls work(number of rows as a constant, first row) for blocks of rows that share what they read.
    template <class Work>
    void for_row_blocks(Work work) const {
        int row = 0;
        for (; row + 4 <= rows_; row += 4) work(std::integral_constant<int, 4>{}, row);
        for (; row + 2 <= rows_; row += 2) work(std::integral_constant<int, 2>{}, row);
        for (; row < rows_; ++row) work(std::integral_constant<int, 1>{}, row);
    }

    const AttentionArgs& args_;
    const AttentionItem& item_;
    const TileLayout<Op> layout_;
    const TileScratch<Op> scratch_;
    const int rows_;
    int64_t first_token_, first_position_;  // of the item's first query row
};

}  // namespace outrider::OUTRIDER_ISA
