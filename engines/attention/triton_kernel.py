"""Ragged paged attention for GPUs, in Triton: write keys and values, attend in tiles, merge what was split.

A tile is a few consecutive query rows of one sequence, with all query heads of one KV head packed under each other, so
that keys and values are read once for the group and 1 + num_drafts rows share one matrix product:

    packed row   0     1     2     3     4     5
    query row    0     0     1     1     2     2      (two query heads per KV head)
    query head   2h    2h+1  2h    2h+1  2h    2h+1

Softmax is online (FlashAttention, arXiv 2205.14135), in base 2 and fp32. A tile with IS_SPLIT leaves for each split of
SPLIT_TOKENS positions an unnormalised output, the best score and the sum of weights, to be merged afterwards
(Flash-Decoding). Splits and key tiles lie at multiples of their size, wherever a tile begins or ends, and what a row
does not see adds exact zeros: its numbers do not depend on its neighbours, nor on how many programs share the splits.

Caches are [num_blocks, block_size, num_kv_heads, dim], contiguous; key and value dimensions may differ and need not be
powers of two. Slots outside of [first visible, last visible] of a tile are never read: they may hold NaN.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# Parameters in capitals are compile-time constants, the others of attend_kernel and merge_kernel are pointers, strides
# in elements, or numbers; Triton reads them, not Python.

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def write_kernel(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
):
    """One program copies one token's key and value of one KV head to their slot. Grid [num_tokens, num_kv_heads]."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    to = tl.load(slot_mapping + token) * NUM_KV_HEADS + head
    lane = tl.arange(0, KEY_LANES)
    row = tl.load(key + token * key_token_stride + head * key_head_stride + lane, mask=lane < KEY_DIM)
    tl.store(key_cache + to * KEY_DIM + lane, row, mask=lane < KEY_DIM)
    lane = tl.arange(0, VALUE_LANES)
    row = tl.load(value + token * value_token_stride + head * value_head_stride + lane, mask=lane < VALUE_DIM)
    tl.store(value_cache + to * VALUE_DIM + lane, row, mask=lane < VALUE_DIM)


