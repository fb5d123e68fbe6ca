"""KV caches in int8, with a scale for each vector (a head of a token), so that none depends on its neighbours.

    | dim int8 numbers | scale, fp32, as 4 bytes |        number = int8 * scale, scale = largest magnitude / 127

The scale lies in the last dimension, which is longer by SCALE_BYTES: copying, sharing and rewriting blocks stay as they
are. A number is off by at most half a scale. Everything here takes other caches too, and leaves their numbers alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4


def quantize(vectors: Tensor) -> Tensor:
    """Vectors [..., dim] as int8 [..., dim + SCALE_BYTES]: rounded half to even, all 0 where the scale is 0."""
    numbers = vectors.float()
    scales = numbers.abs().amax(-1, keepdim=True) / 127
    codes = (numbers / scales.where(scales > 0, 1.0)).round_().clamp_(-127, 127)
    codes = torch.where(scales > 0, codes, 0.0).to(torch.int8)  # a scale of NaN stays and is seen
    return torch.cat([codes, scales.contiguous().view(torch.int8)], dim=-1)


def dequantize(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize` made, as numbers [..., dim] in `dtype`; what is not int8 comes back as it is."""
    if stored.dtype is not torch.int8:
        return stored
    scales = stored[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (stored[..., :-SCALE_BYTES] * scales).to(dtype)


def write(cache: Tensor, slots: Tensor, vectors: Tensor) -> None:
    """Put vectors [num_tokens, num_kv_heads, dim] into `slots` [num_tokens] of a cache, in the cache's dtype."""
    cache.flatten(0, 1).index_copy_(0, slots, quantize(vectors) if cache.dtype is torch.int8 else vectors)


def vector_dim(cache: Tensor) -> int:
    """Numbers of a vector in a cache [..., dim], or [..., dim + SCALE_BYTES] if it is int8."""
    return cache.shape[-1] - (SCALE_BYTES if cache.dtype is torch.int8 else 0)


def stored_dim(dim: int, dtype: torch.dtype) -> int:
    """Last dimension of a cache of `dtype` for vectors of `dim` numbers."""
    return dim + (SCALE_BYTES if dtype is torch.int8 else 0)
