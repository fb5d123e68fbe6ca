"""Speculation with real attention, target and draft: the plain output, token for token, in float32 on a CPU.

The number of rows in a forward changes the last bits of its logits, so two tokens whose scores tie may change places.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch

from drafting.draft_length import AdaptiveLength, LengthPolicy
from drafting.ngram import NgramDrafter
from drafting.noise import noise
from drafting.prediction import PredictionDrafter
from drafting.protocol import Drafter, Source
from drafting.suffix import SuffixDrafter
from engines.admission import Limits
from engines.attention import select_backend
from engines.core import CoreSettings, EngineCore
from engines.draft_reader import DraftReader
from engines.loading import LoadedModel, inspect_model
from engines.model_runner import ModelRunner
from engines.types import GenerateRequest, SamplingParams, TokenPrompt
from tests.engines import tiny_models
from tests.engines.speculating import ScriptedLength, speculating
from tests.engines.tokenizers import word_tokenizer

VOCAB = tiny_models.VOCAB_SIZE
BLOCK_SIZE = 4
NUM_NEW = 20
TIE = 1e-4  # of the scores' spread
_CPU = torch.device("cpu")

SCHEDULES = {
    "roomy": {"num_blocks": 200, "budget": 512},
    "chunked": {"num_blocks": 200, "budget": 9},
    "chunked and preempting": {"num_blocks": 26, "budget": 12},
}
LENGTHS: dict[str, Callable[[], LengthPolicy | int]] = {
    "1": lambda: 1,
    "4": lambda: 4,
    "8": lambda: 8,
    "adaptive": AdaptiveLength,
    "any": lambda: ScriptedLength((3, 0, 7, 1, 0, 0, 5), (64, 2, 64, 5), (True, False)),
}


def _lookups() -> dict[Source, Drafter]:
    return {"prediction": PredictionDrafter(), "ngram": NgramDrafter(), "suffix": SuffixDrafter(1024)}


# Lookups, and how much noise is in the draft model's weights, as a share of their spread.
DRAFTERS: dict[str, tuple[Callable[[], dict[Source, Drafter]], float | None]] = {
    "lookups": (_lookups, None),
    "the target as draft model": (dict, 0.0),
    "draft model": (dict, 0.05),
    "auto": (_lookups, 0.05),
}


@cache
def target(name: str) -> LoadedModel:
    return tiny_models.load(name)


@cache
def perturbed(name: str, share: float) -> LoadedModel:
    """A copy with noise in its weights."""
    model = copy.deepcopy(target(name).model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * share)
    return inspect_model(model, weights_fingerprint="draft")


def make_core(
    name: str,
    lookups: dict[Source, Drafter],
    policy: LengthPolicy | int,
    share: float | None,
    *,
    num_blocks: int,
    budget: int,
    max_num_seqs: int = 8,
) -> EngineCore:
    backend = select_backend("torch", _CPU)
    reader = None
    if share is not None:
        runner = ModelRunner(perturbed(name, share), backend, num_blocks, BLOCK_SIZE)
        reader = DraftReader(runner, max_position=512, vocab_size=VOCAB, device=_CPU)
    limits = Limits(100, VOCAB, num_blocks, BLOCK_SIZE, max_num_seqs, frozenset({"prediction"}))
    settings = CoreSettings("model", limits, budget, True, 30.0, frozenset(), _CPU)
    runner = ModelRunner(target(name), backend, num_blocks, BLOCK_SIZE)
    return EngineCore(settings, runner, word_tokenizer(VOCAB), speculating(lookups, policy, reader))


@cache
def requests() -> tuple[GenerateRequest, ...]:
    """Greedy and sampled ones in turn; the last two come back to earlier prompts."""
    generator = random.Random(5)
    prompts = [[generator.randrange(3, VOCAB) for _ in range(length)] for length in (1, 30, 7, 17, 4, 23)]
    prompts += [[*prompts[1][:21], 9, 8], prompts[3], prompts[5]]
    return tuple(
        GenerateRequest(
            str(key),
            TokenPrompt(tuple(prompt)),
            SamplingParams(max_tokens=NUM_NEW, temperature=(0.0, 1.0)[key % 2], seed=key, ignore_eos=True),
            prediction=TokenPrompt(tuple(prompt)) if key % 3 == 0 else None,
        )
        for key, prompt in enumerate(prompts)
    )


def generate(core: EngineCore, asked: Sequence[GenerateRequest], cancelled: int | None = None) -> list[list[int]]:
    """The requests' outputs; each arrives a step after the one before, every `cancelled`-th leaves in mid-stream."""
    output: dict[int, list[int]] = {key: [] for key in range(len(asked))}
    arrivals = list(enumerate(asked))
    while arrivals or core.has_work:
        if arrivals:
            key, one = arrivals.pop(0)
            core.add(key, one, arrival_s=key)
        for key, deltas in core.step():
            output[key].extend(token for delta in deltas for token in delta.token_ids)
            if cancelled and key % cancelled == 0 and len(output[key]) >= NUM_NEW // 2:
                core.abort(key)
    return list(output.values())


