from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from engines.attention import select_backend
from engines.batch import RaggedBatch
from engines.loading import LoadedModel
from engines.model_runner import ModelRunner
from engines.precision import likelihood as module
from engines.precision.examples import Example
from engines.precision.likelihood import KVSpace, Likelihood, likelihoods
from tests.engines import tiny_models
from tests.engines.precision.tiny import example

BLOCK_SIZE = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_models.load("qwen3")


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, tiny_models.VOCAB_SIZE), k=count)


def score(loaded: LoadedModel, examples: Sequence[Example], num_blocks: int = 64) -> list[Likelihood]:
    runner = ModelRunner(loaded, select_backend("auto", CPU), num_blocks, BLOCK_SIZE)
    return likelihoods(runner, examples, KVSpace(num_blocks, BLOCK_SIZE, CPU))


def expected(loaded: LoadedModel, scored: Example) -> tuple[float, list[int]]:
    """The same from one eager forward over all tokens."""
    loaded.model.set_attn_implementation("eager")
    ids = torch.tensor([scored.token_ids])
    with torch.inference_mode():
        logits = loaded.model(ids).logits[0, scored.first_scored - 1 : -1]
    loaded.model.set_attn_implementation("outrider")
    nats = torch.nn.functional.cross_entropy(logits, ids[0, scored.first_scored :], reduction="sum")
    return nats.item(), logits.argmax(1).tolist()


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_equals_one_eager_forward_at_any_chunk_length(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk)
    examples = [
        example(tokens(count, seed), first)
        for seed, (count, first) in enumerate([(9, 1), (20, 7), (2, 1), (17, 16), (5, 4)])
    ]
    for found, scored in zip(score(loaded, examples), examples, strict=True):
        nats, best = expected(loaded, scored)
        assert found.nats == pytest.approx(nats, rel=1e-4)
        assert list(found.best) == best
        assert len(found.best) == scored.num_scored


def test_rows_without_anything_to_score_read_nothing(loaded: LoadedModel) -> None:
    silent = example(tokens(6, 0), 6, num_prompt_tokens=6)
    found = score(loaded, [silent, example(tokens(6, 1), 2), example([], 0), example([5], 1)])
    assert found[0] == found[2] == found[3] == Likelihood(0.0, ())
    assert found[1].nats > 0


def test_a_row_is_the_same_alone_and_among_others(loaded: LoadedModel) -> None:
    examples = [example(tokens(count, count), 1) for count in (70, 5, 140, 12, 33)]
    together = score(loaded, examples)
    alone = [score(loaded, [scored])[0] for scored in examples]
    one_at_a_time = score(loaded, examples, num_blocks=-(-140 // BLOCK_SIZE))
    for other in (alone, one_at_a_time):
        assert [found.nats for found in other] == pytest.approx([found.nats for found in together], rel=1e-6)
        assert [found.best for found in other] == [found.best for found in together]


def test_progress_counts_rows(loaded: LoadedModel) -> None:
    runner = ModelRunner(loaded, select_backend("auto", CPU), 8, BLOCK_SIZE)
    done: list[int] = []
    likelihoods(runner, [example(tokens(4, i), 1) for i in range(6)], KVSpace(8, BLOCK_SIZE, CPU), done.append)
    assert done == [4, 6]


def test_all_but_the_last_chunk_is_read_back_from_the_cache(loaded: LoadedModel) -> None:
    class Forgetful(ModelRunner):
        """Loses what it has cached between two steps."""

        def forward(self, batch: RaggedBatch) -> torch.Tensor:
            logits = super().forward(batch)
            for cache in self.kv_tensors:
                cache.zero_()
            return logits

    scored = [example(tokens(100, 3), 1)]
    forgetful = Forgetful(loaded, select_backend("auto", CPU), 64, BLOCK_SIZE)
    (lossy,) = likelihoods(forgetful, scored, KVSpace(64, BLOCK_SIZE, CPU))
    (exact,) = score(loaded, scored)
    assert lossy.best[: module.CHUNK_TOKENS] == exact.best[: module.CHUNK_TOKENS]
    assert abs(lossy.nats - exact.nats) > 1e-3
