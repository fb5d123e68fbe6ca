"""Attention in plain torch, batched over sequences: the default where the CPU kernels are not (see native.py).

Sequences with at most SHORT_QUERY_ROWS query rows go together (see layout.py): keys are gathered in tiles that stay in
the CPU's cache until the product has used them; the query heads that share a KV head are rows of one item. Values are
not gathered for few rows: embedding_bag, its per-sample weights the softmax's, reads them from their slots and sums at
memory speed. Longer sequences (prefill) go one by one through scaled_dot_product_attention.

What was tried: best ms a layer on one thread of a busy AVX-512 EPYC, torch 2.13, bf16, 16 query and 8 KV heads of 128,
blocks of 16, writing keys and values included (2026-11-21, variants interleaved):

    sequences x query rows x context       16x1x128  16x1x512  16x5x128  16x5x512
    SDPA sequence by sequence                  11.0      55.0       5.1      16.7
    SDPA over padded gather, enable_gqa        12.0      54.8       4.8      19.2
    the same, heads folded into rows            2.6      12.8       4.4      16.4
    bmm over padded gather                      2.2       9.6       2.3      18.8
    chunked bmm, all keys gathered at once      1.1       7.4       2.0      11.4
    chunked bmm in tiles of 4 MiB               1.1       5.6       2.0       8.8
    the same, values by embedding_bag           0.9       4.8       3.5      12.2
    as it is here                               0.9       4.7       2.4       8.5
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.attention.int8_kv import dequantize, vector_dim, write
from engines.attention.layout import CHUNK_TOKENS, ShortQueries
from engines.attention.prefill import attend_sequence
from engines.batch import RaggedBatch

SHORT_QUERY_ROWS = 16
# Above so many query rows per KV head, gathering values once is cheaper than reading them once per row.
_MAX_BAG_ROWS = 4
_TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


class BatchedAttention:
    """AttentionBackend for CPU and, without custom kernels, GPU. Softmax is in fp32."""

    name = "torch"
    block_multiple = 1

    def __init__(self) -> None:
        self._batch: RaggedBatch | None = None
        self._short: dict[int | None, list[ShortQueries]] = {}
        self._space = torch.empty(0)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: RaggedBatch,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        write(key_cache, batch.slot_mapping, key)
        write(value_cache, batch.slot_mapping, value)
        output = query.new_empty(*query.shape[:2], value.shape[2])
        for group in self._groups(batch, sliding_window):
            result = self._attend_short(query, key_cache, value_cache, group, scaling, softcap, sinks)
            output.index_copy_(0, group.target_rows, result)
        stop = 0
        for index, q_len in enumerate(batch.q_lens_cpu):
            start, stop = stop, stop + q_len
            if q_len > SHORT_QUERY_ROWS:
                keys, values = _sequence_kv(batch, index, start, key, value, key_cache, value_cache)
                output[start:stop] = attend_sequence(
                    query[start:stop],
                    keys,
                    values,
                    scaling=scaling,
                    sliding_window=sliding_window,
                    softcap=softcap,
                    sinks=sinks,
                )
        return output

    def _groups(self, batch: RaggedBatch, sliding_window: int | None) -> list[ShortQueries]:
        """The step's short sequences by width; built at the first layer with this window."""
        if batch is not self._batch:
            self._batch, self._short = batch, {}
        if sliding_window not in self._short:
            by_width: dict[int, list[int]] = {}
            for index, q_len in enumerate(batch.q_lens_cpu):
                if q_len <= SHORT_QUERY_ROWS:
                    by_width.setdefault(1 << (q_len - 1).bit_length(), []).append(index)
            self._short[sliding_window] = [
                ShortQueries(batch, sequences, width, sliding_window) for width, sequences in by_width.items()
            ]
        return self._short[sliding_window]

    def _attend_short(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        group: ShortQueries,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Output [kept rows, num_heads, value_head_dim] of the group's rows."""
        num_kv_heads, per_head = key_cache.shape[2], query.shape[1] // key_cache.shape[2]
        queries = query.index_select(0, group.query_rows)
        queries = queries.view(group.num_sequences, group.width, num_kv_heads, per_head, -1).transpose(1, 2)
        products = self._key_products(queries.flatten(2, 3).index_select(0, group.owner), key_cache, group)
        scores = _scores(
            products.view(group.num_items, num_kv_heads, group.width, per_head, -1), group, scaling, softcap
        )
        weights = _by_item(torch.softmax(scores, dim=-1).to(query.dtype), group)
        result = self._weighted_values(weights, value_cache, group)
        if group.max_chunks > 1:
            result = _by_sequence(result.float(), group).sum(1)
        result = result.view(*scores.shape[:4], -1)
        if sinks is not None:
            # One more score per head without a value scales the rest by e^lse / (e^lse + e^sink).
            sink = sinks.float().view(num_kv_heads, 1, per_head)
            result = result * torch.sigmoid(torch.logsumexp(scores, dim=-1) - sink).unsqueeze(-1)
        result = result.transpose(1, 2).reshape(-1, query.shape[1], vector_dim(value_cache)).to(query.dtype)
        return result if group.kept_rows is None else result.index_select(0, group.kept_rows)

    def _key_products(self, queries: Tensor, key_cache: Tensor, group: ShortQueries) -> Tensor:
        """Query . key of each item, [num_items, num_kv_heads, rows, CHUNK_TOKENS]."""
        products = queries.new_empty(*queries.shape[:3], CHUNK_TOKENS)
        for items, keys in self._gathered(key_cache, group, queries.dtype):
            torch.bmm(queries[items].flatten(0, 1), keys.transpose(1, 2), out=products[items].flatten(0, 1))
        return products

    def _weighted_values(self, weights: Tensor, value_cache: Tensor, group: ShortQueries) -> Tensor:
        """Weights [num_items, num_kv_heads, rows, CHUNK_TOKENS] times values, with the value dimension last."""
        _, num_kv_heads, rows, _ = weights.shape
        value_dim = vector_dim(value_cache)
        result = weights.new_empty(*weights.shape[:3], value_dim)
        if rows > _MAX_BAG_ROWS or value_cache.dtype is torch.int8:
            for items, values in self._gathered(value_cache, group, weights.dtype):
                torch.bmm(weights[items].flatten(0, 1), values, out=result[items].flatten(0, 1))
            return result
        sums = F.embedding_bag(
            group.cache_rows(num_kv_heads, rows),
            value_cache.view(-1, value_dim),
            mode="sum",
            per_sample_weights=weights.reshape(-1, CHUNK_TOKENS),
        )
        return sums.view_as(result)

    def _gathered(self, cache: Tensor, group: ShortQueries, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Tiles of items with their part of the cache [tile items * num_kv_heads, CHUNK_TOKENS, dim], in `dtype`.

        The memory is the same for all tiles: each is valid until the next.
        """
        num_kv_heads, dim = cache.shape[2:]
        item_size = num_kv_heads * CHUNK_TOKENS * dim
        tile_items = min(max(1, _TILE_BYTES[cache.device.type] // (item_size * cache.itemsize)), group.num_items)
        space = self._work_space(tile_items * item_size, cache)
        rows = group.cache_rows(num_kv_heads).view(group.num_items, -1)
        for start in range(0, group.num_items, tile_items):
            wanted = rows[start : start + tile_items].flatten()
            gathered = space[: len(wanted) * dim].view(-1, dim)
            torch.index_select(cache.view(-1, dim), 0, wanted, out=gathered)
            yield slice(start, start + tile_items), dequantize(gathered.view(-1, CHUNK_TOKENS, dim), dtype)

    def _work_space(self, size: int, like: Tensor) -> Tensor:
        """At least `size` numbers of the dtype and device of `like`; a later call may hand out the same memory."""
        space = self._space
        if len(space) < size or space.dtype != like.dtype or space.device != like.device:
            with torch.inference_mode(False):  # so that it can be written inside and outside of inference mode
                space = self._space = torch.empty(size, dtype=like.dtype, device=like.device)
        return space


def _scores(products: Tensor, group: ShortQueries, scaling: float, softcap: float | None) -> Tensor:
    """Masked scores, fp32 [num_sequences, num_kv_heads, width, per_head, max_chunks * CHUNK_TOKENS].

    products [num_items, num_kv_heads, width, per_head, CHUNK_TOKENS] in the model's dtype.
    """
    products = _by_sequence(products, group).movedim(1, 4)
    bias = group.bias.view(group.num_sequences, 1, group.width, 1, group.max_chunks, CHUNK_TOKENS)
    if softcap is None:
        return torch.add(bias, products, alpha=scaling).flatten(4)
    return (torch.tanh(products.float() * (scaling / softcap)) * softcap + bias).flatten(4)


def _by_item(weights: Tensor, group: ShortQueries) -> Tensor:
    """What _scores has laid out by sequences as [num_items, num_kv_heads, rows, CHUNK_TOKENS]."""
    num_sequences, num_kv_heads = weights.shape[:2]
    weights = weights.view(num_sequences, num_kv_heads, -1, group.max_chunks, CHUNK_TOKENS).movedim(3, 1)
    weights = weights.reshape(-1, *weights.shape[2:])
    return weights if group.present is None else weights.index_select(0, group.present)


def _by_sequence(items: Tensor, group: ShortQueries) -> Tensor:
    """[num_items, ...] -> [num_sequences, max_chunks, ...], 0 where a sequence has fewer chunks."""
    if group.rectangle is not None:
        items = torch.cat([items, items.new_zeros(1, *items.shape[1:])]).index_select(0, group.rectangle)
    return items.view(group.num_sequences, group.max_chunks, *items.shape[1:])


def _sequence_kv(
    batch: RaggedBatch, index: int, start: int, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values [kv_len, num_kv_heads, dim] of one sequence; gathered only if the cache has what they have not:
    tokens of earlier steps, or its own rounding."""
    q_len, kv_len = batch.q_lens_cpu[index], batch.kv_lens_cpu[index]
    if kv_len == q_len and key_cache.dtype is not torch.int8:
        return key[start : start + q_len], value[start : start + q_len]
    blocks = batch.block_table[index, : -(-kv_len // batch.block_size)]
    keys, values = (cache.index_select(0, blocks).flatten(0, 1)[:kv_len] for cache in (key_cache, value_cache))
    return dequantize(keys, key.dtype), dequantize(values, value.dtype)
