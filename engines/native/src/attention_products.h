// The two products of attention, for one chunk of one KV head: queries . keys, and weights . values.
//
// Each exists on vectors where they lie in the cache (few rows) and on packed copies (many rows), bitwise equal: a
// score is the sum over the lanes of a vector, each of which adds its steps in order, and lanes go by kLevelBits; a
// weighted value adds positions in order.

#pragma once

#include "attention.h"
#include "attention_operands.h"

namespace outrider::OUTRIDER_ISA {

// The vectors of a chunk's positions for one KV head.
template <class Cache>
struct Vectors {
    const Cache* base;
    const int64_t* offset;  // [kChunk]

    const Cache* operator[](int position) const { return base + offset[position]; }

};

// Vectors that come next, fetched while others are worked on: their strides defeat the machine's own prefetching.
template <class Cache>
struct Ahead {
    Vectors<Cache> vectors;
    int bytes = 0;  // of each vector; 0 for nothing

    OUTRIDER_INLINE void fetch(int position, int count) const {
        constexpr int kLine = 64;
        for (int i = 0; i < count; ++i) {
            if (bytes == 0) return;
            const char* from = reinterpret_cast<const char*>(vectors[position + i]);
            // Four lines without a branch: what is too much is the next head's, which is read soon.
            for (int start = 0; start < bytes; start += 4 * kLine) {
                for (int line = 0; line < 4; ++line) __builtin_prefetch(from + start + line * kLine, 0, 2);
            }
        }
    }
};

// ---- Queries . keys: kRows query rows [kRows, query_size], kWidth positions at a time. kSteps is 0 where the number
// of steps is known at run time only.

// kIsWhole: a vector fills its last step.
template <class Op, bool kIsWhole>
struct RowMajorKeys {
    using Query = typename Op::Query;
    Vectors<typename Op::Cache> keys;
    int dim, steps, query_size;
    Ahead<typename Op::Cache> ahead;


    template <int kRows, int kSteps>
    OUTRIDER_INLINE void sum_steps(const Query* query, int position, Vec (&sums)[kRows]) const {
        constexpr int kNumbers = kWidth * Op::kPair;
        const auto* key = keys[position];
        ahead.fetch(position, 1);
        for (Vec& lanes : sums) lanes = splat(0.0f);
        const int count = kSteps ? kSteps : steps;
        for (int step = 0; step < count; ++step) {
            const int first = step * kNumbers;
            const bool is_whole = kIsWhole || step + 1 < count;
            const Vec numbers = is_whole ? Op::load_whole(key + first) : Op::load_part(key + first, dim - first);
            for (int row = 0; row < kRows; ++row) {
                sums[row] = Op::multiply_add(Op::load_query(query + row * query_size + first), numbers, sums[row]);
            }
        }
    }

    template <int kRows, int kSteps, int kLevel>
    OUTRIDER_INLINE void reduce(const Query* query, int position, Vec (&sums)[kRows]) const {
        if constexpr (kLevel == 0) {
            sum_steps<kRows, kSteps>(query, position, sums);
        } else {
            Vec others[kRows];
            reduce<kRows, kSteps, kLevel - 1>(query, position, sums);
            reduce<kRows, kSteps, kLevel - 1>(query, position + (1 << (kLevel - 1)), others);
            for (int row = 0; row < kRows; ++row) sums[row] = combine<kLevel - 1>(sums[row], others[row]);
        }
    }

    template <int kRows, int kSteps>
    OUTRIDER_INLINE void scores(const Query* query, int first, Vec (&sums)[kRows]) const {
        reduce<kRows, kSteps, kLevels>(query, first, sums);
        for (Vec& scores : sums) scores = in_order(scores);
    }
};

// Keys as [kChunk / kWidth][lanes][kWidth positions].
template <class Op>
struct PackedKeys {
    using Query = typename Op::Query;
    const float* packed;
    int steps, query_size;

    template <int kRows, int kSteps>
    OUTRIDER_INLINE void sum_steps(const Query* query, const float* keys, int lane, Vec (&sums)[kRows]) const {
        for (Vec& lanes : sums) lanes = splat(0.0f);
        const int count = kSteps ? kSteps : steps;
        for (int step = 0; step < count; ++step) {
            const int index = step * kWidth + lane;
            const Vec numbers = load(keys + index * kWidth);
            for (int row = 0; row < kRows; ++row) {
                const Vec number = Op::broadcast(query + row * query_size + index * Op::kPair);
                sums[row] = Op::multiply_add(number, numbers, sums[row]);
            }
        }
    }

