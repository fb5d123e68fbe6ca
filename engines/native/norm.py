"""RMSNorm in native code."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from engines.native.dtype import DTYPE_CODES
from engines.native.library import library
from engines.native.threads import num_threads


def rms_norm(input: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """input / sqrt(mean(input^2) + epsilon) * scale over the last dimension, in fp32, rounded once to the input's type.

    input [..., size], bf16 or fp32, on the CPU; scale [size], fp32, contiguous. A row's bits depend on that row alone.
    """
    assert input.is_cpu
    assert scale.dtype == torch.float32
    assert scale.shape == input.shape[-1:]
    assert scale.is_contiguous()
    input = input.contiguous()
    output = torch.empty_like(input)
    _kernel()(
        input.data_ptr(),
        output.data_ptr(),
        scale.data_ptr(),
        input.numel() // scale.numel(),
        scale.numel(),
        epsilon,
        DTYPE_CODES[input.dtype],
        num_threads(),
    )
    return output


@cache
def _kernel() -> ctypes._NamedFuncPointer:
    kernels = library()
    assert kernels is not None
    function = kernels.outrider_norm
    function.restype = None
    function.argtypes = (
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
        *(ctypes.c_float, ctypes.c_int32, ctypes.c_int32),
    )
    return function
