"""Whole decoder layers in one native call, where the engine's own attention kernels serve.

The layers keep the parts that were exchanged one by one. Whenever something is asked of a layer that the one call does
not do (another attention backend, a mask, a cache of transformers), it runs as its parts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from engines.attention.dispatch import NEUTRAL_ARGUMENTS, AttentionCall, attending, effective_window
from engines.attention.native import NativeAttention
from engines.batch import BatchItem, RaggedBatch, build_batch
from engines.native.attention import AttentionStep
from engines.native.decoder_layer import DecoderLayer, DecoderStep, LayerLinear, LayerParts, Norm
from engines.optimized.agreement import close
from engines.optimized.attention import FusedAttention
from engines.optimized.linear import PackedLinear, is_untouched
from engines.optimized.mlp import FusedMLP
from engines.optimized.norm import NativeRMSNorm
from engines.optimized.packing import GatedActivation
from engines.quant.linear import QuantizedLinear

Caches = Sequence[tuple[Tensor, Tensor]]
Tables = tuple[Tensor, Tensor]

_PARTS: dict[str, type[nn.Module]] = {
    "input_layernorm": NativeRMSNorm,
    "self_attn": FusedAttention,
    "post_attention_layernorm": NativeRMSNorm,
    "mlp": FusedMLP,
}
_TRIED_TOKENS = (5, 2)  # of two sequences
_TRIED_BLOCK = 16


class LayerStep:
    """One step for all layers: the batch, and each layer's key and value cache by its index."""

    def __init__(self, batch: RaggedBatch, caches: Caches) -> None:
        self._attention = AttentionStep(batch)
        self._caches = caches
        self._tables: Tables | None = None
        self._step: DecoderStep | None = None

    def run(self, layer: DecoderLayer, layer_idx: int, hidden: Tensor, tables: Tables) -> Tensor:
        """See DecoderStep.run; `tables` are cosines and sines [1, num_tokens, rotary_dim]."""
        if self._step is None or self._tables is not tables:
            self._tables, self._step = tables, DecoderStep(self._attention, tables[0][0], tables[1][0])
        return self._step.run(layer, hidden, *self._caches[layer_idx])


_current: ContextVar[LayerStep | None] = ContextVar("outrider_layer_step", default=None)


@contextmanager
def stepping(batch: RaggedBatch, caches: Caches) -> Iterator[None]:
    """Let fused layers run natively in the enclosed forward pass, in this thread, over this batch and these caches."""
    token = _current.set(LayerStep(batch, caches))
    try:
        yield
    finally:
        _current.reset(token)


class FusedDecoderLayer(nn.Module):
    """A decoder layer in one call. `layer` is the original with its parts, which serves where the call does not."""

    def __init__(self, layer: nn.Module, native: DecoderLayer, layer_idx: int) -> None:
        super().__init__()
        self.layer = layer
        self._native = native
        self._layer_idx = layer_idx

    def __getattr__(self, name: str) -> Any:
        """The original's: models ask their layers for `attention_type` and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object | None = None,
        use_cache: bool | None = False,
        position_embeddings: Tables | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the original's: [1, num_tokens, hidden_size] of a tensor of that shape."""
        step = _current.get()
        if step is not None and position_embeddings is not None:
            is_plain = attention_mask is None and past_key_values is None and kwargs.keys() <= NEUTRAL_ARGUMENTS
            if is_plain and self._takes(hidden_states, position_embeddings):
                return step.run(self._native, self._layer_idx, hidden_states, position_embeddings)
        return self.layer(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )

    def _takes(self, hidden: Tensor, tables: Tables) -> bool:
        dtype = self._native.dtype
        return hidden.is_contiguous() and all(
            table.dtype is dtype and table.is_contiguous() and table.shape[:2] == hidden.shape[:2] for table in tables
        )


def has_fused_layers(model: nn.Module) -> bool:
    """Whether `stepping` would change anything for the model."""
    return any(isinstance(module, FusedDecoderLayer) for module in model.modules())


