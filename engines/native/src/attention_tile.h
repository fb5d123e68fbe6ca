// One item of work: some query rows of one sequence with some KV heads, over a range of chunks.
//
// The query heads of a KV head are rows beside each other (row = position * group + head in the group), so that each
// key and value is read once for all of them.

#pragma once

#include "attention_products.h"
#include "attention_softmax.h"

namespace outrider::OUTRIDER_ISA {

constexpr int kStretch = 32;  // positions that all heads go over before the next ones
constexpr int kPackRows = 16;  // from so many rows on, copying keys and values into packed form pays

// Sizes that follow from a call, and where things lie in a thread's scratch memory.
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

template <class Op, class T>
class Tile {
public:
    Tile(const AttentionArgs& args, const AttentionItem& item, char* memory)
        : args_(args), item_(item), layout_(args), scratch_(layout_, memory), rows_(item.num_rows * layout_.group) {
        const int64_t q_begin = args.cu_seqlens_q[item.sequence];
        first_token_ = q_begin + item.first_row;
        first_position_ = args.kv_lens[item.sequence] - (args.cu_seqlens_q[item.sequence + 1] - q_begin) + item.first_row;
        for (int row = 0; row < rows_; ++row) scratch_.position[row] = row / layout_.group;
        std::memset(scratch_.zeros, 0, layout_.value_size * sizeof(typename Op::Cache));
    }

    void attend() {
        load_queries();
        const Shares sums = sums_of(0);
        if (!item_.partials) sums.clear(item_.num_heads * rows_);
        find_chunk(item_.first_chunk);
        for (int chunk = item_.first_chunk; chunk < item_.end_chunk; ++chunk) {
            if (chunk + 1 < item_.end_chunk) find_chunk(chunk + 1);
            attend_chunk(chunk);
        }
        if (!item_.partials) finish();
    }

    // As attend(), its shares being there already.
    void merge() {
        sums_of(0).clear(item_.num_heads * rows_);
        for (int chunk = item_.first_chunk; chunk < item_.end_chunk; ++chunk) {
            for (int row = 0; row < item_.num_heads * rows_; ++row) {
                merge_row(sums_of(0).from(row), partials_of(chunk).from(row));
            }
        }
        finish();
    }

    static int64_t partial_floats(const AttentionArgs& args, const AttentionItem& item) {
        const TileLayout<Op> layout(args);
        return Shares::floats(static_cast<int64_t>(item.num_heads) * item.num_rows * layout.group, layout.value_size);
    }

private:
    using Cache = typename Op::Cache;
    using Query = typename Op::Query;
    struct Range {
        int from, to;
        bool empty() const { return from >= to; }
        Range within(Range other) const { return {from > other.from ? from : other.from, to < other.to ? to : other.to}; }
    };

