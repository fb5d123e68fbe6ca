"""Gated activations, activation(gate) * up, in native code."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from engines.native.dtype import DTYPE_CODES
from engines.native.library import library
from engines.native.threads import num_threads

ActivationName = Literal["silu", "gelu_tanh"]
ACTIVATION_CODES: dict[ActivationName, int] = {"silu": 1, "gelu_tanh": 2}


def gated_activation(gate_up: Tensor, activation: ActivationName) -> Tensor:
    """activation(gate) * up, [..., size], computed in fp32 and rounded once to the dtype of `gate_up`.

    gate_up [..., 2 * size] has the gates first; bf16 or fp32, on the CPU.
    """
    assert gate_up.is_cpu
    assert gate_up.shape[-1] % 2 == 0
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    output = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype)
    _kernel()(
        gate_up.data_ptr(),
        output.data_ptr(),
        output.numel() // size,
        size,
        ACTIVATION_CODES[activation],
        DTYPE_CODES[gate_up.dtype],
        num_threads(),
    )
    return output


@cache
def _kernel() -> ctypes._NamedFuncPointer:
    kernels = library()
    assert kernels is not None
    function = kernels.outrider_gated_activation
    function.restype = None
    function.argtypes = (
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
        *(ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),
    )
    return function
