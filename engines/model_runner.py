"""Owns the KV tensors and runs one ragged step through the model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engines.attention.dispatch import AttentionCall, attending
from engines.attention.int8_kv import stored_dim
from engines.attention.interface import AttentionBackend, LayerSpec
from engines.attention.native import NativeAttention
from engines.batch import RaggedBatch
from engines.causal_lm import row_logits, takes_logits_to_keep
from engines.loading import LoadedModel
from engines.native.threads import reserved_for_kernels
from engines.optimized.decoder_layer import has_fused_layers, stepping
from engines.staging import send


class Runner(Protocol):
    """What the step needs of a model; ModelRunner is the one for real ones."""

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Logits [num_rows, vocab] of `batch.logit_rows`; writes the batch's keys and values to their slots."""
        ...

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy (source, destination) blocks in all layers; all sources are read first."""
        ...


class ModelRunner:
    """One model with its KV cache: per distinct layer a key and a value tensor of `num_blocks` blocks.

    `kv_dtype` is the model's (None), or torch.int8 for vectors with scales (see attention/int8_kv.py).
    Not thread-safe: one step at a time, though several runners may share a process.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        backend: AttentionBackend,
        num_blocks: int,
        block_size: int,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._model = loaded.model
        self._backend = backend
        self._on_kernels = loaded.runs_on_kernels
        self._has_fused_layers = isinstance(backend, NativeAttention) and has_fused_layers(loaded.model)
        self._selects_rows = takes_logits_to_keep(loaded.model)
        # Zeroed, since a backend may read a slot before it is written as long as its weight is 0.
        self._pools = {
            layer: self._allocate(spec, kv_dtype or loaded.dtype, loaded.device)
            for layer, spec in enumerate(loaded.layers)
            if spec is not None
        }
        self._pool_of_layer = [self._pools[source] for source in loaded.kv_sources]

    @staticmethod
    def bytes_per_block(loaded: LoadedModel, block_size: int, kv_dtype: torch.dtype | None = None) -> int:
        """Bytes that one block takes in all layers together; `kv_dtype` as for the runner."""
        dtype = kv_dtype or loaded.dtype
        return block_size * sum(spec.bytes_per_token(dtype) for spec in loaded.layers if spec is not None)

    @property
    def kv_tensors(self) -> tuple[Tensor, ...]:
        """All KV tensors, [num_blocks, block_size, num_kv_heads, stored dim] each; the runner's own memory."""
        return tuple(cache for pool in self._pools.values() for cache in pool)

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Logits [num_rows, vocab] of `batch.logit_rows`, in the model's dtype, on its device.

        Modifies the KV slots of `batch.slot_mapping`. Raises UnsupportedModelError if the model asks its attention
        for something that the engine would have to ignore.
        """
        assert batch.block_size == self.block_size
        threads = reserved_for_kernels() if self._on_kernels else nullcontext()
        layers = stepping(batch, self._pool_of_layer) if self._has_fused_layers else nullcontext()
        with threads, layers, attending(lambda call: self._attend(call, batch)):
            return row_logits(
                self._model, batch.input_ids, batch.positions, batch.logit_rows, selects_rows=self._selects_rows
            )

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination) in all layers; all sources are read before any destination is written."""
        if not copies:
            return
        caches = self.kv_tensors
        pairs = np.array(copies, np.int64)
        sources, destinations = send((pairs[:, 0], pairs[:, 1]), caches[0].device)
        with torch.inference_mode():
            for cache in caches:
                cache.index_copy_(0, destinations, cache.index_select(0, sources))

    def _allocate(self, spec: LayerSpec, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        shape = (self.num_blocks, self.block_size, spec.num_kv_heads)
        return (
            torch.zeros(*shape, stored_dim(spec.head_dim, dtype), dtype=dtype, device=device),
            torch.zeros(*shape, stored_dim(spec.value_head_dim, dtype), dtype=dtype, device=device),
        )

    def _attend(self, call: AttentionCall, batch: RaggedBatch) -> Tensor:
        key_cache, value_cache = self._pool_of_layer[call.layer_idx]
        return self._backend.attend(
            call.query,
            call.key,
            call.value,
            key_cache,
            value_cache,
            batch,
            scaling=call.scaling,
            sliding_window=call.sliding_window,
            softcap=call.softcap,
            sinks=call.sinks,
        )