def fused_layer(layer: nn.Module, dtype: torch.dtype) -> FusedDecoderLayer | None:
    """A replacement for a layer whose parts have all been exchanged, tried out in `dtype`; else None."""
    children = dict(layer.named_children())
    known = type(layer).__module__.startswith("transformers.models.") and is_untouched(layer)
    if not known or children.keys() != _PARTS.keys() or any(True for _ in layer.parameters(recurse=False)):
        return None
    if not all(type(children[name]) is kind for name, kind in _PARTS.items()):
        return None
    native = _native_layer(children, dtype)
    if native is None:
        return None
    fused = FusedDecoderLayer(layer, native, layer_idx=0)
    if not _computes_alike(fused, dtype):
        return None
    fused._layer_idx = cast(FusedAttention, children["self_attn"]).layer_idx
    return fused


def _native_layer(children: dict[str, nn.Module], dtype: torch.dtype) -> DecoderLayer | None:
    attention = cast(FusedAttention, children["self_attn"])
    mlp = cast(FusedMLP, children["mlp"])
    gate_up, activation = _gate_up(mlp.gate_up)
    linears = [_linear(module, dtype) for module in (attention.qkv_proj, attention.o_proj, gate_up, mlp.down_proj)]
    if activation is None or attention.rotary.head_dim % 8 or any(linear is None for linear in linears):
        return None
    qkv, out, gated, down = cast(list[LayerLinear], linears)
    window, softcap = (attention.arguments.get(name) for name in ("sliding_window", "softcap"))
    return DecoderLayer(
        LayerParts(
            attention_norm=_norm(children["input_layernorm"]),
            qkv=qkv,
            rotary=attention.rotary,
            out=out,
            mlp_norm=_norm(children["post_attention_layernorm"]),
            gate_up=gated,
            activation=activation,
            down=down,
            scaling=attention.scaling,
            sliding_window=effective_window(attention.attention, cast(int | None, window)),
            softcap=cast(float | None, softcap),
        )
    )


def _norm(module: nn.Module) -> Norm:
    norm = cast(NativeRMSNorm, module)
    return Norm(norm.scale, norm.epsilon)


def _gate_up(module: nn.Module) -> tuple[nn.Module, Any]:
    """The linear layer, and the activation that it, or what follows it, computes."""
    if isinstance(module, nn.Sequential):
        linear, activation = module
        return linear, activation.activation if isinstance(activation, GatedActivation) else None
    return module, getattr(module, "activation", None)


def _linear(module: nn.Module, dtype: torch.dtype) -> LayerLinear | None:
    if isinstance(module, PackedLinear):
        return module.packed if module.packed.dtype is module.packed.output_dtype is dtype else None
    return module.kernel if isinstance(module, QuantizedLinear) else None


def _computes_alike(fused: FusedDecoderLayer, dtype: torch.dtype) -> bool:
    """Whether the one call gives what the parts give, for two short sequences, and leaves the same in the caches."""
    native = fused._native
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, sum(_TRIED_TOKENS), native.hidden_size, generator=generator).to(dtype)
    tables = torch.randn(2, 1, sum(_TRIED_TOKENS), native.head_dim, generator=generator).to(dtype).unbind()
    batch = _tried_batch()
    outputs, caches = [], []
    for is_native in (False, True):
        shape = (len(_TRIED_TOKENS), _TRIED_BLOCK, native.num_kv_heads, native.head_dim)
        cache = (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
        running = stepping(batch, [cache]) if is_native else attending(partial(_attend, batch, cache))
        with torch.inference_mode(), running:
            outputs.append(fused(hidden, position_embeddings=tables))
        caches.append(cache)
    return close(*outputs) and all(close(*pair) for pair in zip(*caches, strict=True))


def _attend(batch: RaggedBatch, cache: tuple[Tensor, Tensor], call: AttentionCall) -> Tensor:
    return NativeAttention().attend(
        call.query,
        call.key,
        call.value,
        *cache,
        batch,
        scaling=call.scaling,
        sliding_window=call.sliding_window,
        softcap=call.softcap,
        sinks=call.sinks,
    )


def _tried_batch() -> RaggedBatch:
    items = [
        BatchItem(array("i", [0] * length), 0, length, (), array("i", [number]), num_logit_rows=1)
        for number, length in enumerate(_TRIED_TOKENS)
    ]
    return build_batch(items, _TRIED_BLOCK, torch.device("cpu"))