    template <int kRows, int kSteps, int kLevel>
    OUTRIDER_INLINE void reduce(const Query* query, const float* keys, int lane, Vec (&sums)[kRows]) const {
        if constexpr (kLevel == 0) {
            sum_steps<kRows, kSteps>(query, keys, lane, sums);
        } else {
            Vec others[kRows];
            reduce<kRows, kSteps, kLevel - 1>(query, keys, lane, sums);
            reduce<kRows, kSteps, kLevel - 1>(query, keys, lane + kLevelBits[kLevel - 1], others);
            for (int row = 0; row < kRows; ++row) sums[row] = add(sums[row], others[row]);
        }
    }

    template <int kRows, int kSteps>
    OUTRIDER_INLINE void scores(const Query* query, int first, Vec (&sums)[kRows]) const {
        reduce<kRows, kSteps, kLevels>(query, packed + first * steps * kWidth, 0, sums);
    }
};

template <class Op>
inline void pack_keys(Vectors<typename Op::Cache> keys, int dim, int steps, int first, int end, float* packed) {
    constexpr int kNumbers = kWidth * Op::kPair;
    for (int position = first / kWidth * kWidth; position < end; position += kWidth) {
        for (int step = 0; step < steps; ++step) {
            Vec rows[kWidth];
            for (int i = 0; i < kWidth; ++i) {
                const auto* from = keys[position + i] + step * kNumbers;
                const int left = dim - step * kNumbers;
                rows[i] = left >= kNumbers ? Op::load_whole(from) : Op::load_part(from, left);
            }
            transpose(rows);
            for (int i = 0; i < kWidth; ++i) store(packed + (position * steps + step * kWidth + i) * kWidth, rows[i]);
        }
    }
}

template <int kRows, int kSteps, class Query, class Keys>
inline void score_positions(Keys keys, const Query* query, int from, int to, float* scores) {
    for (int first = from / kWidth * kWidth; first < to; first += kWidth) {
        Vec sums[kRows];
        keys.template scores<kRows, kSteps>(query, first, sums);
        for (int row = 0; row < kRows; ++row) store(scores + row * kChunk + first, sums[row]);
    }
}

// Products of kRows queries with the keys of positions [from, to), and perhaps some around, to scores [kRows, kChunk].
template <int kRows, class Query, class Keys>
inline void score(const Keys& keys, const Query* query, int from, int to, float* scores) {
    switch (keys.steps) {
        case 2: return score_positions<kRows, 2>(keys, query, from, to, scores);
        case 3: return score_positions<kRows, 3>(keys, query, from, to, scores);
        case 4: return score_positions<kRows, 4>(keys, query, from, to, scores);
        case 8: return score_positions<kRows, 8>(keys, query, from, to, scores);
        default: return score_positions<kRows, 0>(keys, query, from, to, scores);
    }
}

// ---- Weights . values: kRows rows of weights [kRows, kChunk], some units of dimensions, a range of steps. A step is
// Op::kPair positions.

// A unit of one step, from where its positions' numbers lie.
template <class Op, bool kWhole>
OUTRIDER_INLINE void load_unit(const typename Op::Cache* even, const typename Op::Cache* odd, int unit, int dim,
                               Vec (&numbers)[Op::kPair]) {
    const int first = unit * kWidth * Op::kPair;
    const auto part = [&](const auto* from) {
        return kWhole ? Op::load_whole(from + first) : Op::load_part(from + first, dim - first);
    };
    numbers[0] = part(even);
    if constexpr (Op::kPair == 2) Op::interleave(numbers[0], part(odd), numbers);
}

template <class Op>
struct RowMajorValues {
    Vectors<typename Op::Cache> values;
    int dim;
    Ahead<typename Op::Cache> ahead;

    OUTRIDER_INLINE void prefetch(int step) const { ahead.fetch(step * Op::kPair, Op::kPair); }
    template <bool kWhole>
    OUTRIDER_INLINE void load(int step, int unit, Vec (&numbers)[Op::kPair]) const {
        const int even = step * Op::kPair, odd = even + Op::kPair - 1;
        load_unit<Op, kWhole>(values[even], values[odd], unit, dim, numbers);
    }
};

// Only positions [from, to) are read; the other one of a pair counts as 0.
template <class Op>
struct EdgeValues {
    Vectors<typename Op::Cache> values;
    int dim, from, to;
    const typename Op::Cache* zeros;

