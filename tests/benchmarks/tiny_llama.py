"""A Llama of a few thousand random weights, and what is asked of it."""

from typing import cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.workloads import Prompt
from engines.types import SamplingParams

VOCAB = 32
PROMPTS = [Prompt((5, 6, 7, 8, 9)), Prompt((10,)), Prompt((11, 12, 13))]


def tiny_llama(seed: int, noise: float = 0.0, stop: int | None = None) -> LlamaForCausalLM:
    """A tiny random model; `noise` moves its weights a little."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=stop,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * torch.randn(weight.shape, generator=generator)
    return cast(LlamaForCausalLM, model.train(False))


def sampled(max_tokens: int = 40, **settings: float) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **{"temperature": 1.0, **settings})  # type: ignore[arg-type]
