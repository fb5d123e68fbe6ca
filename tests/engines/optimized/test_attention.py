"""Fused attention blocks ask for the same attention as the originals, whichever implementation answers."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from engines.native.library import library
from engines.optimized.attention import PLAIN_ATTENTION, FusedAttention, fused_attention
from engines.quant.linear import QuantizedLinear
from tests.engines.tiny_models import SUPPORTED, VOCAB_SIZE, build

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")
_SHAPE: dict[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def _config(class_name: str, **settings: object) -> PretrainedConfig:
    kind: Callable[..., PretrainedConfig] = getattr(transformers, class_name)
    return kind(**(_SHAPE | settings))


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "ApertusAttention": lambda: _config("ApertusConfig"),
    "ArceeAttention": lambda: _config("ArceeConfig"),
    "Gemma2Attention": SUPPORTED["gemma2"],
    "Gemma3Attention": SUPPORTED["gemma3_text"],
    "GemmaAttention": lambda: _config("GemmaConfig", head_dim=8),
    "GraniteAttention": lambda: _config("GraniteConfig", attention_multiplier=0.3, attention_bias=True),
    "GraniteMoeAttention": lambda: _config("GraniteMoeConfig", num_local_experts=2, num_experts_per_tok=1),
    "HyperCLOVAXAttention": lambda: _config("HyperCLOVAXConfig"),
    "LlamaAttention": SUPPORTED["llama"],
    "MinistralAttention": lambda: _config("MinistralConfig", head_dim=8, sliding_window=8),
    "MistralAttention": SUPPORTED["mistral"],
    "MixtralAttention": SUPPORTED["mixtral"],
    "Qwen2Attention": SUPPORTED["qwen2"],
    "Qwen2MoeAttention": lambda: _config(
        "Qwen2MoeConfig",
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "Qwen3Attention": SUPPORTED["qwen3"],
    "Qwen3MoeAttention": SUPPORTED["qwen3_moe"],
    "SmolLM3Attention": lambda: _config("SmolLM3Config", no_rope_layers=[1, 1]),
}


def block_of(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule("model.layers.1.self_attn")


def fused(original: nn.Module, dtype: torch.dtype = torch.float32) -> FusedAttention:
    block = fused_attention(deepcopy(original), dtype)
    assert block is not None
    return block


def arguments(model: PreTrainedModel, dtype: torch.dtype, batch: int, tokens: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(batch, tokens, 32, generator=generator).to(dtype)
    head_dim = int(block_of(model).head_dim)
    tables = [torch.randn(1, tokens, head_dim, generator=generator).to(dtype) for _ in range(2)]
    mask = torch.full((tokens, tokens), torch.finfo(dtype).min).triu(1).to(dtype)
    return {"hidden_states": hidden, "position_embeddings": tuple(tables), "attention_mask": mask[None, None]}


def run(block: nn.Module, arguments: dict[str, object]) -> Tensor:
    with torch.inference_mode():
        output, _ = block(**arguments)
    assert isinstance(output, Tensor)
    return output


def test_every_known_class_is_tested() -> None:
    assert CONFIGS.keys() == PLAIN_ATTENTION.keys()


@pytest.mark.parametrize("name", PLAIN_ATTENTION)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_known_classes_compute_the_same_with_masks(name: str, dtype: torch.dtype) -> None:
    """Through transformers' own eager attention, for two sequences with a mask."""
    model = build(CONFIGS[name](), dtype=dtype)
    original = block_of(model)
    assert type(original).__name__ == name
    block = fused(original, dtype)
    model.config._attn_implementation = block.attention.config._attn_implementation = "eager"
    inputs = arguments(model, dtype, batch=2, tokens=6)
    got, expected = run(block, inputs), run(original, inputs)
    error = ((got.float() - expected.float()).norm() / expected.float().norm()).item()
    assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_cache_is_filled_and_read() -> None:
    model = build(CONFIGS["Qwen3Attention"]())
    original = block_of(model)
    block = fused(original)
    model.config._attn_implementation = block.attention.config._attn_implementation = "eager"
    caches = [DynamicCache(config=model.config), DynamicCache(config=model.config)]
    for tokens in (4, 4):
        inputs = arguments(model, torch.float32, batch=1, tokens=tokens) | {"attention_mask": None}
        got = run(block, inputs | {"past_key_values": caches[0]})
        expected = run(original, inputs | {"past_key_values": caches[1]})
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert caches[0].get_seq_length(1) == 8


def test_only_the_original_without_weights_stays() -> None:
    block = fused(block_of(build(CONFIGS["Qwen3Attention"]())))
    assert not list(block.attention.parameters())
    assert {name for name, _ in block.named_children()} == {"attention", "qkv_proj", "o_proj"}


def test_quantized_projections_are_joined() -> None:
    original = block_of(build(CONFIGS["LlamaAttention"](), dtype=torch.bfloat16))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(original, name, QuantizedLinear.of(original.get_submodule(name), "int8", 32))  # type: ignore[arg-type]
    block = fused(original, torch.bfloat16)
    assert isinstance(block.qkv_proj, QuantizedLinear)
    assert block.qkv_proj.out_features == 64


def test_layers_without_rope_stay() -> None:
    config = _config("SmolLM3Config", no_rope_layers=[1, 0])
    assert fused_attention(block_of(build(config)), torch.float32) is None


def test_unknown_and_changed_blocks_stay_as_they_are() -> None:
    model = build(SUPPORTED["llama"]())
    block = block_of(model)
    block.register_forward_hook(lambda *_: None)
    assert fused_attention(block, torch.float32) is None
    assert fused_attention(block_of(build(SUPPORTED["phi3"]())), torch.float32) is None
    other = build(SUPPORTED["llama"]())
    block_of(other).q_proj.register_forward_hook(lambda *_: None)
    assert fused_attention(block_of(other), torch.float32) is None
    assert isinstance(block_of(other).k_proj, nn.Linear)


def test_without_the_engines_attention_nothing_can_be_tried() -> None:
    model = build(SUPPORTED["llama"]())
    model.config._attn_implementation = "eager"
    assert fused_attention(block_of(model), torch.float32) is None
