"""Greedy output of the whole engine equals transformers' `generate`, token for token, whatever the scheduling."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engines.admission import Limits
from engines.attention import select_backend
from engines.config import LocalEngineConfig
from engines.core import CoreSettings, EngineCore
from engines.loading import LoadedModel, load_model
from engines.model_runner import ModelRunner
from engines.types import GenerateRequest, SamplingParams, TokenPrompt
from tests.engines import tiny_models
from tests.engines.tokenizers import word_tokenizer

NUM_NEW = 24
# Two logits closer than this, as a share of the logits' spread, may change places with the order of summation.
TIE = 1e-4
BLOCK_SIZE = 4
DEMO_MODELS = Path(__file__).parents[2] / "demo" / "models"

SCENARIOS = {
    "mixed lengths": {"num_blocks": 200, "budget": 512},
    "chunked prefill": {"num_blocks": 200, "budget": 9},
    "preemption": {"num_blocks": 26, "budget": 64},
    "chunked prefill and preemption": {"num_blocks": 26, "budget": 9},
}


def make_core(loaded: LoadedModel, backend: str, *, num_blocks: int, budget: int) -> EngineCore:
    limits = Limits(
        max_model_len=100, vocab_size=loaded.vocab_size, num_blocks=num_blocks, block_size=BLOCK_SIZE, max_num_seqs=8
    )
    settings = CoreSettings(
        model="model",
        limits=limits,
        max_num_batched_tokens=budget,
        enable_prefix_caching=True,
        priority_step_s=30.0,
        eos_token_ids=frozenset(),
        device=torch.device("cpu"),
    )
    runner = ModelRunner(loaded, select_backend(backend, torch.device("cpu")), num_blocks, BLOCK_SIZE)
    return EngineCore(settings, runner, word_tokenizer(loaded.vocab_size))


def generate_ours(core: EngineCore, prompts: Sequence[Sequence[int]], first_key: int = 0) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True)
    for key, prompt in enumerate(prompts, first_key):
        core.add(key, GenerateRequest(str(key), TokenPrompt(tuple(prompt)), sampling), arrival_s=key)
    output: dict[int, list[int]] = {}
    while core.has_work:
        for key, deltas in core.step():
            output.setdefault(key, []).extend(token for delta in deltas for token in delta.token_ids)
    return [output[key] for key in range(first_key, first_key + len(prompts))]


def generate_theirs(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    generator: Any = model
    ids = torch.tensor([list(prompt)])
    output = generator.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None
    )
    return [int(token) for token in output[0, len(prompt) :]]


def assert_same(
    model: PreTrainedModel, prompt: Sequence[int], ours: list[int], theirs: list[int], tie: float = TIE
) -> None:
    """Equal, or different from a position on where the two tokens' logits tie."""
    assert len(ours) == NUM_NEW
    split = next((i for i in range(NUM_NEW) if ours[i] != theirs[i]), None)
    if split is None:
        return
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *ours[:split]]])).logits[0, -1].float()
    gap = (logits[theirs[split]] - logits[ours[split]]).abs() / logits.std()
    assert gap < tie, f"differs at output token {split}: {ours[split]} for {theirs[split]}, {gap:.2g} apart"


def make_prompts(vocab_size: int) -> list[list[int]]:
    generator = random.Random(5)
    prompts = [[generator.randrange(3, vocab_size) for _ in range(length)] for length in (1, 30, 7, 17, 4, 23)]
    return [*prompts, [*prompts[1][:21], 9, 8], prompts[3]]


@cache
def eager(name: str) -> PreTrainedModel:
    model = tiny_models.build(tiny_models.SUPPORTED[name]())
    model.set_attn_implementation("eager")
    return model


@cache
def references(name: str) -> list[list[int]]:
    return [generate_theirs(eager(name), prompt) for prompt in make_prompts(tiny_models.VOCAB_SIZE)]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", tiny_models.SUPPORTED)
def test_tiny_models(name: str, scenario: str, backend: str) -> None:
    core = make_core(tiny_models.load(name), backend, **SCENARIOS[scenario])
    prompts = make_prompts(tiny_models.VOCAB_SIZE)
    outputs = generate_ours(core, prompts)
    for prompt, ours, theirs in zip(prompts, outputs, references(name), strict=True):
        assert_same(eager(name), prompt, ours, theirs)
    stats = core.stats()
    assert (stats.num_preemptions > 0) == ("preemption" in scenario)
    assert stats.num_blocks_used == 0


@pytest.mark.parametrize("name", tiny_models.SUPPORTED)
def test_prefix_hits(name: str) -> None:
    core = make_core(tiny_models.load(name), "torch", num_blocks=200, budget=64)
    prompts = make_prompts(tiny_models.VOCAB_SIZE)
    generate_ours(core, prompts)
    before = core.stats().num_cached_tokens
    outputs = generate_ours(core, prompts, first_key=len(prompts))
    for prompt, ours, theirs in zip(prompts, outputs, references(name), strict=True):
        assert_same(eager(name), prompt, ours, theirs)
    expected = sum((len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for prompt in prompts)
    assert core.stats().num_cached_tokens - before == expected


@pytest.mark.skipif(not DEMO_MODELS.exists(), reason="the demo fleet is not there")
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", ["target", "draft", "mid"])
def test_demo_models(name: str, scenario: str) -> None:
    loaded, reference = _demo(name)
    core = make_core(loaded, "torch", **SCENARIOS[scenario])
    prompts = make_prompts(loaded.vocab_size)[:5]
    for prompt, ours in zip(prompts, generate_ours(core, prompts), strict=True):
        assert_same(reference, prompt, ours, generate_theirs(reference, prompt))


@cache
def _demo(name: str) -> tuple[LoadedModel, PreTrainedModel]:
    folder = str(DEMO_MODELS / name)
    config = LocalEngineConfig(model=folder, dtype="float32", device="cpu")
    if name == "mid":  # its int8 layers are ours, which round activations too: test_checkpoint_formats.py compares them
        reference = load_model(config).model
        reference.set_attn_implementation("eager")
    else:
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return load_model(config), reference.eval()
