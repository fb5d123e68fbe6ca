"""Attention of one sequence with many query rows, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE_ROWS = 256


def attend_sequence(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Output [q_len, num_heads, value_head_dim] of the last q_len positions of a sequence.

    query [q_len, num_heads, head_dim]; keys, values [kv_len, num_kv_heads, dim]. Rows go in tiles, so that work space
    grows with kv_len, not with its square.
    """
    q_len, (kv_len, num_kv_heads, _) = query.shape[0], keys.shape
    # KV heads as the batch, the query heads that share one as its heads: broadcast, never repeated in memory.
    queries = query.view(q_len, num_kv_heads, -1, query.shape[2]).permute(1, 2, 0, 3)
    keys, values = (cache.transpose(0, 1).unsqueeze(1).expand(-1, queries.shape[1], -1, -1) for cache in (keys, values))
    plain = softcap is None and sinks is None
    if plain and q_len == kv_len and (sliding_window is None or sliding_window >= kv_len):
        result = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scaling)
        return result.permute(2, 0, 1, 3).flatten(1, 2)
    tiles = []
    for start in range(0, q_len, _TILE_ROWS):
        tile = queries[:, :, start : start + _TILE_ROWS]
        first = kv_len - q_len + start
        oldest = 0 if sliding_window is None else max(0, first + 1 - sliding_window)
        seen = slice(oldest, first + tile.shape[2])
        visible = _visible(first, seen, sliding_window, query.device)
        operands = (tile, keys[:, :, seen], values[:, :, seen], visible)
        tiles.append(
            F.scaled_dot_product_attention(*operands, scale=scaling)
            if plain
            else _attend_dense(*operands, scaling, softcap, sinks)
        )
    return torch.cat(tiles, dim=2).permute(2, 0, 1, 3).flatten(1, 2)


def _visible(first: int, seen: slice, sliding_window: int | None, device: torch.device) -> Tensor:
    """Which positions of `seen` the rows at positions `first` to `seen.stop` see: bool [rows, positions]."""
    row = torch.arange(first, seen.stop, device=device).unsqueeze(1)
    column = torch.arange(seen.start, seen.stop, device=device)
    visible = column <= row
    return visible if sliding_window is None else visible & (column > row - sliding_window)


def _attend_dense(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What scaled_dot_product_attention has no arguments for. All [num_kv_heads, per_head, rows | positions, dim]."""
    scores = (queries @ keys.transpose(2, 3)).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(*scores.shape[:2], 1, 1).expand(-1, -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink], dim=3)
    weights = torch.softmax(scores, dim=3)[..., : keys.shape[2]]
    return weights.to(values.dtype) @ values
