"""Texts that a model writes as the engine has it write: what the rules of verification are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.workloads import Prompt
from engines.sampler import Sampler, SampleRow
from engines.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Text:
    """What the target wrote after a prompt, and its logits at every position: float32 [length, vocab]."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logits: Tensor
    seed: int


def write(
    target: LlamaForCausalLM, starts: Sequence[Prompt], params: SamplingParams, first_seed: int = 0
) -> list[Text]:
    """A text for each prompt, with seeds from `first_seed` on, up to a stop token (included) or `params.max_tokens`."""
    token_ids, logits = _sample(target, starts, params, first_seed)
    stops = _stop_token_ids(target)
    texts = []
    for i, start in enumerate(starts):
        written = token_ids[i].tolist()
        length = next((at + 1 for at, token_id in enumerate(written) if token_id in stops), len(written))
        texts.append(Text(start.token_ids, tuple(written[:length]), logits[i, :length], first_seed + i))
    return texts


@torch.inference_mode()
def _sample(
    target: LlamaForCausalLM, starts: Sequence[Prompt], params: SamplingParams, first_seed: int
) -> tuple[Tensor, Tensor]:
    """Tokens [num_prompts, max_tokens] and the logits they were sampled from, written on through stop tokens."""
    lengths = [len(start.token_ids) for start in starts]
    tokens = torch.tensor([[0] * (max(lengths) - len(start.token_ids)) + list(start.token_ids) for start in starts])
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()  # padded on the left
    cache, sampler = DynamicCache(), Sampler()
    written, logits = [], []
    for step in range(params.max_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = target(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(cast(Tensor, output.logits)[:, -1].float())
        rows = [SampleRow(params, first_seed + i, length + step, step) for i, length in enumerate(lengths)]
        tokens = torch.tensor([[token.token_id] for token in sampler.sample(logits[-1], rows)])
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        written.append(tokens)
    return torch.cat(written, 1), torch.stack(logits, 1)


def _stop_token_ids(model: LlamaForCausalLM) -> set[int]:
    assert model.generation_config is not None
    stops = model.generation_config.eos_token_id
    return set(stops if isinstance(stops, list) else [] if stops is None else [stops])
