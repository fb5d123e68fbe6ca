"""Attention over paged KV: one interface, several backends."""

from __future__ import annotations

import torch

from engines.attention.batched import BatchedAttention
from engines.attention.interface import AttentionBackend, LayerSpec
from engines.attention.reference import ReferenceAttention
from engines.errors import ModelLoadError

__all__ = ["AttentionBackend", "LayerSpec", "select_backend"]


def select_backend(name: str, device: torch.device) -> AttentionBackend:
    """A new backend by its name in the config; "auto" takes the fastest that runs on `device`.

    Raises ModelLoadError, naming those that exist, for an unknown one.
    """
    match name:
        case "auto" | "torch":
            return BatchedAttention()
        case "reference":
            return ReferenceAttention()
    raise ModelLoadError(
        f"There is no attention backend {name!r} for {device.type}; there are: auto, reference, torch."
    )
