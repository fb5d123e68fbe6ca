// Linear layers over weights packed once into panels.
//
// A panel holds kPanel outputs. It is a list of words of 32 bits, kPanel of them for each step along the inputs: a pair
// of bf16 weights (inputs 2i and 2i + 1, what one bf16 dot product takes) or one fp32 weight. A thread reads its panels
// from the first byte to the last, which is all that decides the speed of few rows; of many rows, a block of steps
// stays in the first-level cache while tiles of rows pass over it.
//
// Each output is one sum in fp32, begun with the bias and taken in the order of the inputs. Rows, tiles, blocks and
// threads do not change that order, so a row gets the same bits in whatever company.

#pragma once

#include <algorithm>

#include "activation.h"
#include "common.h"
#include "dtype.h"
#include "threads.h"

namespace outrider {

constexpr int64_t kPanel = 64;

// What becomes of the sums. Gated: a panel holds kPanel / 2 gates and, after them, as many ups; the output is
// activation(gate) * up, half as wide.
enum class Epilogue : int32_t { none = 0, gated_silu = 1, gated_gelu_tanh = 2 };

struct PackedWeight {
    const uint32_t* words;  // [panels, steps, kPanel]
    const float* bias;      // [panels * kPanel], or null
    int64_t in_features;
    int64_t out_features;   // of the layer: half of the packed columns if gated
    Dtype dtype;            // of the weights and the input
    Epilogue epilogue;
};

struct LinearCall {
    const PackedWeight* weight;
    const void* input;
    int64_t input_stride;  // values from row to row
    void* output;          // [rows, out_features], contiguous
    Dtype output_dtype;
    int64_t rows;
    int32_t num_threads;
};

namespace portable {
void linear(const LinearCall& call);
}
namespace avx2 {
void linear(const LinearCall& call);
}
namespace avx512 {
void linear(const LinearCall& call);
}

}  // namespace outrider

namespace outrider::OUTRIDER_ISA {

inline int64_t steps_of(const PackedWeight& weight) {
    return weight.dtype == Dtype::bf16 ? (weight.in_features + 1) / 2 : weight.in_features;
}

inline int64_t width_of(Epilogue epilogue) { return epilogue == Epilogue::none ? kPanel : kPanel / 2; }

// A tile's work: sums [rows, kPanel] += input words [rows, steps] * panel words [steps, kPanel].
struct LinearTile {
    const char* input;    // first word of the first row
    int64_t input_bytes;  // from row to row
    const uint32_t* words;
    int64_t steps;
    bool half_last;          // the last word has one bf16 input, not two
    const char* prefetch;    // where this tile's share of the next words begins,
    int64_t prefetch_lines;  // and how many cache lines of it are due at each step
    float* sums;
};

constexpr int64_t kWordBytes = 4;
constexpr int64_t kStepLines = kPanel * kWordBytes / 64;
constexpr int64_t kBlockSteps = 64;           // 16 KiB; with the block being prefetched it fits the first-level cache
constexpr int64_t kMaxRowBlock = 96;          // sums of a panel: 24 KiB
constexpr int64_t kDotsWorthThreads = 65536;  // of one word each: microseconds of one thread's work

template <class Value>
void store_row(const float* sums, Value* to, int64_t columns, Epilogue epilogue) {
    if (epilogue == Epilogue::none) {
        for (int64_t column = 0; column < columns; ++column) store(to + column, sums[column]);
    } else if (epilogue == Epilogue::gated_silu) {
        multiply_activated<Silu>(sums, sums + kPanel / 2, to, columns);
    } else {
        multiply_activated<GeluTanh>(sums, sums + kPanel / 2, to, columns);
    }
}

inline void store_rows(const LinearCall& call, const float* sums, int64_t panel, int64_t first_row, int64_t rows) {
    const int64_t width = width_of(call.weight->epilogue), out = call.weight->out_features;
    const int64_t columns = std::min(width, out - panel * width);
    for (int64_t row = 0; row < rows; ++row, sums += kPanel) {
        const int64_t to = (first_row + row) * out + panel * width;
        if (call.output_dtype == Dtype::bf16) {
            store_row(sums, static_cast<bf16*>(call.output) + to, columns, call.weight->epilogue);
        } else {
            store_row(sums, static_cast<float*>(call.output) + to, columns, call.weight->epilogue);
        }
    }
}

inline void begin_sums(const float* bias, float* sums, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row, sums += kPanel) {
        if (bias == nullptr) {
            std::memset(sums, 0, kPanel * sizeof(float));
        } else {
            std::memcpy(sums, bias, kPanel * sizeof(float));
        }
    }
}

