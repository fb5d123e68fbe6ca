"""What the kernels compute, in torch: for devices without kernels, and bit for bit the same on a CPU.

Sums of products are whole numbers, taken exactly; the float operations after them are elementwise and in a fixed order.
So a row's result does not depend on the other rows here either.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_SMALLEST = 1e-35
_CHUNK_BYTES = 64 << 20
_MIN_CUDA_ROWS = 32  # _int_mm wants more than 16, in eights


def quantize_rows(inputs: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """int8 [rows, in] and float32 scales [rows, num_groups] of inputs [rows, in].

    A group that is not finite has the scale NaN; one whose entries are all below 1e-35 counts as zero.
    """
    groups = inputs.float().reshape(len(inputs), num_groups, inputs.shape[1] // num_groups)
    largest = groups.abs().amax(dim=-1)
    is_usual = largest.isfinite() & (largest >= _SMALLEST)
    inverse = largest.reciprocal() * 127
    steps = torch.where(is_usual[..., None], groups * inverse[..., None], 0.0).round()
    scales = torch.where(is_usual, largest * (1 / 127), torch.where(largest.isfinite(), 0.0, torch.nan))
    return steps.flatten(1).to(torch.int8), scales


def int8_linear(inputs: Tensor, steps: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """float32 [rows, out] of inputs [rows, in], weights int8 [out, in] with scales [out], bias float32 [out]."""
    rows, row_scales = quantize_rows(inputs, 1)
    sums = _exact_product(rows, steps).float()
    scale = row_scales * scales
    if bias is None:
        return sums * scale
    return torch.addcmul(bias.double(), sums.double(), scale.double()).float()  # as if fused: rounded once


def int4_linear(inputs: Tensor, steps: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """As int8_linear, with weights int8 [out, in] of -8..7 and scales [out, groups]."""
    num_groups = scales.shape[1]
    rows, row_scales = quantize_rows(inputs, num_groups)
    weights = steps.view(len(steps), num_groups, -1).permute(1, 2, 0).float()
    size = max(1, _CHUNK_BYTES // (4 * num_groups * len(steps)))
    parts = [
        _add_groups(part.view(len(part), num_groups, -1), part_scales, weights, scales.float())
        for part, part_scales in zip(torch.split(rows, size), torch.split(row_scales, size), strict=True)
    ]
    total = torch.cat(parts)
    return total if bias is None else total + bias


def _add_groups(rows: Tensor, row_scales: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    """rows [rows, groups, size], weights [groups, size, out]: whole numbers below 2^24, so float32 sums are exact."""
    sums = torch.bmm(rows.transpose(0, 1).float(), weights).double()
    total = torch.zeros_like(sums[0])
    for group, sum_ in enumerate(sums):
        scale = row_scales[:, group, None] * scales[:, group]
        total = torch.addcmul(total, sum_, scale.double()).float().double()
    return total.float()


def _exact_product(rows: Tensor, steps: Tensor) -> Tensor:
    """int32 [rows, out] of int8 [rows, in] and [out, in]."""
    if rows.device.type != "cuda":
        return torch._int_mm(rows, steps.t())
    if steps.shape[0] % 8 or steps.shape[1] % 8:
        return (rows.double() @ steps.double().t()).int()
    padding = max(_MIN_CUDA_ROWS - len(rows), -len(rows) % 8)
    return torch._int_mm(functional.pad(rows, (0, 0, 0, padding)), steps.t())[: len(rows)]