    OUTRIDER_INLINE void prefetch(int) const {}
    template <bool kWhole>
    OUTRIDER_INLINE void load(int step, int unit, Vec (&numbers)[Op::kPair]) const {
        const int even = step * Op::kPair, odd = even + Op::kPair - 1;
        load_unit<Op, kWhole>(even >= from ? values[even] : zeros, odd < to ? values[odd] : zeros, unit, dim, numbers);
    }
};

template <class Op>
struct PackedValues {
    const float* packed;  // [kChunk / Op::kPair, units, Op::kPair, kWidth]
    int units;

    OUTRIDER_INLINE void prefetch(int) const {}
    template <bool>
    OUTRIDER_INLINE void load(int step, int unit, Vec (&numbers)[Op::kPair]) const {
        const float* from = packed + (step * units + unit) * Op::kPair * kWidth;
        for (int i = 0; i < Op::kPair; ++i) numbers[i] = outrider::OUTRIDER_ISA::load(from + i * kWidth);
    }
};

template <class Op>
inline void pack_values(RowMajorValues<Op> values, int from_step, int to_step, int units, float* packed) {
    for (int step = from_step; step < to_step; ++step) {
        for (int unit = 0; unit < units; ++unit) {
            Vec numbers[Op::kPair];
            if ((unit + 1) * kWidth * Op::kPair <= values.dim) values.template load<true>(step, unit, numbers);
            else values.template load<false>(step, unit, numbers);
            float* to = packed + (step * units + unit) * Op::kPair * kWidth;
            for (int i = 0; i < Op::kPair; ++i) store(to + i * kWidth, numbers[i]);
        }
    }
}

template <class Op, int kRows, int kUnits, bool kWhole, class Values>
OUTRIDER_INLINE void weigh_units(const Values& values, const typename Op::Query* weights, int unit, int from_step,
                                 int to_step, float* sums, int sum_size) {
    constexpr int kPair = Op::kPair;
    Vec total[kRows][kUnits * kPair];
    float* first = sums + unit * kPair * kWidth;
    for (int row = 0; row < kRows; ++row) {
        for (int i = 0; i < kUnits * kPair; ++i) total[row][i] = load(first + row * sum_size + i * kWidth);
    }
    for (int step = from_step; step < to_step; ++step) {
        if (unit == 0) values.prefetch(step);
        Vec weight[kRows];
        for (int row = 0; row < kRows; ++row) weight[row] = Op::broadcast(weights + row * kChunk + step * kPair);
        for (int u = 0; u < kUnits; ++u) {
            Vec numbers[kPair];
            values.template load<kWhole>(step, unit + u, numbers);
            for (int i = 0; i < kPair; ++i) {
                for (int row = 0; row < kRows; ++row) {
                    Vec& sum = total[row][u * kPair + i];
                    sum = Op::multiply_add(weight[row], numbers[i], sum);
                }
            }
        }
    }
    for (int row = 0; row < kRows; ++row) {
        for (int i = 0; i < kUnits * kPair; ++i) store(first + row * sum_size + i * kWidth, total[row][i]);
    }
}

// From `unit` on, kUnits whole units at a time, then half as many.
template <class Op, int kRows, int kUnits, class Values>
OUTRIDER_INLINE void weigh_from(const Values& values, const typename Op::Query* weights, int unit, int dim,
                                int from_step, int to_step, float* sums, int sum_size) {
    const int whole = dim / (kWidth * Op::kPair);
    for (; unit + kUnits <= whole; unit += kUnits) {
        weigh_units<Op, kRows, kUnits, true>(values, weights, unit, from_step, to_step, sums, sum_size);
    }
    if constexpr (kUnits > 1) {
        weigh_from<Op, kRows, kUnits / 2>(values, weights, unit, dim, from_step, to_step, sums, sum_size);
    } else if (dim % (kWidth * Op::kPair)) {
        weigh_units<Op, kRows, 1, false>(values, weights, unit, from_step, to_step, sums, sum_size);
    }
}

// Adds to sums [kRows, sum_size] the values of steps [from_step, to_step), each times its weight.
template <class Op, int kRows, class Values>
inline void weigh(const Values& values, const typename Op::Query* weights, int dim, int from_step, int to_step,
                  float* sums, int sum_size) {
    constexpr int kUnits = (kRows == 1 ? kAccumulators / 2 : kAccumulators / kRows) / Op::kPair;
    weigh_from<Op, kRows, kUnits>(values, weights, 0, dim, from_step, to_step, sums, sum_size);
}

}  // namespace outrider::OUTRIDER_ISA
