// The products, for vectors of 16 outputs that an instruction set provides as a type `Lanes`:
//
//     Weights, Ints, Floats           64 bytes of weights; 16 int32; 16 floats
//     kRows, kTiles                   most rows and tiles of a block, as registers allow
//     kWideRows                       most rows of an int4 block of kTiles tiles, which keeps two sums; others have half
//     kPrefetches                     whether to ask for weights before they are needed
//     kOffset                         what `dot` leaves added to int8 weights
//     dot(ints, weights, inputs)      ints + the products of int8 weights (stored plus 128) with 4 int8 inputs
//     dot_nibbles(...)                the same for weights of 0..15, which low() and high() take out of bytes
//
// A block is up to kRows rows by kTiles tiles, whose sums stay in registers over all inputs.

#pragma once

#include "quantized_rows.h"
#include "threads.h"

namespace outrider::OUTRIDER_ISA {

// Loops over a block's rows and tiles: unrolled, or its sums would live in memory.
#define OUTRIDER_UNROLL _Pragma("GCC unroll 8")

constexpr int64_t kPrefetchBytes = 4096;

// A block's place: `weights` at its first tile, in a panel of `panel_tiles`; `scale_at` at that tile's first scale.
struct Block {
    const uint8_t* weights;
    int64_t scale_at;
    int64_t panel_tiles;
    int64_t row;
    int64_t output;
    int64_t num_rows;
    int64_t num_tiles;
};

inline int32_t four_inputs(const int8_t* values) {
    int32_t inputs;
    std::memcpy(&inputs, values, sizeof(inputs));
    return inputs;
}

template <class Lanes>
typename Lanes::Floats load_scales(const QuantizedLinear& linear, int64_t at) {
    return linear.scales_are_bf16 ? Lanes::load(static_cast<const bf16*>(linear.scales) + at)
                                  : Lanes::load(static_cast<const float*>(linear.scales) + at);
}

template <class Lanes>
typename Lanes::Floats load_bias(const QuantizedLinear& linear, int64_t output) {
    if (!linear.bias) return Lanes::floats(0.0f);
    return Lanes::load(linear.bias + output, std::min(kTileOutputs, linear.out_features - output));
}

template <class Lanes>
void write(const QuantizedLinear& linear, const QuantizedCall& call, int64_t row, int64_t output,
           typename Lanes::Floats values) {
    const int64_t count = std::min(kTileOutputs, linear.out_features - output);
    const int64_t at = row * linear.out_features + output;
    if (call.is_bf16) return Lanes::store(static_cast<bf16*>(call.output) + at, values, count);
    Lanes::store(static_cast<float*>(call.output) + at, values, count);
}

// The weights of T tiles at one step.
template <class Lanes, int R, int T>
struct Step {
    typename Lanes::Weights tiles[T];

