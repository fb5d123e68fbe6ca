"""A model with random weights and a real shape, for measurements that do not look at the text."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SHAPES: dict[str, dict[str, int]] = {
    "qwen3-0.5b": {  # 0.47 B parameters
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32000,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "qwen3-tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
    },
}


def materialize(shape: str, folder: Path, seed: int = 0) -> Path:
    """The folder of a bf16 checkpoint of that shape, made there if it is not there yet."""
    path = folder / f"{shape}-seed{seed}"
    if not (path / "tokenizer.json").exists():
        torch.manual_seed(seed)
        config = Qwen3Config.from_dict(
            {"tie_word_embeddings": True, "max_position_embeddings": 4096, "dtype": "bfloat16", **SHAPES[shape]}
        )
        model = Qwen3ForCausalLM(config)
        torch.nn.Module.to(model, torch.bfloat16)
        model.save_pretrained(path)
        _tokenizer(SHAPES[shape]["vocab_size"]).save_pretrained(path)
    return path


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Token i reads " i": detokenizing costs what it costs with a real vocabulary of this size."""
    tokenizer = Tokenizer(models.WordLevel({f" {i}": i for i in range(vocab_size)}, unk_token=" 0"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
