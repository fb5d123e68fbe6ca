"""Drawing tokens from rows of logits by the kernels in `src/sampling.h`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engines.native.library import library
from engines.native.threads import num_threads

_DTYPES = (torch.bfloat16, torch.float32)


class _Draws(ctypes.Structure):
    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("temperatures", ctypes.c_void_p),
        ("seeds", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("is_bf16", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    )


class _Beliefs(ctypes.Structure):
    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("token_ids", ctypes.c_void_p),
        ("probabilities", ctypes.c_void_p),
        ("is_bf16", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    )


def takes(logits: Tensor) -> bool:
    """Whether these logits [num_rows, vocab] can be given to the functions below."""
    return (
        logits.device.type == "cpu"
        and logits.dtype in _DTYPES
        and logits.shape[1] > 0
        and logits.stride(1) == 1
        and library() is not None
    )


def draw(logits: Tensor, temperatures: Sequence[float], seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """argmax of (logits - row maximum) / temperature + noise(seed, position, token), int64 [num_rows].

    logits [num_rows, vocab], bf16 or float32, are left unchanged; a temperature of 0 draws without noise. Seeds are
    int64. NaN counts as banned, +inf as the largest number; the lowest id wins among equals, and where all are banned.
    """
    kernels = library()
    assert kernels is not None
    assert takes(logits)
    assert len(logits) == len(temperatures) == len(seeds) == len(positions)
    token_ids = torch.empty(len(logits), dtype=torch.int64)
    numbers = (np.array(temperatures, np.float32), np.array(seeds, np.int64), np.array(positions, np.int64))
    call = _Draws(*_rows(logits), *(each.ctypes.data for each in numbers), token_ids.data_ptr(), *_how(logits))
    kernels.outrider_draw(ctypes.byref(call))
    return token_ids


def probabilities(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Softmax of logits [num_rows, vocab] at `token_ids` [num_rows] int64; float32 [num_rows].

    NaN counts as banned, +inf as the largest number; NaN where the token's own logit is, or all are banned.
    """
    kernels = library()
    assert kernels is not None
    assert takes(logits)
    assert token_ids.shape == logits.shape[:1]
    assert token_ids.dtype == torch.int64
    assert token_ids.is_contiguous()
    result = torch.empty(len(logits), dtype=torch.float32)
    call = _Beliefs(*_rows(logits), token_ids.data_ptr(), result.data_ptr(), *_how(logits))
    kernels.outrider_believe(ctypes.byref(call))
    return result


def _rows(logits: Tensor) -> tuple[int, int, int, int]:
    return logits.data_ptr(), logits.stride(0), *logits.shape


def _how(logits: Tensor) -> tuple[int, int]:
    return logits.dtype == torch.bfloat16, num_threads()
