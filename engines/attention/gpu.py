"""The attention backends that need a GPU: imported when they are asked for, since their packages may be missing."""

from __future__ import annotations

import os

import torch

from engines.attention.interface import AttentionBackend
from engines.errors import ModelLoadError


def triton_attention(device: torch.device) -> AttentionBackend:
    """Raises ModelLoadError where Triton is not installed or `device` is no GPU (and Triton does not interpret)."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        _check_device("triton", device)
    try:
        from engines.attention.triton import TritonAttention
    except ImportError as error:
        raise ModelLoadError(
            f"The attention backend 'triton' needs the package triton, which comes with torch for CUDA: {error}"
        ) from error
    return TritonAttention(device)


def flash_attention(device: torch.device) -> AttentionBackend:
    """Raises ModelLoadError where flash-attn is not installed or `device` is no GPU."""
    _check_device("flash", device)
    from engines.attention.flash import FlashAttention

    return FlashAttention()


def _check_device(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise ModelLoadError(f"The attention backend {name!r} runs on CUDA devices only, not on {device.type}.")