    Shares sums_of(int64_t row) const {
        return Shares::in(scratch_.sums, static_cast<int64_t>(item_.num_heads) * rows_, layout_.value_size).from(row);
    }
    Shares partials_of(int chunk) const {
        float* memory = item_.partials + (chunk - item_.first_chunk) * partial_floats(args_, item_);
        return Shares::in(memory, static_cast<int64_t>(item_.num_heads) * rows_, layout_.value_size);
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

    void load_queries() {
        for (int head = 0; head < item_.num_heads; ++head) {
            for (int row = 0; row < rows_; ++row) {
                const int64_t query_head = (item_.first_head + head) * layout_.group + row % layout_.group;
                const int64_t token = first_token_ + row / layout_.group;
                const T* from = static_cast<const T*>(args_.query) + token * args_.query_stride +
                                query_head * args_.query_head_stride;
                Query* to = scratch_.query + static_cast<int64_t>(head * rows_ + row) * layout_.query_size;
                Op::copy_query(from, layout_.key_dim, layout_.query_size, to);
            }
        }
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

    void attend_chunk(int chunk) {
        const int num_rows = item_.num_heads * rows_;
        const Shares share =
            item_.partials ? partials_of(chunk) : Shares::in(scratch_.share, num_rows, layout_.value_size);
        share.clear(num_rows);
        score_rows(chunk);
        for (int head = 0; head < item_.num_heads; ++head) softmax_rows(chunk, head, share.from(head * rows_));
        weigh_rows(chunk, share);
        if (item_.partials) return;
        for (int row = 0; row < num_rows; ++row) merge_row(sums_of(row), share.from(row));
    }

    void softmax_rows(int chunk, int head, const Shares& share) {
        const Scoring scoring = scoring_of(chunk, head);
        for (int row = 0; row < rows_; ++row) {
            const Range range = seen_by_row(row, chunk);
            if (range.empty()) continue;
            const int64_t place = static_cast<int64_t>(head * rows_ + row) * kChunk;
            softmax_row<Op>(scoring, scratch_.scores + place, range.from, range.to, scratch_.weights + place,
                            share.from(row));
        }
    }

    Scoring scoring_of(int chunk, int head) {
        if (!args_.is_int8) return {args_.scaling, args_.softcap, nullptr, nullptr};
        const Vectors<Cache> keys = keys_of(chunk, head), values = values_of(chunk, head);
        for (int position = 0; position < kChunk; ++position) {
            std::memcpy(scratch_.key_scales + position, keys[position] + layout_.key_dim, kScaleBytes);
            std::memcpy(scratch_.value_scales + position, values[position] + layout_.value_dim, kScaleBytes);
        }
        return {args_.scaling, args_.softcap, scratch_.key_scales, scratch_.value_scales};
    }

    // Calls work(number of rows as a constant, first row) for blocks of rows that share what they read.
    template <class Work>
    void for_row_blocks(Work work) const {
        int row = 0;
        for (; row + 4 <= rows_; row += 4) work(std::integral_constant<int, 4>{}, row);
        for (; row + 2 <= rows_; row += 2) work(std::integral_constant<int, 2>{}, row);
        for (; row < rows_; ++row) work(std::integral_constant<int, 1>{}, row);
    }

    // Calls work(first, end) for the positions of a chunk that any row sees, some at a time: so all heads go over the
    // same stretch of memory before the next.
    template <class Work>
    void for_stretches(Range range, Work work) const {
        for (int first = range.from / kStretch * kStretch; first < range.to; first += kStretch) {
            work(first, first + kStretch);
        }
    }

    // What lies `shift` positions further in `vectors`.
    static Ahead<Cache> ahead_of(Vectors<Cache> vectors, int shift, int dim) {
        return {{vectors.base, vectors.offset + shift}, dim * static_cast<int>(sizeof(Cache))};
    }

    void score_rows(int chunk) {
        const Range range = seen_by_any(chunk, 0, rows_);
        if (rows_ < kPackRows) {
            const bool is_whole = layout_.key_dim == layout_.query_size;
            return is_whole ? score_in_place<true>(chunk, range) : score_in_place<false>(chunk, range);
        }
        for (int head = 0; head < item_.num_heads; ++head) {
            pack_keys<Op>(keys_of(chunk, head), layout_.key_dim, layout_.key_steps, range.from, range.to, scratch_.keys);
            score_blocks(PackedKeys<Op>{scratch_.keys, layout_.key_steps, layout_.query_size}, chunk, head, range);
        }
    }

    template <bool kIsWhole>
    void score_in_place(int chunk, Range range) {
        for_stretches(range, [&](int first, int end) {
            const bool is_last = end >= range.to;
            for (int head = 0; head < item_.num_heads; ++head) {
                const Vectors<Cache> keys = keys_of(chunk, head);
                const Ahead<Cache> ahead = is_last ? ahead_of(values_of(chunk, head), range.from / kStretch * kStretch - first, layout_.value_dim)
                                                   : ahead_of(keys, kStretch, layout_.key_dim);
                score_blocks(RowMajorKeys<Op, kIsWhole>{keys, layout_.key_dim, layout_.key_steps, layout_.query_size, ahead},
                             chunk, head, {first, end});
            }
        });
    }

    template <class Keys>
    void score_blocks(const Keys& keys, int chunk, int head, Range limits) {
        for_row_blocks([&](auto count, int row) {
            const Range range = seen_by_any(chunk, row, count).within(limits);
            const int64_t place = head * rows_ + row;
            score<count>(keys, scratch_.query + place * layout_.query_size, range.from, range.to,
                         scratch_.scores + place * kChunk);
        });
    }

    void weigh_rows(int chunk, const Shares& share) {
        const auto values_at = [&](int head, const Ahead<Cache>& ahead) {
            return RowMajorValues<Op>{values_of(chunk, head), layout_.value_dim, ahead};
        };
        if (rows_ < kPackRows) {
            const Range range = seen_by_any(chunk, 0, rows_);
            for_stretches(range, [&](int first, int end) {
                for (int head = 0; head < item_.num_heads; ++head) {
                    const bool is_last = end >= range.to;
                    Ahead<Cache> ahead;
                    if (!is_last) ahead = ahead_of(values_of(chunk, head), kStretch, layout_.value_dim);
                    else if (chunk + 1 < item_.end_chunk) ahead = ahead_of(keys_of(chunk + 1, head), -first, layout_.key_dim);
                    weigh_blocks(values_at(head, ahead), chunk, head, {first / Op::kPair, end / Op::kPair}, share);
                }
            });
            return;
        }
        const Range steps = whole_steps(seen_by_any(chunk, 0, rows_));
        for (int head = 0; head < item_.num_heads; ++head) {
            pack_values(values_at(head, {}), steps.from, steps.to, layout_.value_units, scratch_.values);
            const PackedValues<Op> values{scratch_.values, layout_.value_units};
            weigh_blocks(values, chunk, head, {0, kChunk / Op::kPair}, share);
        }
    }

    // Steps whose positions are all in `positions`.
    static Range whole_steps(Range positions) {
        return {(positions.from + Op::kPair - 1) / Op::kPair, positions.to / Op::kPair};
    }

    // The steps in `limits`, in ascending order for each row: the rows of a block together where all of them see all
    // positions of a step.
    template <class Values>
    void weigh_blocks(const Values& values, int chunk, int head, Range limits, const Shares& share) {
        for_row_blocks([&](auto count, int row) {
            const Range common = Range{whole_steps(seen_by_row(row + count - 1, chunk)).from,
                                       whole_steps(seen_by_row(row, chunk)).to}.within(limits);
            const Range before{limits.from, common.empty() ? limits.to : common.from};
            const Range after{common.empty() ? limits.to : common.to, limits.to};
            const int64_t place = head * rows_ + row;
            for (int i = 0; i < count && !before.empty(); ++i) weigh_edge(chunk, head, row + i, before, share);
            if (!common.empty()) {
                weigh<Op, count>(values, scratch_.weights + place * kChunk, layout_.value_dim, common.from, common.to,
                                 share.from(place).values, layout_.value_size);
            }
            for (int i = 0; i < count && !after.empty(); ++i) weigh_edge(chunk, head, row + i, after, share);
        });
    }

    // The steps of one row that are in `limits`, with nothing read that it does not see.
    void weigh_edge(int chunk, int head, int row, Range limits, const Shares& share) {
        const Range range = seen_by_row(row, chunk);
        const Range steps = Range{range.from / Op::kPair, (range.to + Op::kPair - 1) / Op::kPair}.within(limits);
        if (range.empty() || steps.empty()) return;
        const EdgeValues<Op> values{values_of(chunk, head), layout_.value_dim, range.from, range.to, scratch_.zeros};
        const int64_t place = head * rows_ + row;
        weigh<Op, 1>(values, scratch_.weights + place * kChunk, layout_.value_dim, steps.from, steps.to,
                     share.from(place).values, layout_.value_size);
    }

    void finish() {
        for (int head = 0; head < item_.num_heads; ++head) {
            for (int row = 0; row < rows_; ++row) {
                const int64_t query_head = (item_.first_head + head) * layout_.group + row % layout_.group;
                const int64_t token = first_token_ + row / layout_.group;
                T* output = static_cast<T*>(args_.output) + (token * args_.num_heads + query_head) * layout_.value_dim;
                finish_row(sums_of(head * rows_ + row), query_head, output);
            }
        }
    }

    // A sink is one more score, without a value.
    void finish_row(const Shares& sum, int64_t query_head, T* output) const {
        float weight = 1.0f, total = *sum.total;
        if (args_.sinks) {
            const float sink = args_.sinks[query_head], top = sink > *sum.largest ? sink : *sum.largest;
            weight = exp(*sum.largest - top);
            total = total * weight + exp(sink - top);
        }
        constexpr int kUnit = kWidth * Op::kPair;
        for (int first = 0; first < layout_.value_dim; first += kUnit) {
            Vec unit[Op::kPair];
            for (int i = 0; i < Op::kPair; ++i) unit[i] = mul(load(sum.values + first + i * kWidth), splat(weight / total));
            Op::in_order(unit);
            for (int i = 0; i < Op::kPair && first + i * kWidth < layout_.value_dim; ++i) {
                store(output + first + i * kWidth, unit[i], layout_.value_dim - first - i * kWidth);
            }
        }
    }

    const AttentionArgs& args_;
    const AttentionItem& item_;
    const TileLayout<Op> layout_;
    const TileScratch<Op> scratch_;
    const int rows_;
    int64_t first_token_, first_position_;
};

}  // namespace outrider::OUTRIDER_ISA
