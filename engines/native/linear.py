"""Linear layers over packed weights, in native code (`src/linear.h` says how and why)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from engines.native.activation import ACTIVATION_CODES, ActivationName
from engines.native.dtype import DTYPE_CODES
from engines.native.library import library
from engines.native.threads import num_threads

_PANEL = 64


class _PackedWeight(ctypes.Structure):
    _fields_ = (
        ("words", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("epilogue", ctypes.c_int32),
    )


class PackedWeight:
    """One or several weights [out, in] of one dtype (bf16 or fp32), packed as one matrix along their outputs.

    `words` (int32) and `bias` (fp32, or None) are all the memory it has; the weights are copied and may go.
    With an `activation` there are two weights of one shape, gate and up, and the output is activation(gate) * up.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None] | None = None,
        activation: ActivationName | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        kernels = library()
        assert kernels is not None
        self.dtype = weights[0].dtype
        self.in_features = weights[0].shape[1]
        self.output_dtype = output_dtype or self.dtype
        packed_outputs = sum(weight.shape[0] for weight in weights)
        self.out_features = packed_outputs if activation is None else packed_outputs // 2
        _check(weights, self.dtype, self.in_features, gated=activation is not None)
        panels = _panels(self.out_features, _PANEL if activation is None else _PANEL // 2)
        self.words = _pack(kernels, weights, panels, gated=activation is not None)
        self.bias = _bias(weights, biases or [None] * len(weights), panels, gated=activation is not None)
        self._weight = _PackedWeight(
            self.words.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            self.in_features,
            self.out_features,
            DTYPE_CODES[self.dtype],
            0 if activation is None else ACTIVATION_CODES[activation],
        )
        self.address = ctypes.addressof(self._weight)
        self._output_code = DTYPE_CODES[self.output_dtype]
        self._linear = _kernel()

    def linear(self, input: Tensor) -> Tensor:
        """[..., out_features] in `output_dtype` of an input [..., in_features] in `dtype`, on the CPU.

        Sums are in fp32, from the bias on, in the order of the inputs: a row's bits depend on that row alone, not on
        the number of rows or threads. NaN and infinity go their way as in any sum.
        """
        assert input.dtype == self.dtype
        assert input.shape[-1] == self.in_features
        assert input.is_cpu
        input = input.contiguous()
        output = torch.empty((*input.shape[:-1], self.out_features), dtype=self.output_dtype)
        self._linear(
            self.address,
            input.data_ptr(),
            self.in_features,
            output.data_ptr(),
            self._output_code,
            input.numel() // self.in_features,
            num_threads(),
        )
        return output


def _check(weights: Sequence[Tensor], dtype: torch.dtype, in_features: int, *, gated: bool) -> None:
    for weight in weights:
        assert weight.dim() == 2
        assert weight.dtype == dtype
        assert weight.shape[1] == in_features
        assert weight.is_cpu
    assert not gated or (len(weights) == 2 and weights[0].shape == weights[1].shape)


def _panels(out_features: int, width: int) -> int:
    return -(-out_features // width)


def _pack(kernels: ctypes.CDLL, weights: Sequence[Tensor], panels: int, *, gated: bool) -> Tensor:
    dtype, in_features = weights[0].dtype, weights[0].shape[1]
    steps = -(-in_features // 2) if dtype == torch.bfloat16 else in_features
    words = torch.zeros(panels, steps, _PANEL, dtype=torch.int32)
    packed_outputs = sum(weight.shape[0] for weight in weights)
    first_column = 0
    for weight in weights:
        weight = weight.detach().contiguous()
        kernels.outrider_pack_linear(
            ctypes.c_void_p(words.data_ptr()),
            ctypes.c_int64(packed_outputs),
            ctypes.c_int64(first_column),
            ctypes.c_void_p(weight.data_ptr()),
            ctypes.c_int64(weight.shape[0]),
            ctypes.c_int64(in_features),
            DTYPE_CODES[dtype],
            ctypes.c_bool(gated),
            num_threads(),
        )
        first_column += weight.shape[0]
    return words


def _bias(weights: Sequence[Tensor], biases: Sequence[Tensor | None], panels: int, *, gated: bool) -> Tensor | None:
    """The biases, 0 where a weight has none, by packed column [panels * 64]; None if no weight has one."""
    if all(bias is None for bias in biases):
        return None
    parts = [
        torch.zeros(weight.shape[0]) if bias is None else bias.detach().float()
        for weight, bias in zip(weights, biases, strict=True)
    ]
    if not gated:
        packed = torch.zeros(panels * _PANEL)
        packed[: sum(map(len, parts))] = torch.cat(parts)
        return packed
    sides = torch.zeros(2, panels * _PANEL // 2)
    sides[:, : len(parts[0])] = torch.stack(parts)
    return sides.view(2, panels, _PANEL // 2).transpose(0, 1).reshape(-1).contiguous()


@cache
def _kernel() -> ctypes._NamedFuncPointer:
    kernels = library()
    assert kernels is not None
    function = kernels.outrider_linear
    function.restype = None
    function.argtypes = (
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p),
        *(ctypes.c_int32, ctypes.c_int64, ctypes.c_int32),
    )
    return function
