"""Shrinks any transformers config to a tiny one of the same architecture."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

WINDOW = 8

_NUM_LAYERS = 2
_SMALL: dict[str, Any] = {
    # size of the whole
    "vocab_size": 96, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "emb_dim": 32,
    "embedding_size": 32, "word_embed_proj_dim": 32, "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48,
    "n_inner": 48, "ffn_hidden_size": 48, "mlp_hidden_size": 48, "num_hidden_layers": _NUM_LAYERS,
    "n_layer": _NUM_LAYERS, "n_layers": _NUM_LAYERS, "num_layers": _NUM_LAYERS, "decoder_layers": _NUM_LAYERS,
    "encoder_layers": _NUM_LAYERS, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "max_seq_len": 512, "block_size": 512,
    "initializer_range": 0.3, "init_std": 0.3,
    # attention
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attention_head_dim": 8,
    "global_head_dim": 16, "num_global_key_value_heads": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 16, "rotary_dim": 4,
    "num_kv_shared_layers": 0, "attention_chunk_size": 512, "swa_head_dim": 8, "swa_v_head_dim": 8,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "top_k": 2, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "expert_ffn_hidden_size": 16, "zero_expert_num": 1,
    "intermediate_size_mlp": 48, "moe_layer_start_index": 1, "prefix_dense_intermediate_size": 48,
    # recurrent parts, so that they can be built before they are refused
    "state_size": 4, "mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_num_heads": 4,
    "mamba_head_dim": 8, "ssm_state_size": 4, "conv_dim": 32, "lru_width": 32, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "n_mamba_heads": 1,
    # odds and ends
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "laurel_rank": 4, "altup_num_inputs": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hash_functions": 1, "num_buckets": 8,
    "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 16], "feed_forward_size": 48, "num_dense_layers": 1,
}  # fmt: skip

# What a name alone does not tell: value by model type.
_DERIVED = frozenset({"head_dim", "num_key_value_heads", "n_inner"})
_SPECIAL: dict[str, dict[str, Any]] = {
    "falcon": {"num_kv_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {"intermediate_size": [48] * _NUM_LAYERS, "activation_sparsity_pattern": [0.0] * _NUM_LAYERS},
    "phi": {"partial_rotary_factor": 0.5},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1, "moe_router_topk": 1},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "n_routed_experts": 4},
}


def shrink(config_class: type[PretrainedConfig]) -> PretrainedConfig:
    """A tiny config of that class: two layers (or one of each declared kind), 4 heads, windows of 8, vocabulary 96.

    Raises what the class raises if it does not like the sizes.
    """
    return config_class(**_overrides(config_class()))


def _overrides(default: PretrainedConfig) -> dict[str, Any]:
    # Defaults of None have a meaning of their own and stay, but for those that merely say "derive it".
    known = {name for name, value in vars(default).items() if value is not None or name in _DERIVED}
    chosen = {name: small for name, small in _SMALL.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention expands to as many key heads as query heads
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    for name in ("sliding_window", "attention_window_size"):
        if name in known:
            chosen[name] = WINDOW
    kinds = list(dict.fromkeys(vars(default).get("layer_types") or ()))
    if kinds:
        chosen["layer_types"] = [kinds[i % len(kinds)] for i in range(max(_NUM_LAYERS, len(kinds)))]
        if "sliding_attention" in kinds:
            chosen["sliding_window"] = WINDOW
        if "num_hidden_layers" in chosen:
            chosen["num_hidden_layers"] = len(chosen["layer_types"])
    if mlp_kinds := vars(default).get("mlp_layer_types"):
        chosen["mlp_layer_types"] = [mlp_kinds[-1]] * chosen.get("num_hidden_layers", _NUM_LAYERS)
    for name in default.sub_configs:
        if isinstance(part := vars(default).get(name), PretrainedConfig):
            chosen[name] = _overrides(part)
    return chosen | _SPECIAL.get(default.model_type, {})
