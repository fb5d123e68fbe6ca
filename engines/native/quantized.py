"""Linear layers with int8 or int4 weights by the kernels in `src/quantized.h`, and the layout of their weights.

Packing is torch's work, so a layer can be packed, saved and unpacked where there are no kernels.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from engines.native.library import library
from engines.native.threads import num_threads

_TILE = 16
_PANEL = 64
_DTYPES = (torch.bfloat16, torch.float32)


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("scales_are_bf16", ctypes.c_int32),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("input", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("is_bf16", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    )


def available() -> bool:
    """Whether there are kernels."""
    return library() is not None


def takes(inputs: Tensor) -> bool:
    """Whether a QuantizedKernel can be given these inputs."""
    return inputs.device.type == "cpu" and inputs.dtype in _DTYPES


def pack_weights(steps: Tensor, bits: int) -> Tensor:
    """int8 `steps` [out, in] of `bits` 8 or 4 as the kernel reads them: uint8 [packed_bytes].

    Outputs are padded to 16, inputs to 4 (int8); those of int4 must be a multiple of 8.
    """
    inputs = 4 if bits == 8 else 8
    padded = functional.pad(steps, (0, -steps.shape[1] % 4, 0, -steps.shape[0] % _TILE))
    assert padded.shape[1] % inputs == 0, "int4 takes inputs in eights"
    panels = [_pack_panels(part, inputs) for part in _split(padded)]
    return torch.cat(panels)


def unpack_weights(packed: Tensor, out_features: int, in_features: int, bits: int) -> Tensor:
    """The int8 steps [out, in] that pack_weights was given."""
    inputs = 4 if bits == 8 else 8
    columns = -(-in_features // 4) * 4
    parts = []
    for tiles, count in _panels(out_features):
        num_bytes = count * tiles * _TILE * columns * bits // 8
        panels = packed[:num_bytes].view(count, columns // inputs, tiles, _TILE, 4)
        packed = packed[num_bytes:]
        if bits == 8:
            steps = (panels ^ 128).view(torch.int8)
        else:
            steps = torch.cat((panels & 15, panels >> 4), dim=-1).to(torch.int8) - 8
        parts.append(steps.permute(0, 2, 3, 1, 4).reshape(-1, columns))
    return torch.cat(parts)[:out_features, :in_features].contiguous()


def pack_scales(scales: Tensor) -> Tensor:
    """Scales of groups [out, groups] as the kernel reads them: [packed_outputs * groups], in their dtype."""
    padded = functional.pad(scales, (0, 0, 0, -scales.shape[0] % _TILE))
    num_groups = scales.shape[1]
    return torch.cat(
        [
            part.view(count, tiles, _TILE, num_groups).permute(0, 3, 1, 2).reshape(-1)
            for part, (tiles, count) in zip(_split(padded), _panels(len(padded)), strict=True)
        ]
    )


def unpack_scales(packed: Tensor, out_features: int) -> Tensor:
    """The scales [out, groups] that pack_scales was given."""
    num_groups = len(packed) // (-(-out_features // _TILE) * _TILE)
    parts = []
    for tiles, count in _panels(out_features):
        size = count * tiles * _TILE * num_groups
        part = packed[:size].view(count, num_groups, tiles, _TILE)
        packed = packed[size:]
        parts.append(part.permute(0, 2, 3, 1).reshape(-1, num_groups))
    return torch.cat(parts)[:out_features].contiguous()


class QuantizedKernel:
    """One packed layer, ready to be called; keeps its tensors alive, on CPU.

    `weights` are of pack_weights. `scales` are float32 [out] for int8 (`group_size` 0), of pack_scales for int4, then
    bfloat16 or float32. `bias` is float32 [out]. Raises nothing; wrong shapes and types are our own mistakes.
    """

    def __init__(
        self, weights: Tensor, scales: Tensor, bias: Tensor | None, in_features: int, out_features: int, group_size: int
    ) -> None:
        padded_outputs = -(-out_features // _TILE) * _TILE
        if group_size:
            assert in_features % group_size == 0
            assert group_size % 8 == 0
            assert scales.numel() == padded_outputs * (in_features // group_size)
            assert weights.numel() == padded_outputs * in_features // 2
        else:
            assert scales.dtype == torch.float32
            assert scales.numel() == padded_outputs
            assert weights.numel() == padded_outputs * (-(-in_features // 4) * 4)
        assert scales.dtype in _DTYPES
        assert weights.dtype == torch.uint8
        assert bias is None or (bias.dtype == torch.float32 and bias.numel() == out_features)
        self._tensors = (weights, scales, bias)
        assert all(tensor is None or tensor.is_contiguous() for tensor in self._tensors)
        assert all(tensor is None or tensor.device.type == "cpu" for tensor in self._tensors)
        self._in_features, self._out_features = in_features, out_features
        bias_at = None if bias is None else bias.data_ptr()
        is_bf16 = scales.dtype == torch.bfloat16
        self._linear = _Linear(
            weights.data_ptr(), scales.data_ptr(), bias_at, in_features, out_features, group_size, is_bf16
        )
        self.address = ctypes.addressof(self._linear)
        kernels = library()
        assert kernels is not None
        self._run = kernels.outrider_quantized_linear
        self._run.argtypes = (ctypes.POINTER(_Linear), ctypes.POINTER(_Call))
        self._run.restype = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """inputs [..., in], bfloat16 or float32, to outputs [..., out] of the same dtype."""
        assert inputs.shape[-1] == self._in_features
        assert takes(inputs)
        inputs = inputs.contiguous()
        outputs = inputs.new_empty(*inputs.shape[:-1], self._out_features)
        call = _Call(
            inputs.data_ptr(),
            outputs.data_ptr(),
            inputs.numel() // self._in_features,
            inputs.dtype == torch.bfloat16,
            num_threads(),
        )
        self._run(self._linear, call)
        return outputs


def _pack_panels(steps: Tensor, inputs: int) -> Tensor:
    """Whole panels of up to 64 outputs, [out, in] with `in` a multiple of `inputs`, as bytes [n]."""
    tiles = min(len(steps), _PANEL) // _TILE
    parts = steps.view(-1, tiles, _TILE, steps.shape[1] // inputs, inputs).permute(0, 3, 1, 2, 4)
    if inputs == 4:
        return (parts.contiguous().view(torch.uint8) ^ 128).view(-1)
    nibbles = (parts + 8).to(torch.uint8)
    return (nibbles[..., :4] | (nibbles[..., 4:] << 4)).reshape(-1)


def _panels(out_features: int) -> list[tuple[int, int]]:
    """(tiles in a panel, such panels): the full ones, then the last."""
    num_tiles = -(-out_features // _TILE)
    full, rest = divmod(num_tiles, _PANEL // _TILE)
    return [(_PANEL // _TILE, full)] * (full > 0) + [(rest, 1)] * (rest > 0)


def _split(padded: Tensor) -> list[Tensor]:
    """The outputs of full panels, and those of the last."""
    return list(torch.split(padded, [tiles * _TILE * count for tiles, count in _panels(len(padded))]))
