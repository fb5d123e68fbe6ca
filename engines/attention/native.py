"""Attention by the CPU kernels: one call writes keys and values and walks the block table; nothing is gathered.

A row's result is bitwise the same whoever else is in the batch and however many rows its sequence has in the step.

On 2 threads of an AVX-512 EPYC, bf16, 16 query and 8 KV heads of 128, a layer took 0.35 ms for 16 sequences of 128
positions and 1.2 ms for 16 of 512 (2026-11-21, within whole steps, medians of 30); `batched.py` has torch's figures.
"""

from __future__ import annotations

from torch import Tensor

from engines.attention.batched import BatchedAttention
from engines.batch import RaggedBatch
from engines.native.attention import AttentionStep, takes


class NativeAttention:
    """AttentionBackend for bf16 and fp32 on CPU; what the kernels do not take goes to BatchedAttention."""

    name = "native"
    block_multiple = 1

    def __init__(self) -> None:
        self._step: AttentionStep | None = None
        self._fallback = BatchedAttention()

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
        if not takes(query, value, key_cache):
            return self._fallback.attend(
                query,
                key,
                value,
                key_cache,
                value_cache,
                batch,
                scaling=scaling,
                sliding_window=sliding_window,
                softcap=softcap,
                sinks=sinks,
            )
        step = self._step
        if step is None or step.batch is not batch:
            step = self._step = AttentionStep(batch)
        return step.attend(
            query if query.stride(2) == 1 else query.contiguous(),
            key if key.stride(2) == 1 else key.contiguous(),
            value if value.stride(2) == 1 else value.contiguous(),
            key_cache,
            value_cache,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
        )