@triton.jit
def _attend_range(
    queries,  # [TILE_ROWS, KEY_LANES]
    position,  # [TILE_ROWS] int32
    keys_of_head,
    values_of_head,
    block_ids,
    oldest,  # the first position that any row sees
    start,
    stop,
    scaling,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Unnormalised output [TILE_ROWS, VALUE_LANES], best score and sum of weights [TILE_ROWS] over [start, stop)."""
    best = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    output = tl.zeros([TILE_ROWS, VALUE_LANES], tl.float32)
    key_lane = tl.arange(0, KEY_LANES)
    value_lane = tl.arange(0, VALUE_LANES)
    for base in range(start, stop, TILE_KEYS):
        column = base + tl.arange(0, TILE_KEYS)
        is_read = (column >= oldest) & (column < stop)
        block = tl.load(block_ids + column // BLOCK_SIZE, mask=is_read, other=0).to(tl.int64)
        slot = block * BLOCK_SIZE + column % BLOCK_SIZE
        keys = tl.load(
            keys_of_head + slot[None, :] * (NUM_KV_HEADS * KEY_DIM) + key_lane[:, None],
            mask=is_read[None, :] & (key_lane[:, None] < KEY_DIM),
            other=0.0,
        )
        scores = tl.dot(queries, keys, input_precision=PRECISION) * scaling
        if SOFTCAP > 0.0:
            # `scaling` has SOFTCAP divided out; tanh(x) = 2 sigmoid(2x) - 1.
            scores = (2.0 * tl.sigmoid(2.0 * scores) - 1.0) * (SOFTCAP * LOG2_E)
        is_seen = is_read[None, :] & (column[None, :] <= position[:, None])
        if WINDOW > 0:
            is_seen = is_seen & (column[None, :] > position[:, None] - WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        anchor = tl.where(new_best == float("-inf"), 0.0, new_best)  # no row is without a finite number to subtract
        weights = tl.exp2(scores - anchor[:, None])
        decay = tl.exp2(best - anchor)
        values = tl.load(
            values_of_head + slot[:, None] * (NUM_KV_HEADS * VALUE_DIM) + value_lane[None, :],
            mask=is_read[:, None] & (value_lane[None, :] < VALUE_DIM),
            other=0.0,
        )
        total = total * decay + tl.sum(weights, 1)
        output = tl.dot(weights.to(values.dtype), values, output * decay[:, None], input_precision=PRECISION)
        best = new_best
    return output, best, total


@triton.jit(do_not_specialize=["num_splits", "table_stride"])
def attend_kernel(
    query,
    key_cache,
    value_cache,
    output,
    partial_output,
    partial_best,
    partial_total,
    tiles,
    cu_seqlens_q,
    kv_lens,
    block_table,
    sinks,
    query_token_stride,
    query_head_stride,
    table_stride,
    num_splits,
    scaling,
    HAS_SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid [num_tiles, num_kv_heads, programs sharing the splits].

    tiles [num_tiles, 3] int32, as in TilePlan. query, output [num_tokens, num_heads, dim]; with IS_SPLIT, instead of
    output, partial_output [num_short_rows, num_heads, num_splits, VALUE_DIM], partial_best and partial_total
    [num_short_rows, num_heads, num_splits], fp32, are written. `scaling` leads to base 2.
    """
    tile = tiles + 3 * tl.program_id(0)
    sequence = tl.load(tile)
    if sequence < 0:
        return
    kv_head = tl.program_id(1)
    first_row = tl.load(tile + 1)
    first_token = tl.load(cu_seqlens_q + sequence)
    q_len = tl.load(cu_seqlens_q + sequence + 1) - first_token
    past = tl.load(kv_lens + sequence) - q_len

    TILE_QUERIES: tl.constexpr = TILE_ROWS // GROUP
    packed = tl.arange(0, TILE_ROWS)
    row = first_row + packed // GROUP
    last_row = tl.minimum(first_row + TILE_QUERIES, q_len) - 1
    is_row = row <= last_row
    position = past + tl.minimum(row, last_row)  # what is no row sees what the last one sees: never nothing
    head = kv_head * GROUP + packed % GROUP
    token = (first_token + row).to(tl.int64)
    key_lane = tl.arange(0, KEY_LANES)
    value_lane = tl.arange(0, VALUE_LANES)
    queries = tl.load(
        query + token[:, None] * query_token_stride + head[:, None] * query_head_stride + key_lane[None, :],
        mask=is_row[:, None] & (key_lane[None, :] < KEY_DIM),
        other=0.0,
    )
    keys_of_head = key_cache + kv_head * KEY_DIM
    values_of_head = value_cache + kv_head * VALUE_DIM
    block_ids = block_table + sequence.to(tl.int64) * table_stride
    stop = past + last_row + 1
    oldest = tl.maximum(past + first_row + 1 - WINDOW, 0) if WINDOW > 0 else 0
    aligned = oldest // TILE_KEYS * TILE_KEYS
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    is_stored = is_row[:, None] & (value_lane[None, :] < VALUE_DIM)

    if IS_SPLIT:
        place = (tl.load(tile + 2) + row).to(tl.int64) * NUM_HEADS + head
        first_split = oldest // SPLIT_TOKENS + tl.program_id(2)
        for split in range(first_split, tl.cdiv(stop, SPLIT_TOKENS), tl.num_programs(2)):
            result, best, total = _attend_range(
                queries, position, keys_of_head, values_of_head, block_ids, oldest,
                tl.maximum(split * SPLIT_TOKENS, aligned), tl.minimum((split + 1) * SPLIT_TOKENS, stop), scaling,
                SOFTCAP, WINDOW, BLOCK_SIZE, NUM_KV_HEADS, KEY_DIM, VALUE_DIM, KEY_LANES, VALUE_LANES, TILE_ROWS,
                TILE_KEYS, PRECISION,
            )  # fmt: skip
            part = place * num_splits + split
            tl.store(partial_output + part[:, None] * VALUE_DIM + value_lane[None, :], result, mask=is_stored)
            tl.store(partial_best + part, best, mask=is_row)
            tl.store(partial_total + part, total, mask=is_row)
    else:
        result, best, total = _attend_range(
            queries, position, keys_of_head, values_of_head, block_ids, oldest, aligned, stop, scaling,
            SOFTCAP, WINDOW, BLOCK_SIZE, NUM_KV_HEADS, KEY_DIM, VALUE_DIM, KEY_LANES, VALUE_LANES, TILE_ROWS,
            TILE_KEYS, PRECISION,
        )  # fmt: skip
        if HAS_SINKS:
            total += tl.exp2(tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32) * LOG2_E - best)
        result = result / total[:, None]
        place = token * NUM_HEADS + head
        tl.store(output + place[:, None] * VALUE_DIM + value_lane[None, :], result, mask=is_stored)


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(
    partial_output,
    partial_best,
    partial_total,
    output,
    tokens,
    positions,
    sinks,
    num_splits,
    HAS_SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    MERGED_SPLITS: tl.constexpr,
):
    """Grid [num_short_rows, num_heads]; tokens [num_short_rows] int32 are rows of output and positions (int64)."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + token)
    last = position // SPLIT_TOKENS
    first = tl.maximum(position + 1 - WINDOW, 0) // SPLIT_TOKENS if WINDOW > 0 else 0
    value_lane = tl.arange(0, VALUE_LANES)
    place = row * NUM_HEADS + head
    best = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    result = tl.zeros([VALUE_LANES], tl.float32)
    for base in range(first // MERGED_SPLITS * MERGED_SPLITS, last + 1, MERGED_SPLITS):
        split = base + tl.arange(0, MERGED_SPLITS)
        exists = (split >= first) & (split <= last)
        part = place * num_splits + split
        bests = tl.load(partial_best + part, mask=exists, other=float("-inf"))
        totals = tl.load(partial_total + part, mask=exists, other=0.0)
        outputs = tl.load(
            partial_output + part[:, None] * VALUE_DIM + value_lane[None, :],
            mask=exists[:, None] & (value_lane[None, :] < VALUE_DIM),
            other=0.0,
        )
        # Finite: a row sees something of each split from its first to its last.
        new_best = tl.maximum(best, tl.max(bests, 0))
        weights = tl.exp2(bests - new_best)
        decay = tl.exp2(best - new_best)
        total = total * decay + tl.sum(totals * weights, 0)
        result = result * decay + tl.sum(outputs * weights[:, None], 0)
        best = new_best
    if HAS_SINKS:
        total += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2_E - best)
    stored = output + (token * NUM_HEADS + head) * VALUE_DIM + value_lane
    tl.store(stored, result / total, mask=value_lane < VALUE_DIM)
