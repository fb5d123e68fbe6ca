"""A verified token is the decoded one: speculation does not change what a quantized model says, not by a bit.

In bfloat16, where the attention backend on CPU does not depend on the batch either.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from drafting.draft_length import LengthPolicy
from drafting.ngram import NgramDrafter
from drafting.prediction import PredictionDrafter
from engines.admission import Limits
from engines.attention import select_backend
from engines.batch import BatchItem, build_batch
from engines.core import CoreSettings, EngineCore
from engines.draft_reader import DraftReader
from engines.loading import LoadedModel, inspect_model
from engines.model_runner import ModelRunner
from engines.quant.model import quantize
from engines.quant.scheme import Scheme
from tests.engines import tiny_models
from tests.engines.speculating import ScriptedLength, speculating
from tests.engines.test_speculation_attention import BLOCK_SIZE, VOCAB, generate, requests
from tests.engines.tokenizers import word_tokenizer

SCHEMES: list[Scheme] = ["int8", "int4"]
_CPU = torch.device("cpu")
_NUM_BLOCKS = 200


@cache
def quantized(scheme: Scheme) -> LoadedModel:
    model = tiny_models.build(tiny_models.SUPPORTED["qwen3"](), dtype=torch.bfloat16)
    assert quantize(model, scheme, group_size=16)
    return inspect_model(model, weights_fingerprint=scheme)


def runner(loaded: LoadedModel) -> ModelRunner:
    return ModelRunner(loaded, select_backend("torch", _CPU), _NUM_BLOCKS, BLOCK_SIZE)


def logits_in_steps_of(loaded: LoadedModel, token_ids: list[int], sizes: list[int], company: int) -> Tensor:
    """Logits of all tokens [num_tokens, vocab], so many a step, with other sequences in the same steps."""
    own, rows, start = runner(loaded), [], 0
    for size in sizes:
        items = []
        for index in range(1 + company):
            table = array("i", range(12 * index, 12 * (index + 1)))
            ids = token_ids if index == 0 else token_ids[::-1]
            items.append(BatchItem(ids, start, start + size, (), table, size))
        rows.append(own.forward(build_batch(items, BLOCK_SIZE, _CPU))[:size])
        start += size
    return torch.cat(rows)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_do_not_depend_on_the_step(scheme: Scheme) -> None:
    token_ids = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    decoded = logits_in_steps_of(quantized(scheme), token_ids, [10] + [1] * 30, company=0)
    verified = logits_in_steps_of(quantized(scheme), token_ids, [10, 5, 6, 2, 8, 9], company=3)
    assert torch.equal(decoded, verified)


def outputs(scheme: Scheme, policy: LengthPolicy | int, *, speculates: bool) -> tuple[list[list[int]], EngineCore]:
    loaded = quantized(scheme)
    limits = Limits(100, VOCAB, _NUM_BLOCKS, BLOCK_SIZE, 8, frozenset({"prediction"} if speculates else ()))
    settings = CoreSettings("model", limits, 512, True, 30.0, frozenset(), _CPU)
    reader = DraftReader(runner(loaded), max_position=512, vocab_size=VOCAB, device=_CPU) if speculates else None
    lookups = {"prediction": PredictionDrafter(), "ngram": NgramDrafter()} if speculates else {}
    core = EngineCore(settings, runner(loaded), word_tokenizer(VOCAB), speculating(lookups, policy, reader))
    asked = requests() if speculates else [replace(one, prediction=None) for one in requests()]
    return generate(core, asked), core


@pytest.mark.parametrize("scheme", SCHEMES)
def test_speculation_says_the_same(scheme: Scheme) -> None:
    plain, _ = outputs(scheme, 0, speculates=False)
    policy = ScriptedLength((3, 0, 7, 1, 0, 0, 5), (64, 2, 64, 5), (True, False))
    speculated, core = outputs(scheme, policy, speculates=True)
    assert speculated == plain
    assert core.stats().num_accepted_tokens > 20
