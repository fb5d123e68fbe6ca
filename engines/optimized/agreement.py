"""Whether a replacement computes what the original does, found out by trying."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Relative error of a row: what rounding at every step of the original, or of a quantized layer, may make. No wrong
# formula stays below.
TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-3}
# Small inputs show a wrong epsilon, large ones a clamp.
_SCALES = (1e-3, 1.0, 30.0)


def agrees(original: nn.Module, replacement: nn.Module, size: int, dtype: torch.dtype) -> bool:
    """Whether both give the same for random inputs [1, rows, size] of several magnitudes."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for scale in _SCALES:
            input = (torch.randn(1, 3, size, generator=generator) * scale).to(dtype)
            if not close(original(input), replacement(input)):
                return False
    return True


def close(expected: object, got: object) -> bool:
    """Whether two outputs are tensors of one shape and dtype whose rows agree within the dtype's tolerance."""
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        return False
    if expected.shape != got.shape or expected.dtype != got.dtype or expected.dtype not in TOLERANCES:
        return False
    errors = (expected.float() - got.float()).norm(dim=-1)
    return bool((errors <= TOLERANCES[got.dtype] * expected.float().norm(dim=-1)).all())
