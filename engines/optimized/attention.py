"""Attention blocks of known classes: one matrix for queries, keys and values, one native call for head norms and rope.

Between the two and the output projection stands the same attention function as before, on views of the projection.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engines.attention.dispatch import ATTENTION_NAME, AttentionCall, attending
from engines.native.dtype import DTYPE_CODES
from engines.native.rotary import MAX_HEAD_DIM, RotaryLayer
from engines.optimized.agreement import close
from engines.optimized.linear import is_untouched
from engines.optimized.norm import native_norm
from engines.optimized.packing import pack

Arguments = Mapping[str, object]


class _Projection(Protocol):
    in_features: int
    out_features: int


class _Block(Protocol):
    """What the classes of PLAIN_ATTENTION have in common."""

    config: PretrainedConfig
    layer_idx: int
    head_dim: int
    scaling: float
    q_proj: _Projection
    k_proj: _Projection


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")


def _nothing(_: nn.Module) -> Arguments:
    return {}


def _own_window(attention: nn.Module) -> Arguments:
    return {"sliding_window": attention.sliding_window}


def _config_window(attention: nn.Module) -> Arguments:
    return {"sliding_window": getattr(attention.config, "sliding_window", None)}


def _window_and_softcap(attention: nn.Module) -> Arguments:
    return {"sliding_window": attention.sliding_window, "softcap": attention.attn_logit_softcapping}


# Classes of transformers whose forward is: project, norm heads where there are norms, rotate halves, attend, project.
# With what each passes to the attention function beside scaling and dropout.
PLAIN_ATTENTION: dict[str, Callable[[nn.Module], Arguments]] = {
    "ApertusAttention": _nothing,
    "ArceeAttention": _nothing,
    "Gemma2Attention": _window_and_softcap,
    "Gemma3Attention": _own_window,
    "GemmaAttention": _nothing,
    "GraniteAttention": _nothing,
    "GraniteMoeAttention": _nothing,
    "HyperCLOVAXAttention": _nothing,
    "LlamaAttention": _nothing,
    "MinistralAttention": _own_window,
    "MistralAttention": _config_window,
    "MixtralAttention": _config_window,
    "Qwen2Attention": _own_window,
    "Qwen2MoeAttention": _nothing,
    "Qwen3Attention": _own_window,
    "Qwen3MoeAttention": _own_window,
    "SmolLM3Attention": _own_window,  # its layers without rope fail the trial and stay
}


class FusedAttention(nn.Module):
    """An attention block of PLAIN_ATTENTION. `attention` is the original without its projections: it is what attention
    functions are given as their module.
    """

    def __init__(self, original: nn.Module, qkv_proj: nn.Module, o_proj: nn.Module, rotary: RotaryLayer) -> None:
        super().__init__()
        block = cast(_Block, original)
        self.attention = original
        self.qkv_proj = qkv_proj
        self.o_proj = o_proj
        self._config = block.config
        self.layer_idx = block.layer_idx
        self.scaling = block.scaling
        self.rotary = rotary
        self._heads = [rotary.num_query_heads, rotary.num_key_heads, rotary.num_key_heads]
        self.arguments = PLAIN_ATTENTION[type(original).__name__](original)
        self._eager = sys.modules[type(original).__module__].eager_attention_forward

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the original's: hidden_states [batch, tokens, hidden], cosines and sines [batch | 1, tokens, head_dim]."""
        shape = hidden_states.shape[:-1]
        qkv = self.qkv_proj(hidden_states)
        cosines, sines = position_embeddings
        if cosines.shape[0] != shape[0]:
            cosines, sines = (table.expand(*shape, -1).contiguous() for table in position_embeddings)
        self.rotary.rotate_(qkv, cosines, sines)
        heads = qkv.view(*shape, -1, self.rotary.head_dim).transpose(1, 2)
        query, key, value = heads.split_with_sizes(self._heads, dim=1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self._config._attn_implementation, self._eager)
        output, weights = attend(
            self.attention,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            **self.arguments,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1)), weights


def fused_attention(module: nn.Module, dtype: torch.dtype) -> FusedAttention | None:
    """A replacement for a block of PLAIN_ATTENTION, tried out in `dtype` through the engine's attention function.

    It takes over the original module and removes its projections and norms; on None nothing has changed.
    """
    if not _is_plain(module) or dtype not in DTYPE_CODES:
        return None
    if cast(_Block, module).config._attn_implementation != ATTENTION_NAME:
        return None
    *qkv, out = (module.get_submodule(name) for name in _PROJECTIONS)
    rotary, qkv_proj, o_proj = _rotary_layer(module, dtype), pack(qkv), pack([out])
    if rotary is None or qkv_proj is None or o_proj is None:
        return None
    fused = FusedAttention(module, qkv_proj, o_proj, rotary)
    if not _attends_alike(module, fused, dtype):
        return None
    for name in (*_PROJECTIONS, *_NORMS):
        if hasattr(module, name):
            delattr(module, name)
    return fused


def _is_plain(module: nn.Module) -> bool:
    known = type(module).__module__.startswith("transformers.models.") and type(module).__name__ in PLAIN_ATTENTION
    return known and is_untouched(module) and all(hasattr(module, name) for name in _PROJECTIONS)


def _rotary_layer(module: nn.Module, dtype: torch.dtype) -> RotaryLayer | None:
    """None if the heads are too large or their norms are not what the kernel computes."""
    block = cast(_Block, module)
    head_dim = block.head_dim
    norms = []
    for name in _NORMS:
        original = getattr(module, name, None)
        norm = None if original is None else native_norm(original)
        if original is not None and (norm is None or norm.scale.shape[0] != head_dim):
            return None
        norms.append(None if norm is None else (norm.scale, norm.epsilon))
    if head_dim > MAX_HEAD_DIM:
        return None
    num_queries, num_keys = block.q_proj.out_features // head_dim, block.k_proj.out_features // head_dim
    return RotaryLayer(num_queries, num_keys, head_dim, dtype, *norms)


def _attends_alike(original: nn.Module, fused: FusedAttention, dtype: torch.dtype) -> bool:
    """Whether both ask the attention function for the same, and make the same of its answer."""
    generator = torch.Generator().manual_seed(0)
    block = cast(_Block, original)
    sizes = (block.q_proj.in_features, block.head_dim, block.head_dim)
    hidden, cosines, sines = (torch.randn(1, 5, size, generator=generator).to(dtype) for size in sizes)
    calls: list[AttentionCall] = []

    def attend(call: AttentionCall) -> Tensor:
        calls.append(replace(call, query=call.query.clone(), key=call.key.clone(), value=call.value.clone()))
        return call.query

    with torch.inference_mode(), attending(attend):
        outputs = [
            attention(hidden_states=hidden, position_embeddings=(cosines, sines), attention_mask=None)[0]
            for attention in (original, fused)
        ]
    return close(*outputs) and _calls_alike(*calls)


def _calls_alike(first: AttentionCall, second: AttentionCall) -> bool:
    tensors = all(close(getattr(first, name), getattr(second, name)) for name in ("query", "key", "value"))
    settings = ("layer_idx", "scaling", "sliding_window", "softcap", "sinks")
    return tensors and all(getattr(first, name) == getattr(second, name) for name in settings)
