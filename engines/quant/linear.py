"""A linear layer with int8 or int4 weights, in place of nn.Linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from engines.native import quantized as native
from engines.quant import reference
from engines.quant.scheme import Scheme, quantize_channels, quantize_groups

_TILE = 16


class QuantizedLinear(nn.Module):
    """y = x W^T + b, with W whole numbers times scales, and x rounded to int8 row by row (int4: group by group).

    Takes [..., in] of bfloat16, float32 or float16 and returns [..., out] of the same dtype. A row's result depends on
    that row alone, bit by bit; a row that is not finite becomes NaN.

    On a CPU with kernels the buffers are in the kernels' layout, elsewhere `quantized_weight` is int8 [out, in], or
    uint8 [out, in / 2] for int4, the even input in the low half. Moving the layer changes the layout; no cast touches
    the scales. `steps()` and `scales()` read it in any.
    """

    quantized_weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, steps: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        """`steps` int8 [out, in]; `scales` [out] for int8, or [out, groups] for int4, whose steps are in -8..7.

        int4 groups are of a multiple of 8 inputs. Their scales are kept as bfloat16 where that changes none, else as
        float32; those of int8 as float32.
        """
        super().__init__()
        self.out_features, self.in_features = steps.shape
        self.bits = 8 if scales.dim() == 1 else 4
        self.group_size = 0 if self.bits == 8 else self.in_features // scales.shape[1]
        assert self.bits == 8 or (self.group_size * scales.shape[1] == self.in_features and self.group_size % 8 == 0)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self._is_packed = False
        self._kernel: native.QuantizedKernel | None = None
        self._store(steps, scales)

    @classmethod
    def of(cls, linear: nn.Linear, scheme: Scheme, group_size: int) -> Self:
        """`linear`, quantized. int4 needs inputs in whole groups; other layers become int8."""
        weight = linear.weight.detach()
        if scheme == "int4" and weight.shape[1] % group_size == 0:
            return cls(*quantize_groups(weight, group_size), linear.bias)
        return cls(*quantize_channels(weight), linear.bias)

    def steps(self) -> Tensor:
        """The whole numbers, int8 [out, in]."""
        if self._is_packed:
            return native.unpack_weights(self.quantized_weight, self.out_features, self.in_features, self.bits)
        if self.bits == 8:
            return self.quantized_weight
        halves = torch.stack((self.quantized_weight & 15, self.quantized_weight >> 4), dim=-1)
        return halves.flatten(1).to(torch.int8) - 8

    def scales(self) -> Tensor:
        """[out] for int8, [out, groups] for int4."""
        if not self._is_packed:
            return self.weight_scale
        if self.bits == 8:
            return self.weight_scale[: self.out_features]
        return native.unpack_scales(self.weight_scale, self.out_features)

    def dequantized(self) -> Tensor:
        """The weight that the numbers stand for, float32 [out, in]."""
        scales = self.scales().float().view(self.out_features, -1)
        return self.steps().float() * scales.repeat_interleave(self.in_features // scales.shape[1], dim=1)

    def forward(self, inputs: Tensor) -> Tensor:
        if (kernel := self.kernel) is not None:
            return kernel(inputs) if native.takes(inputs) else kernel(inputs.float()).to(inputs.dtype)
        rows = inputs.reshape(-1, self.in_features)
        linear = reference.int8_linear if self.bits == 8 else reference.int4_linear
        outputs = linear(rows, self.steps(), self.weight_scale, self.bias)
        return outputs.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)

    def pack_with(self, others: Sequence[nn.Module]) -> QuantizedLinear | None:
        """One layer whose outputs are this one's and then the others', bit by bit; None if they are of other kinds."""
        layers = [self, *(other for other in others if isinstance(other, QuantizedLinear))]
        if len(layers) != 1 + len(others) or len({layer._kind for layer in layers}) > 1:
            return None
        biases = [layer.bias for layer in layers]
        has_bias = any(bias is not None for bias in biases)
        bias = torch.cat([layer._bias_or_zeros() for layer in layers]) if has_bias else None
        steps, scales = [layer.steps() for layer in layers], [layer.scales() for layer in layers]
        return QuantizedLinear(torch.cat(steps), torch.cat(scales), bias)

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.group_size else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}{group}"

    @property
    def _kind(self) -> tuple[object, ...]:
        return (self.bits, self.group_size, self.in_features, self.weight_scale.dtype, self.weight_scale.device)

    def _bias_or_zeros(self) -> Tensor:
        return self.weight_scale.new_zeros(self.out_features, dtype=torch.float32) if self.bias is None else self.bias

    @property
    def kernel(self) -> native.QuantizedKernel | None:
        """What runs the layer, None where there are no kernels; another one after each move."""
        if self._kernel is None and self._is_packed:
            self._kernel = native.QuantizedKernel(
                self.quantized_weight,
                self.weight_scale,
                self.bias,
                self.in_features,
                self.out_features,
                self.group_size,
            )
        return self._kernel

    def _store(self, steps: Tensor, scales: Tensor) -> None:
        """Lay the numbers out for the device they are on."""
        steps, scales = steps.detach(), scales.detach().float()
        if self.bits == 4 and torch.equal(scales.to(torch.bfloat16).float(), scales):
            scales = scales.to(torch.bfloat16)
        self._is_packed = _has_kernels(steps.device)
        if self._is_packed:
            padded = functional.pad(scales, (0, -len(scales) % _TILE)) if self.bits == 8 else None
            scales = native.pack_scales(scales) if padded is None else padded
            weight = native.pack_weights(steps, self.bits)
        elif self.bits == 8:
            weight = steps.contiguous()
        else:
            halves = (steps + 8).to(torch.uint8)
            weight = halves[:, ::2] | (halves[:, 1::2] << 4)
        self.register_buffer("quantized_weight", weight)
        self.register_buffer("weight_scale", scales.contiguous())
        self._kernel = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, without casts; nn.Module's own would cast the scales with the rest of the model."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        self._kernel = None
        device = self.quantized_weight.device
        if device.type != "meta" and self._is_packed != _has_kernels(device):
            self._store(self.steps(), self.scales())
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: a kernel holds addresses."""
        return self.__dict__ | {"_kernel": None}


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cpu" and native.available()
