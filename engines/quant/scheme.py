"""Weights as whole numbers times scales.

int8: one scale an output channel, the largest weight at 127. int4: one scale for each group of inputs of a channel,
of several that which errs least in the squares. Both symmetric. Scales are bfloat16, which is what files hold; weights
are rounded to the scale as it is, so that costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Scheme = Literal["int8", "int4"]
DEFAULT_GROUP_SIZE = 32
GROUP_SIZES = (32, 64, 128)

_CHUNK_WEIGHTS = 1 << 22  # bounds what a large layer needs beside itself
# Where a group's largest weight lies on the grid of -8..7; beyond 7 some are clipped, which pays where few are large.
_LARGEST_INT4 = (7.0, 7.4, 7.8, 8.2, 8.8)


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [out, in] and bfloat16 scales [out] of a weight [out, in]; a channel of zeros has the scale 1."""
    steps = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = weight.new_empty(len(weight), dtype=torch.bfloat16)
    for rows in _chunks(weight):
        part = weight[rows].float()
        scale = _scale(part.abs().amax(dim=1) / 127)
        steps[rows] = (part / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        scales[rows] = scale.to(torch.bfloat16)
    return steps, scales


def quantize_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """int8 [out, in] of -8..7 and bfloat16 scales [out, in / group_size] of a weight [out, in].

    `group_size` must divide the inputs.
    """
    assert weight.shape[1] % group_size == 0
    steps = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = weight.new_empty(len(weight), weight.shape[1] // group_size, dtype=torch.bfloat16)
    for rows in _chunks(weight):
        groups = weight[rows].float().view(-1, weight.shape[1] // group_size, group_size)
        best_steps, best_scale = _best(groups)
        steps[rows] = best_steps.flatten(1).to(torch.int8)
        scales[rows] = best_scale.to(torch.bfloat16)
    return steps, scales


def _best(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Of groups [out, groups, size]: steps of the same shape and scales [out, groups], both float32."""
    largest = groups.abs().amax(dim=-1)
    best_steps, best_scale, least = groups, largest, torch.full_like(largest, torch.inf)
    for at in _LARGEST_INT4:
        scale = _scale(largest / at)
        steps = (groups / scale[..., None]).round_().clamp_(-8, 7)
        error = (steps * scale[..., None]).sub_(groups).square_().sum(dim=-1)
        is_better = error < least
        least = torch.where(is_better, error, least)
        best_scale = torch.where(is_better, scale, best_scale)
        best_steps = torch.where(is_better[..., None], steps, best_steps)
    return best_steps, best_scale


def _scale(scale: Tensor) -> Tensor:
    """`scale` rounded to bfloat16; where all weights are zero, any scale but 0 will do."""
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0).to(torch.bfloat16).float()


def _chunks(weight: Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    return (slice(start, start + rows) for start in range(0, len(weight), rows))
