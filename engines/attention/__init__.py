"""Attention over paged KV: one interface, several backends."""

from __future__ import annotations

import torch

from engines.attention.batched import BatchedAttention
from engines.attention.gpu import flash_attention, triton_attention
from engines.attention.interface import AttentionBackend, LayerSpec
from engines.attention.native import NativeAttention
from engines.attention.reference import ReferenceAttention
from engines.errors import ModelLoadError
from engines.native.library import library

__all__ = ["AttentionBackend", "LayerSpec", "resolve_kv_dtype", "select_backend"]

_INT8_KV = frozenset({"native", "reference", "torch"})


def select_backend(name: str, device: torch.device) -> AttentionBackend:
    """A new backend by its name in the config; "auto" takes the fastest that runs on `device`.

    Raises ModelLoadError, naming those that exist, for an unknown one.
    """
    match name:
        case "auto":
            return NativeAttention() if device.type == "cpu" and library() is not None else BatchedAttention()
        case "native":
            return _native_attention(device)
        case "torch":
            return BatchedAttention()
        case "reference":
            return ReferenceAttention()
        case "triton":
            return triton_attention(device)
        case "flash":
            return flash_attention(device)
    raise ModelLoadError(
        f"There is no attention backend {name!r} for {device.type}; there are: auto, flash, native, reference, "
        "torch, triton."
    )


def resolve_kv_dtype(name: str, backend: AttentionBackend) -> torch.dtype | None:
    """The KV caches' dtype by its name in the config; None is the model's own.

    Raises ModelLoadError if `backend` does not attend over such caches.
    """
    if name == "auto":
        return None
    assert name == "int8"
    if backend.name not in _INT8_KV:
        raise ModelLoadError(
            f"The attention backend {backend.name!r} has no int8 KV cache; these have: {', '.join(sorted(_INT8_KV))}."
        )
    return torch.int8


def _native_attention(device: torch.device) -> NativeAttention:
    if device.type != "cpu":
        raise ModelLoadError(f"The attention backend 'native' is for CPUs, not for {device.type}.")
    if library() is None:
        raise ModelLoadError(
            "The attention backend 'native' needs the CPU kernels, which were not built or cannot be loaded: install a "
            "C++17 compiler (g++ or clang++), then Outrider again."
        )
    return NativeAttention()
