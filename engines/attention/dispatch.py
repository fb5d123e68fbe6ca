"""The bridge from transformers' models to the engine: one attention function, registered once for the process.

A model calls it for each layer. It checks that it understands the call in full, and hands it to whatever the engine
put around this forward pass with `attending`. That is a context variable, since several engines (a target and its
draft) live in one process and some architectures drop keyword arguments on the way to their attention.

The name is not registered in AttentionMaskInterface, so models build no mask; what a mask would have said (causality,
the sliding window) comes from positions, from the call and from the layer's declared type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import AttentionInterface

from engines.errors import UnsupportedModelError

ATTENTION_NAME = "outrider"

# Arguments that reach attention functions without a say in what is attended: bookkeeping of the surrounding model, and
# flash-attention's packing, which the ragged batch replaces.
NEUTRAL_ARGUMENTS = frozenset(
    {
        "cache_position",
        "deterministic",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's call. query [num_tokens, num_heads, head_dim]; key, value [num_tokens, num_kv_heads, ...]."""

    layer_idx: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    sliding_window: int | None
    softcap: float | None
    sinks: Tensor | None


Attend = Callable[[AttentionCall], Tensor]

_current: ContextVar[Attend | None] = ContextVar("outrider_attend", default=None)


def register() -> None:
    """Make the attention function known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Send the attention calls of the enclosed forward pass, in this thread, to `attend`."""
    token = _current.set(attend)
    try:
        yield
    finally:
        _current.reset(token)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, heads, num_tokens, head_dim] -> [1, num_tokens, heads, value_dim].

    Raises UnsupportedModelError for a call with anything in it that the engine would have to ignore.
    """
    attend = _current.get()
    assert attend is not None, "a model with the engine's attention was called outside of the engine"
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse_unknown(module, attention_mask, dropout, causal, query, others)
    call = AttentionCall(
        layer_idx=_layer_index(module),
        query=query[0].transpose(0, 1),
        key=key[0].transpose(0, 1),
        value=value[0].transpose(0, 1),
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        sliding_window=effective_window(module, sliding_window),
        softcap=softcap,
        sinks=s_aux,
    )
    return attend(call).unsqueeze(0), None


def effective_window(module: nn.Module, passed: int | None) -> int | None:
    """Sliding window of this layer in tokens: from the call, or from the config where only the mask would tell.

    Raises UnsupportedModelError if the call has a window and the config says that the layer attends to everything.
    """
    config = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    kind = layer_types[_layer_index(module)] if layer_types else None
    if not passed:  # some configs write "no window" as 0
        declared: int | None = getattr(config, "sliding_window", None)
        windowed = kind == "sliding_attention" or (kind is None and getattr(config, "use_sliding_window", True))
        return declared or None if windowed else None
    if kind == "full_attention":
        raise _refusal(module, f"passes a sliding window of {passed} in a layer declared as full attention")
    return passed


def _layer_index(module: nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise _refusal(module, "does not number its attention layers")
    return index


def _refuse_unknown(
    module: nn.Module,
    attention_mask: Tensor | None,
    dropout: float,
    causal: bool,
    query: Tensor,
    others: dict[str, object],
) -> None:
    if attention_mask is not None:
        raise _refusal(module, "builds an attention mask of its own")
    if dropout:
        raise _refusal(module, f"applies dropout of {dropout} at inference")
    if not causal:
        raise _refusal(module, "attends in both directions")
    if query.shape[0] != 1:
        raise _refusal(module, f"splits the batch into {query.shape[0]} before attention")
    unknown = sorted(
        name
        for name, argument in others.items()
        if name not in NEUTRAL_ARGUMENTS and argument is not None and argument is not False
    )
    if unknown:
        raise _refusal(module, f"passes arguments that the engine does not know: {', '.join(unknown)}")


def _refusal(module: nn.Module, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(module).__name__} {what}; the engine cannot serve it.")
