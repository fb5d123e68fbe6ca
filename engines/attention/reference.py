"""Attention by the definition: one sequence, one head at a time, fp32. Slow; other backends are tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.attention.int8_kv import dequantize, write
from engines.batch import RaggedBatch


class ReferenceAttention:
    """AttentionBackend for tests and for doubt; any device, any dtype."""

    name = "reference"
    block_multiple = 1

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
        outputs = []
        starts = batch.cu_seqlens_q.tolist()
        for index, kv_len in enumerate(batch.kv_lens_cpu):
            rows = query[starts[index] : starts[index + 1]].float()
            positions = torch.arange(kv_len, device=query.device)
            slots = batch.block_table[index].long()[positions // batch.block_size] * batch.block_size
            slots = slots + positions % batch.block_size
            keys = dequantize(key_cache.flatten(0, 1)[slots], torch.float32).float()
            values = dequantize(value_cache.flatten(0, 1)[slots], torch.float32).float()
            visible = _visible(rows.shape[0], kv_len, sliding_window, query.device)
            outputs.append(_attend_one(rows, keys, values, visible, scaling, softcap, sinks))
        return torch.cat(outputs).to(query.dtype)


def _visible(q_len: int, kv_len: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Which positions [q_len, kv_len] the last q_len rows of a sequence see."""
    row = torch.arange(kv_len - q_len, kv_len, device=device).unsqueeze(1)
    column = torch.arange(kv_len, device=device)
    visible = column <= row
    return visible if sliding_window is None else visible & (column > row - sliding_window)


def _attend_one(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence: rows [q_len, num_heads, head_dim], keys and values [kv_len, num_kv_heads, ...], all fp32."""
    group = rows.shape[1] // keys.shape[1]
    heads = []
    for head in range(rows.shape[1]):
        scores = rows[:, head] @ keys[:, head // group].T * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[head].float().expand(rows.shape[0], 1)], dim=1)
        weights = torch.softmax(scores, dim=1)[:, : keys.shape[0]]
        heads.append(weights @ values[:, head // group])
    return torch.stack(heads, dim=1)