@cache
def plain(name: str) -> list[list[int]]:
    core = make_core(name, {}, 0, None, num_blocks=200, budget=512)
    return generate(core, [replace(one, prediction=None) for one in requests()])


def assert_same(name: str, one: GenerateRequest, ours: list[int], expected: list[int]) -> None:
    """Equal, or different from a position on where the two tokens' scores tie."""
    split = next((i for i in range(NUM_NEW) if ours[i] != expected[i]), None)
    assert len(ours) == NUM_NEW
    if split is None:
        return
    assert isinstance(one.prompt, TokenPrompt)
    context = [*one.prompt.token_ids, *ours[:split]]
    eager = copy.deepcopy(target(name).model)
    eager.set_attn_implementation("eager")
    with torch.inference_mode():
        scores = eager(torch.tensor([context])).logits[0, -1].float()
    spread = scores.std()
    if one.sampling.temperature:
        seed, position = torch.tensor(one.sampling.seed), torch.tensor(len(context))
        scores = scores / one.sampling.temperature + noise(seed, position, torch.arange(VOCAB))
    gap = (scores[expected[split]] - scores[ours[split]]).abs() / spread
    assert gap < TIE, f"differs at output token {split}: {ours[split]} for {expected[split]}, {gap:.2g} apart"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_plain_output(drafter: str, length: str, schedule: str) -> None:
    lookups, share = DRAFTERS[drafter]
    core = make_core("llama", lookups(), LENGTHS[length](), share, **SCHEDULES[schedule])
    for one, ours, expected in zip(requests(), generate(core, requests()), plain("llama"), strict=True):
        assert_same("llama", one, ours, expected)
    stats = core.stats()
    assert stats.num_blocks_used == 0
    assert (stats.num_preemptions > 0) == ("preempting" in schedule)
    if drafter == "the target as draft model":
        assert stats.num_accepted_tokens == stats.num_drafted_tokens
    if length != "adaptive":
        assert stats.num_accepted_tokens > 0


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("size", [1, 5, 16])
def test_batches_that_others_leave_in_mid_stream(size: int, drafter: str) -> None:
    lookups, share = DRAFTERS[drafter]
    core = make_core("llama", lookups(), 4, share, num_blocks=200, budget=24, max_num_seqs=16)
    asked = (requests() * 2)[:size]
    outputs = generate(core, asked, cancelled=3)
    left = [key for key in range(size) if key % 3 == 0]
    assert all(NUM_NEW // 2 <= len(outputs[key]) < NUM_NEW for key in left)
    for key in range(size):
        if key not in left:
            assert_same("llama", asked[key], outputs[key], plain("llama")[key % len(requests())])
    assert core.stats().num_blocks_used == 0
    assert core.stats().num_drafted_tokens > 0 or (size == 1 and share is None), "lookups alone may find nothing"


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mistral", "qwen3_moe"])
def test_windows_sinks_and_experts(name: str) -> None:
    core = make_core(name, _lookups(), 5, 0.05, **SCHEDULES["chunked and preempting"])
    for one, ours, expected in zip(requests(), generate(core, requests()), plain(name), strict=True):
        assert_same(name, one, ours, expected)
    assert 0 < core.stats().num_accepted_tokens < core.stats().num_drafted_tokens


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {},
        {"top_p": 0.9},
        {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
        {"stop_token_ids": (7, 8, 9), "min_tokens": 30},
        {"logit_bias": {5: 4.0, 6: -100.0}},
    ],
    ids=lambda fields: "+".join(fields) or "coupled",
)
def test_a_draft_model_equal_to_the_target_is_always_right(fields: dict[str, object]) -> None:
    core = make_core("llama", {}, 5, 0.0, **SCHEDULES["roomy"])
    sampling = SamplingParams.model_validate({"max_tokens": 40, "seed": 1, "ignore_eos": True} | fields)
    asked = [replace(one, sampling=sampling, prediction=None) for one in requests()]
    generate(core, asked)
    stats = core.stats()
    assert stats.num_accepted_tokens == stats.num_drafted_tokens > 100