    __attribute__((always_inline)) explicit Step(const uint8_t* weights) {
        OUTRIDER_UNROLL
        for (int t = 0; t < T; ++t) {
            tiles[t] = Lanes::load(weights + t * kVectorBytes);
            if (Lanes::kPrefetches) __builtin_prefetch(weights + t * kVectorBytes + kPrefetchBytes);
        }
    }
};

// Sums [R][T] of a block over all inputs.
template <class Lanes, int R, int T>
void int8_sums(const QuantizedRows& rows, const Block& block, typename Lanes::Ints* result) {
    typename Lanes::Ints sums[R][T];
    OUTRIDER_UNROLL
    for (int r = 0; r < R; ++r) {
        OUTRIDER_UNROLL
        for (int t = 0; t < T; ++t) sums[r][t] = Lanes::ints(-Lanes::kOffset * rows.sums[block.row + r]);
    }
    const int64_t stride = rows.stride, step_bytes = block.panel_tiles * kVectorBytes;
    const int8_t* inputs = rows.values + block.row * stride;
    const uint8_t* weights = block.weights;
    for (const int8_t* end = inputs + stride; inputs < end; inputs += 4, weights += step_bytes) {
        const Step<Lanes, R, T> step(weights);
        OUTRIDER_UNROLL
        for (int r = 0; r < R; ++r) {
            const int32_t four = four_inputs(inputs + r * stride);
            OUTRIDER_UNROLL
            for (int t = 0; t < T; ++t) sums[r][t] = Lanes::dot(sums[r][t], step.tiles[t], four);
        }
    }
    OUTRIDER_UNROLL
    for (int r = 0; r < R; ++r) {
        OUTRIDER_UNROLL
        for (int t = 0; t < T; ++t) result[r * T + t] = sums[r][t];
    }
}

// One group of a block: totals [R][T] += its sums * scales. `scale_at` is that of the group's first tile.
template <class Lanes, int R, int T>
__attribute__((always_inline)) inline void add_group(const QuantizedLinear& linear, const QuantizedRows& rows,
                                                     const Block& block, int64_t g,
                                                     typename Lanes::Floats (&totals)[R][T]) {
    const int64_t at = block.row * rows.num_groups + g;
    typename Lanes::Ints sums[R][T];
    OUTRIDER_UNROLL
    for (int r = 0; r < R; ++r) {
        OUTRIDER_UNROLL
        for (int t = 0; t < T; ++t) sums[r][t] = Lanes::ints(-8 * rows.sums[at + r * rows.num_groups]);
    }
    const int64_t stride = rows.stride, step_bytes = block.panel_tiles * kVectorBytes;
    const int8_t* inputs = rows.values + block.row * stride + g * linear.group_size;
    const uint8_t* weights = block.weights + g * (linear.group_size / 8) * step_bytes;
    for (const int8_t* end = inputs + linear.group_size; inputs < end; inputs += 8, weights += step_bytes) {
        const Step<Lanes, R, T> step(weights);
        OUTRIDER_UNROLL
        for (int r = 0; r < R; ++r) {
            const int32_t first = four_inputs(inputs + r * stride), second = four_inputs(inputs + r * stride + 4);
            OUTRIDER_UNROLL
            for (int t = 0; t < T; ++t) {
                sums[r][t] = Lanes::dot_nibbles(sums[r][t], Lanes::low(step.tiles[t]), first);
                sums[r][t] = Lanes::dot_nibbles(sums[r][t], Lanes::high(step.tiles[t]), second);
            }
        }
    }
    OUTRIDER_UNROLL
    for (int t = 0; t < T; ++t) {
        const int64_t tile = g * block.panel_tiles + t;
        const auto scales = load_scales<Lanes>(linear, block.scale_at + tile * kTileOutputs);
        OUTRIDER_UNROLL
        for (int r = 0; r < R; ++r) {
            const auto scale = Lanes::multiply(scales, rows.scales[at + r * rows.num_groups]);
            totals[r][t] = Lanes::fma(Lanes::to_floats(sums[r][t]), scale, totals[r][t]);
        }
    }
}

// Totals [R][T] of a block over all groups.
template <class Lanes, int R, int T>
void int4_totals(const QuantizedLinear& linear, const QuantizedRows& rows, const Block& block,
                 typename Lanes::Floats* result) {
    typename Lanes::Floats totals[R][T];
    OUTRIDER_UNROLL
    for (int r = 0; r < R; ++r) {
        OUTRIDER_UNROLL
        for (int t = 0; t < T; ++t) totals[r][t] = Lanes::floats(0.0f);
    }
    for (int64_t g = 0; g < rows.num_groups; ++g) add_group<Lanes, R, T>(linear, rows, block, g, totals);
    OUTRIDER_UNROLL
    for (int r = 0; r < R; ++r) {
        OUTRIDER_UNROLL
        for (int t = 0; t < T; ++t) result[r * T + t] = totals[r][t];
    }
}

template <class Lanes, int R, int T>
__attribute__((noinline)) void int8_block(const QuantizedLinear& linear, const QuantizedCall& call,
                                          const QuantizedRows& rows, const Block& block) {
    typename Lanes::Ints sums[R * T];
    int8_sums<Lanes, R, T>(rows, block, sums);
    for (int t = 0; t < T; ++t) {
        const int64_t output = block.output + t * kTileOutputs;
        const auto bias = load_bias<Lanes>(linear, output);
        const auto scales = Lanes::load(static_cast<const float*>(linear.scales) + block.scale_at + t * kTileOutputs);
        for (int r = 0; r < R; ++r) {
            const auto scale = Lanes::multiply(scales, rows.scales[block.row + r]);
            const auto values = Lanes::fma(Lanes::to_floats(sums[r * T + t]), scale, bias);
            write<Lanes>(linear, call, block.row + r, output, values);
        }
    }
}

template <class Lanes, int R, int T>
__attribute__((noinline)) void int4_block(const QuantizedLinear& linear, const QuantizedCall& call,
                                          const QuantizedRows& rows, const Block& block) {
    typename Lanes::Floats totals[R * T];
    int4_totals<Lanes, R, T>(linear, rows, block, totals);
    for (int t = 0; t < T; ++t) {
        const int64_t output = block.output + t * kTileOutputs;
        const auto bias = load_bias<Lanes>(linear, output);
        for (int r = 0; r < R; ++r) {
            write<Lanes>(linear, call, block.row + r, output, Lanes::add(totals[r * T + t], bias));
        }
    }
}

// Finds the code for a block's number of rows, at most R, and of tiles, at most T.
template <class Lanes, int R = Lanes::kRows, int T = Lanes::kTiles>
void run_block(const QuantizedLinear& linear, const QuantizedCall& call, const QuantizedRows& rows,
               const Block& block) {
    if constexpr (R > 1) {
        if (block.num_rows < R) return run_block<Lanes, R - 1, T>(linear, call, rows, block);
    }
    if constexpr (T > 1) {
        if (block.num_tiles < T) return run_block<Lanes, R, T - 1>(linear, call, rows, block);
    }
    if (linear.group_size) return int4_block<Lanes, R, T>(linear, call, rows, block);
    int8_block<Lanes, R, T>(linear, call, rows, block);
}

// All rows of one panel, in blocks of about the same size.
template <class Lanes>
void run_panel(const QuantizedLinear& linear, const QuantizedCall& call, const QuantizedRows& rows, int64_t panel) {
    const int64_t output = panel * kPanelOutputs;
    const int64_t panel_tiles =
        (std::min(kPanelOutputs, linear.out_features - output) + kTileOutputs - 1) / kTileOutputs;
    const int64_t output_bytes = linear.group_size ? rows.stride / 2 : rows.stride;
    const int64_t num_blocks = (call.num_rows + Lanes::kRows - 1) / Lanes::kRows;
    const bool is_wide = !linear.group_size || call.num_rows <= Lanes::kWideRows;
    const int64_t width = is_wide ? Lanes::kTiles : (Lanes::kTiles + 1) / 2;
    for (int64_t tile = 0; tile < panel_tiles; tile += width) {
        const int64_t first = tile * kTileOutputs;
        for (int64_t i = 0; i < num_blocks; ++i) {
            const int64_t row = i * call.num_rows / num_blocks, end = (i + 1) * call.num_rows / num_blocks;
            run_block<Lanes>(linear, call, rows,
                             {linear.weights + output * output_bytes + tile * kVectorBytes,
                              output * rows.num_groups + first, panel_tiles, row, output + first, end - row,
                              std::min(width, panel_tiles - tile)});
        }
    }
}

template <class Lanes>
void run(const QuantizedLinear& linear, const QuantizedCall& call) {
    const QuantizedRows rows = make_room(linear, call.num_rows);
    const int64_t num_panels = (linear.out_features + kPanelOutputs - 1) / kPanelOutputs;
    parallel_for(call.num_threads, call.num_rows, [&](int64_t row) {
        if (call.is_bf16) {
            quantize_row(linear, static_cast<const bf16*>(call.input), rows, row);
        } else {
            quantize_row(linear, static_cast<const float*>(call.input), rows, row);
        }
    });
    parallel_for(call.num_threads, num_panels, [&](int64_t panel) { run_panel<Lanes>(linear, call, rows, panel); });
}

}  // namespace outrider::OUTRIDER_ISA
