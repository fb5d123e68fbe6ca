"""A whole decoder layer by one call of `src/decoder_layer.h`: norms, linears, rope, attention, gated MLP, residuals."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from engines.native.activation import ACTIVATION_CODES, ActivationName
from engines.native.attention import AttentionStep
from engines.native.dtype import DTYPE_CODES
from engines.native.library import library
from engines.native.linear import PackedWeight
from engines.native.quantized import QuantizedKernel
from engines.native.rotary import RotaryLayer

LayerLinear = PackedWeight | QuantizedKernel


class _Linear(ctypes.Structure):
    """LayerLinear of src/decoder_layer.h."""

    _fields_ = (("packed", ctypes.c_void_p), ("quantized", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    """DecoderLayer of src/decoder_layer.h."""

    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("qkv", _Linear),
        ("out", _Linear),
        ("gate_up", _Linear),
        ("down", _Linear),
        ("rotary", ctypes.c_void_p),
        ("hidden_size", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("attention_epsilon", ctypes.c_float),
        ("mlp_epsilon", ctypes.c_float),
        ("activation", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


class _Step(ctypes.Structure):
    """DecoderStep of src/decoder_layer.h."""

    _fields_ = (
        ("attention", ctypes.c_void_p),
        ("input", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("rotary_dim", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm: `scale` float32 [hidden_size], contiguous."""

    scale: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What a decoder layer is made of; all of one dtype, bf16 or fp32, on the CPU.

    `qkv` gives queries, keys and values side by side, as `rotary` has the heads. A packed `gate_up` is gated; a
    quantized one gives the gates, then the ups, which `activation` is applied to.
    """

    attention_norm: Norm
    qkv: LayerLinear
    rotary: RotaryLayer
    out: LayerLinear
    mlp_norm: Norm
    gate_up: LayerLinear
    activation: ActivationName
    down: LayerLinear
    scaling: float
    sliding_window: int | None
    softcap: float | None


class DecoderLayer:
    """One layer, ready to be called; keeps its parts alive."""

    def __init__(self, parts: LayerParts) -> None:
        rotary = parts.rotary
        assert rotary.head_dim % 8 == 0
        self.dtype = rotary.dtype
        self.hidden_size = parts.attention_norm.scale.shape[0]
        self.num_kv_heads, self.head_dim = rotary.num_key_heads, rotary.head_dim
        self._parts = parts
        self._layer = _Layer(
            parts.attention_norm.scale.data_ptr(),
            parts.mlp_norm.scale.data_ptr(),
            *(_pointed(linear) for linear in (parts.qkv, parts.out, parts.gate_up, parts.down)),
            rotary.address,
            self.hidden_size,
            parts.sliding_window or 0,
            parts.scaling,
            parts.softcap or 0.0,
            parts.attention_norm.epsilon,
            parts.mlp_norm.epsilon,
            ACTIVATION_CODES[parts.activation],
            DTYPE_CODES[self.dtype],
        )
        self.address = ctypes.addressof(self._layer)


class DecoderStep:
    """The layers of one step: one batch, its rotary table, and work space that they share.

    `cosines` and `sines` are [num_tokens, rotary_dim], contiguous, of the layers' dtype.
    """

    def __init__(self, attention: AttentionStep, cosines: Tensor, sines: Tensor) -> None:
        assert cosines.shape == sines.shape
        assert cosines.dtype == sines.dtype
        assert cosines.is_contiguous()
        assert sines.is_contiguous()
        self.cosines, self.sines = cosines, sines
        self._attention = attention
        self._num_tokens = cosines.shape[0]
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._run, self._bytes = _kernels()
        self._step = _Step(attention.address, None, None, None, cosines.data_ptr(), sines.data_ptr(), cosines.shape[1])
        self._address = ctypes.addressof(self._step)

    def run(self, layer: DecoderLayer, hidden: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        """The layer's output for `hidden`, contiguous, num_tokens * hidden_size values in the layer's dtype; its shape.

        Writes the tokens' keys and values to the caches, [num_blocks, block_size, num_kv_heads, head_dim], or 4 more
        in int8, as AttentionStep.attend does.
        """
        assert hidden.dtype == layer.dtype == self.cosines.dtype
        assert hidden.is_contiguous()
        assert hidden.numel() == self._num_tokens * layer.hidden_size
        self._attention.set_caches(key_cache, value_cache, layer.num_kv_heads, layer.head_dim)
        output = torch.empty_like(hidden)
        step = self._step
        step.input, step.output, step.workspace = hidden.data_ptr(), output.data_ptr(), self._space(layer)
        self._run(layer.address, self._address)
        return output

    def _space(self, layer: DecoderLayer) -> int:
        num_bytes = self._bytes(layer.address, self._num_tokens)
        if self._workspace.numel() < num_bytes:
            self._workspace = torch.empty(num_bytes, dtype=torch.uint8)
        return self._workspace.data_ptr()


def _pointed(linear: LayerLinear) -> _Linear:
    return _Linear(linear.address, None) if isinstance(linear, PackedWeight) else _Linear(None, linear.address)


@cache
def _kernels() -> tuple[ctypes._NamedFuncPointer, ctypes._NamedFuncPointer]:
    kernels = library()
    assert kernels is not None
    run, num_bytes = kernels.outrider_decoder_layer, kernels.outrider_decoder_layer_bytes
    run.argtypes, run.restype = (ctypes.c_void_p, ctypes.c_void_p), None
    num_bytes.argtypes, num_bytes.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_int64
    return run, num_bytes
