// One item of work: some query rows of one sequence with some KV heads, over a range of chunks.
//
// Each chunk is three passes: scores of all rows, their softmax, their weighted values. Few rows go over the caches
// where they lie, all KV heads over a stretch of memory before the next; many go over packed copies, head by head.

#pragma once

#include "attention_rows.h"

namespace outrider::OUTRIDER_ISA {

constexpr int kStretch = 32;   // positions that all heads go over before the next ones
constexpr int kPackRows = 16;  // from so many rows on, copying keys and values into packed form pays

template <class Op, class T>
class Tile : TileRows<Op> {
    using Rows = TileRows<Op>;
    using Cache = typename Op::Cache;
    using Query = typename Op::Query;
    using Rows::args_, Rows::item_, Rows::layout_, Rows::scratch_, Rows::rows_;
    using Rows::first_token_;
    using Rows::for_row_blocks, Rows::seen_by_row, Rows::seen_by_any;
    using Rows::keys_of, Rows::values_of, Rows::find_chunk;

public:
    Tile(const AttentionArgs& args, const AttentionItem& item, char* memory) : Rows(args, item, memory) {}

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
    Shares sums_of(int64_t row) const {
        return Shares::in(scratch_.sums, static_cast<int64_t>(item_.num_heads) * rows_, layout_.value_size).from(row);
    }
    Shares partials_of(int chunk) const {
        float* memory = item_.partials + (chunk - item_.first_chunk) * partial_floats(args_, item_);
        return Shares::in(memory, static_cast<int64_t>(item_.num_heads) * rows_, layout_.value_size);
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
            const Vectors<Cache> keys = keys_of(chunk, head);
            pack_keys<Op>(keys, layout_.key_dim, layout_.key_steps, range.from, range.to, scratch_.keys);
            score_blocks(PackedKeys<Op>{scratch_.keys, layout_.key_steps, layout_.query_size}, chunk, head, range);
        }
    }

    template <bool kIsWhole>
    void score_in_place(int chunk, Range range) {
        for_stretches(range, [&](int first, int end) {
            const bool is_last = end >= range.to;
            for (int head = 0; head < item_.num_heads; ++head) {
                const Vectors<Cache> keys = keys_of(chunk, head);
                const int to_values = range.from / kStretch * kStretch - first;
                const auto ahead = is_last ? ahead_of(values_of(chunk, head), to_values, layout_.value_dim)
                                           : ahead_of(keys, kStretch, layout_.key_dim);
                const RowMajorKeys<Op, kIsWhole> source{keys, layout_.key_dim, layout_.key_steps, layout_.query_size,
                                                        ahead};
                score_blocks(source, chunk, head, {first, end});
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
        const Range range = seen_by_any(chunk, 0, rows_);
        if (rows_ < kPackRows) return weigh_in_place(chunk, range, share);
        const Range steps = whole_steps(range);
        for (int head = 0; head < item_.num_heads; ++head) {
            const RowMajorValues<Op> in_place{values_of(chunk, head), layout_.value_dim, {}};
            pack_values(in_place, steps.from, steps.to, layout_.value_units, scratch_.values);
            const PackedValues<Op> values{scratch_.values, layout_.value_units};
            weigh_blocks(values, chunk, head, {0, kChunk / Op::kPair}, share);
        }
    }

    void weigh_in_place(int chunk, Range range, const Shares& share) {
        for_stretches(range, [&](int first, int end) {
            const Range steps{first / Op::kPair, end / Op::kPair};
            for (int head = 0; head < item_.num_heads; ++head) {
                const Vectors<Cache> values = values_of(chunk, head);
                Ahead<Cache> ahead{};
                if (end < range.to) {
                    ahead = ahead_of(values, kStretch, layout_.value_dim);
                } else if (chunk + 1 < item_.end_chunk) {
                    ahead = ahead_of(keys_of(chunk + 1, head), -first, layout_.key_dim);
                }
                weigh_blocks(RowMajorValues<Op>{values, layout_.value_dim, ahead}, chunk, head, steps, share);
            }
        });
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
        const Vec factor = splat(weight / total);
        constexpr int kUnit = kWidth * Op::kPair;
        for (int first = 0; first < layout_.value_dim; first += kUnit) {
            Vec unit[Op::kPair];
            for (int i = 0; i < Op::kPair; ++i) unit[i] = mul(load(sum.values + first + i * kWidth), factor);
            Op::in_order(unit);
            for (int i = 0; i < Op::kPair && first + i * kWidth < layout_.value_dim; ++i) {
                store(output + first + i * kWidth, unit[i], layout_.value_dim - first - i * kWidth);
            }
        }
    }
};

}  // namespace outrider::OUTRIDER_ISA
