"""Long random traffic with cancellations leaves nothing behind: no block, no drafter's state, no memory."""

from __future__ import annotations

import gc
import random
import sys
from dataclasses import replace

import pytest

from drafting.ngram import NgramDrafter
from drafting.prediction import PredictionDrafter
from drafting.suffix import SuffixDrafter
from engines.types import GenerateRequest, SpeculationParams, TokenPrompt
from tests.engines.speculating import ScriptedLength
from tests.engines.speculative_engine import VOCAB, Engine, random_request, state_size

NUM_REQUESTS = 10_000


class Traffic:
    """Requests that come, are served or cancelled, and are forgotten."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.engine = Engine(
            {"prediction": PredictionDrafter(), "ngram": NgramDrafter(), "suffix": SuffixDrafter(1024)},
            ScriptedLength((3, 0, 6, 1, 2), (64, 1, 3), (True, False)),
            model=1.5,
            num_blocks=14,
            budget=24,
            max_num_seqs=6,
        )
        self.num_cancelled = 0

    def serve(self, count: int) -> None:
        """Serve `count` more requests, most of the time more than fit."""
        added, pick = 0, self.random
        while added < count or self.engine.core.has_work:
            if added < count and self.engine.core.stats().num_waiting < 4 and pick.random() < 0.7:
                key, added = self.engine.add(self._request()), added + 1
                if pick.random() < 0.1:
                    self._cancel(key)  # before its first step
            if self.engine.core.has_work:
                self.engine.step()
            if pick.random() < 0.1:
                self._cancel(self._anyone())
            self._clean_up()

    def _request(self) -> GenerateRequest:
        pick = self.random
        predicted = tuple(pick.randrange(VOCAB) for _ in range(pick.randint(0, 6)))
        return replace(
            random_request(pick, max_prompt=12, max_tokens=10),
            n=pick.choice([1, 1, 1, 2, 4]),
            cache_salt=pick.choice(["", "tenant"]),
            prediction=TokenPrompt(predicted) if predicted else None,
            speculation=SpeculationParams(
                drafter=pick.choice(["auto", "auto", "model", "none"]), provenance=pick.random() < 0.3
            ),
        )

    def _anyone(self) -> int:
        keys: list[int] = list(self.engine.inner._requests._requests)
        return self.random.choice(keys or [-1])

    def _cancel(self, key: int) -> None:
        before = self.engine.core.stats().num_aborted
        self.engine.core.abort(key)
        self.num_cancelled += self.engine.core.stats().num_aborted - before

    def _clean_up(self) -> None:
        """What this test itself would keep."""
        assert self.engine.reader is not None
        self.engine.deltas.clear()
        for runner in (self.engine.runner, self.engine.reader.memory):
            runner.batches.clear()
            runner.copies.clear()
        self.engine.reader.readings.clear()


def allocated() -> int:
    """Objects alive on Python's heap."""
    gc.collect()
    num_blocks: int = sys.getallocatedblocks()
    return num_blocks


@pytest.mark.parametrize("seed", [1])
def test_nothing_is_left_behind(seed: int) -> None:
    traffic = Traffic(seed)
    engine = traffic.engine
    traffic.serve(NUM_REQUESTS // 3)
    before = allocated()
    traffic.serve(NUM_REQUESTS - NUM_REQUESTS // 3)
    after = allocated()
    engine.assert_idle()
    assert after - before < 2000, "flat: ten thousand requests would leave less than an object each"
    stats = engine.core.stats()
    assert stats.num_finished + stats.num_aborted == NUM_REQUESTS
    assert traffic.num_cancelled > NUM_REQUESTS / 10
    assert stats.num_preemptions > 0
    assert set(stats.drafters) == {"prediction", "ngram", "suffix", "model"}
    assert 0 < stats.num_accepted_tokens < stats.num_drafted_tokens


def test_there_is_something_that_could_be_left_behind() -> None:
    traffic = Traffic(2)
    for _ in range(6):
        traffic.engine.add(random_request(traffic.random))
        traffic.engine.step()
    assert state_size(traffic.engine.decoding.speculator) > 0
    assert traffic.engine.core.stats().num_blocks_used > 0