// One block of steps of one panel, for all rows, in tiles of nearly equal height.
template <class Kernel>
void pass_block(LinearTile tile, int64_t rows, bool last) {
    const int64_t tiles = (rows + Kernel::kRows - 1) / Kernel::kRows;
    const char* next = reinterpret_cast<const char*>(tile.words + kBlockSteps * kPanel);
    tile.prefetch_lines = (kStepLines + tiles - 1) / tiles;
    const bool half_last = tile.half_last && last;
    for (int64_t index = 0, row = 0; index < tiles; ++index) {
        const int64_t height = (rows - row + tiles - index - 1) / (tiles - index);
        LinearTile one = tile;
        one.input += row * tile.input_bytes;
        one.sums += row * kPanel;
        one.half_last = half_last;
        one.prefetch = next + index * tile.prefetch_lines * tile.steps * 64;
        if (index * tile.prefetch_lines >= kStepLines) one.prefetch_lines = 0;
        Kernel::run(one, height);
        row += height;
    }
}

template <class Kernel>
void pass_panel(const LinearCall& call, int64_t panel, int64_t first_row, int64_t rows) {
    const PackedWeight& weight = *call.weight;
    const int64_t steps = steps_of(weight), value_bytes = weight.dtype == Dtype::bf16 ? 2 : 4;
    alignas(64) float sums[kMaxRowBlock * kPanel];
    begin_sums(weight.bias == nullptr ? nullptr : weight.bias + panel * kPanel, sums, rows);
    LinearTile tile{};
    tile.input_bytes = call.input_stride * value_bytes;
    tile.sums = sums;
    tile.half_last = weight.dtype == Dtype::bf16 && weight.in_features % 2 != 0;
    const char* input = static_cast<const char*>(call.input) + first_row * tile.input_bytes;
    const int64_t block = rows <= Kernel::kRows ? steps : kBlockSteps;
    for (int64_t step = 0; step < steps; step += block) {
        tile.input = input + step * kWordBytes;
        tile.words = weight.words + (panel * steps + step) * kPanel;
        tile.steps = std::min(block, steps - step);
        pass_block<Kernel>(tile, rows, step + tile.steps == steps);
    }
    store_rows(call, sums, panel, first_row, rows);
}

// Tasks are (panel, block of rows), panels outermost, in contiguous shares: a thread streams its own part of the
// weights.
template <class Kernel>
void run_panels(const LinearCall& call) {
    const int64_t width = width_of(call.weight->epilogue);
    const int64_t panels = (call.weight->out_features + width - 1) / width;
    const int64_t row_blocks = (call.rows + kMaxRowBlock - 1) / kMaxRowBlock;
    const int64_t block = (call.rows + row_blocks - 1) / std::max<int64_t>(row_blocks, 1);
    const int64_t dots = panels * kPanel * steps_of(*call.weight) * call.rows;
    const bool parallel = call.num_threads > 1 && dots >= kDotsWorthThreads;
    parallel_for(parallel ? call.num_threads : 1, panels * row_blocks, [&](int64_t task) {
        const int64_t first_row = task % row_blocks * block;
        pass_panel<Kernel>(call, task / row_blocks, first_row, std::min(block, call.rows - first_row));
    });
}

}  // namespace outrider::OUTRIDER_ISA
