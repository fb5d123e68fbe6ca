"""A text is what the target would have written alone, up to its stop token."""

import torch
from transformers import LlamaForCausalLM

from benchmarks.target_text import write
from benchmarks.workloads import Prompt
from engines.sampler import Sampler, SampleRow
from engines.types import SamplingParams
from tests.benchmarks.tiny_llama import PROMPTS, sampled, tiny_llama

STOP = 3


def _alone(model: LlamaForCausalLM, prompt: Prompt, params: SamplingParams, seed: int) -> list[int]:
    tokens = list(prompt.token_ids)
    for step in range(params.max_tokens):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([tokens])).logits[:, -1]
        tokens.append(Sampler().sample(logits, [SampleRow(params, seed, len(tokens), step)])[0].token_id)
    return tokens[len(prompt.token_ids) :]


def test_a_text_is_what_the_target_samples_alone() -> None:
    model, params = tiny_llama(0), sampled(12)
    for i, text in enumerate(write(model, PROMPTS, params, first_seed=40)):
        assert text.prompt == PROMPTS[i].token_ids
        assert list(text.token_ids) == _alone(model, PROMPTS[i], params, 40 + i)
        context = torch.tensor([[*text.prompt, *text.token_ids[:-1]]])
        with torch.inference_mode():
            logits = model(input_ids=context).logits[0, len(text.prompt) - 1 :]
        torch.testing.assert_close(text.logits, logits, rtol=1e-4, atol=1e-4)


def test_a_text_ends_with_its_first_stop_token() -> None:
    params = sampled(60)
    whole = write(tiny_llama(0), PROMPTS, params)
    cut = write(tiny_llama(0, stop=STOP), PROMPTS, params)
    assert any(STOP in text.token_ids for text in whole)
    for before, after in zip(whole, cut, strict=True):
        length = (*before.token_ids, STOP).index(STOP) + 1
        assert after.token_ids == before.token_ids[:length]
        assert len(after.logits) == len(after.token_ids)
