"""Tiny random models of many architectures, for tests: a vocabulary of 96, at most three layers, head size 8.

Weights are drawn wide (standard deviation 0.3), so that attention is far from uniform and a wrong mask shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from engines.attention.dispatch import ATTENTION_NAME, register
from engines.loading import LoadedModel, inspect_model

VOCAB_SIZE = 96
WINDOW = 8

_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]


def _config(class_name: str, **settings: object) -> PretrainedConfig:
    config_class: Callable[..., PretrainedConfig] = getattr(transformers, class_name)
    return config_class(**(_SHAPE | settings))


SUPPORTED: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: _config("LlamaConfig"),
    "qwen2": lambda: _config("Qwen2Config"),
    "qwen3": lambda: _config("Qwen3Config", head_dim=8),
    "mistral": lambda: _config("MistralConfig", sliding_window=WINDOW),
    "gemma2": lambda: _config(
        "Gemma2Config", head_dim=8, sliding_window=WINDOW, layer_types=_MIXED_LAYERS, attn_logit_softcapping=2.0
    ),
    "gemma3_text": lambda: _config("Gemma3TextConfig", head_dim=8, sliding_window=WINDOW, layer_types=_MIXED_LAYERS),
    "phi3": lambda: _config("Phi3Config"),
    "qwen3_moe": lambda: _config(
        "Qwen3MoeConfig", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "mixtral": lambda: _config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "gpt_oss": lambda: _config(
        "GptOssConfig",
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=_MIXED_LAYERS,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
}

# Refused, with a piece of the reason.
REFUSED: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "falcon": (lambda: _config("FalconConfig"), "does not let its attention be replaced"),
    "bloom": (
        lambda: transformers.BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4),
        "does not let its attention be replaced",
    ),
    "mamba": (
        lambda: transformers.MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, state_size=4),
        "does not let its attention be replaced",
    ),
    "minimax": (
        lambda: _config(
            "MiniMaxConfig",
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
        "linear_attention",
    ),
    "bert": (
        lambda: transformers.BertConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            is_decoder=False,
        ),
        "attends in both directions",
    ),
}


def build(config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with seeded random weights and the engine's attention."""
    register()
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME, dtype=dtype)
    return model.eval()


def load(name: str, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A supported architecture as load_model would return it."""
    return inspect_model(build(SUPPORTED[name](), dtype=dtype), weights_fingerprint=name)


def save(config: PretrainedConfig, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint with seeded random weights; returns the folder."""
    build(config, dtype=dtype).save_pretrained(folder)
    return folder
