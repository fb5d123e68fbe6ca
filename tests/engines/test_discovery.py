from __future__ import annotations

import pytest
import torch
from torch import nn

from engines.attention.interface import LayerSpec
from engines.discovery import observe
from engines.errors import UnsupportedModelError
from tests.engines import tiny_models


def test_key_and_value_sizes_may_differ() -> None:
    config = tiny_models._config(
        "DeepseekV3Config",
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        num_hidden_layers=1,
    )
    anatomy = observe(tiny_models.build(config))
    assert anatomy.layers == (LayerSpec(num_kv_heads=4, head_dim=16, value_head_dim=4),)
    assert anatomy.layers[0].bytes_per_token(torch.bfloat16) == 2 * 4 * (16 + 4)


def test_windows_by_layer() -> None:
    anatomy = observe(tiny_models.build(tiny_models.SUPPORTED["gemma2"]()))
    assert anatomy.sliding_windows == (tiny_models.WINDOW, None, tiny_models.WINDOW)


def test_a_layer_without_attention_is_refused() -> None:
    model = tiny_models.build(tiny_models.SUPPORTED["llama"]())

    class Elsewhere(nn.Module):
        def forward(self, hidden_states: object, **_: object) -> tuple[object, None]:
            return hidden_states, None

    model.model.layers[1].self_attn = Elsewhere()
    with pytest.raises(UnsupportedModelError, match=r"does not send all its layers.*\(it sent: 0, 2\)"):
        observe(model)


def test_a_layer_that_attends_twice_is_refused() -> None:
    model = tiny_models.build(tiny_models.SUPPORTED["llama"]())
    model.model.layers[2].self_attn.layer_idx = 0
    with pytest.raises(UnsupportedModelError, match="Layer 0 attends more than once"):
        observe(model)


def test_uneven_head_groups_are_refused() -> None:
    model = tiny_models.build(tiny_models.SUPPORTED["llama"]())
    attention = model.model.layers[0].self_attn
    for projection in ("k_proj", "v_proj"):
        setattr(attention, projection, nn.Linear(32, 24, bias=False))
    with pytest.raises(UnsupportedModelError, match="4 query heads for 3 KV heads"):
        observe(model)
