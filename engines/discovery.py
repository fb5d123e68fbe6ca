"""Learns a model's attention layers by watching one short forward pass, instead of guessing them from its config.

Configs name head counts and sizes in many ways, some differ by layer, and some layers attend to another layer's keys
and values. What arrives at the attention function is what must be stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engines.attention.dispatch import AttentionCall, attending
from engines.attention.interface import LayerSpec
from engines.causal_lm import row_logits, takes_logits_to_keep
from engines.errors import UnsupportedModelError

_NUM_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What a forward pass showed.

    layers[i] is None where layer i attends to the keys and values of layer kv_sources[i], an earlier one; otherwise
    kv_sources[i] is i. sliding_windows[i] is in tokens, None for full attention. `kv_dtype` is that of keys and values.
    """

    layers: tuple[LayerSpec | None, ...]
    kv_sources: tuple[int, ...]
    sliding_windows: tuple[int | None, ...]
    kv_dtype: torch.dtype
    vocab_size: int


class _Recorder:
    """Notes each attention call and answers zeros."""

    def __init__(self) -> None:
        self.calls: dict[int, AttentionCall] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        if call.layer_idx in self.calls:
            raise UnsupportedModelError(f"Layer {call.layer_idx} attends more than once a pass; it cannot be paged.")
        self.calls[call.layer_idx] = call
        num_tokens, num_heads, _ = call.query.shape
        return call.query.new_zeros(num_tokens, num_heads, call.value.shape[2])


def observe(model: PreTrainedModel) -> Anatomy:
    """Run two tokens through the model and report its attention layers.

    Raises UnsupportedModelError if the model does not send every layer through the engine's attention function.
    """
    recorder = _Recorder()
    tokens = torch.arange(_NUM_TOKENS, device=model.device)
    with attending(recorder):
        logits = row_logits(model, tokens, tokens, tokens, selects_rows=takes_logits_to_keep(model))
    calls = [recorder.calls[layer] for layer in sorted(recorder.calls)]
    if not calls or [call.layer_idx for call in calls] != list(range(len(calls))):
        found = ", ".join(map(str, sorted(recorder.calls))) or "none"
        raise UnsupportedModelError(
            f"{type(model).__name__} does not send all its layers through attention (it sent: {found})."
        )
    sources = tuple(_source(call, calls) for call in calls)
    return Anatomy(
        layers=tuple(
            _spec(call) if source == call.layer_idx else None for call, source in zip(calls, sources, strict=True)
        ),
        kv_sources=sources,
        sliding_windows=tuple(call.sliding_window for call in calls),
        kv_dtype=calls[0].key.dtype,
        vocab_size=logits.shape[-1],
    )


def _spec(call: AttentionCall) -> LayerSpec:
    if call.query.shape[1] % call.key.shape[1]:
        raise UnsupportedModelError(
            f"Layer {call.layer_idx} has {call.query.shape[1]} query heads for {call.key.shape[1]} KV heads."
        )
    return LayerSpec(call.key.shape[1], call.key.shape[2], call.value.shape[2])


def _source(call: AttentionCall, calls: list[AttentionCall]) -> int:
    """The first layer whose key and value tensors, not only their contents, are this layer's."""
    return next(
        other.layer_idx
        for other in calls
        if other.key.data_ptr() == call.key.data_ptr() and other.value.data_ptr() == call.value.data_ptr()
    )
