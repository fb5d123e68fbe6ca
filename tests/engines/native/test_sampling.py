"""Drawing natively gives the tokens that torch would have drawn, for the same noise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from drafting.noise import noise
from engines.logits import ensure_choice, scale
from engines.native.library import ISA_NAMES, isa_limited_to, library
from engines.native.sampling import draw, probabilities, takes
from engines.sampler import Sampler, SampleRow
from engines.types import SamplingParams

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with isa_limited_to(request.param) as name:
        if name != request.param:
            pytest.skip(f"this machine has {name} at best")
        yield name


def by_definition(logits: Tensor, temperatures: list[float], seeds: list[int], positions: list[int]) -> Tensor:
    scores = logits.float().clone()
    ensure_choice(scores)
    scores = scale(scores, torch.tensor([temperature or 1.0 for temperature in temperatures]))
    ids = torch.arange(logits.shape[1])
    gumbel = noise(torch.tensor(seeds)[:, None], torch.tensor(positions)[:, None], ids)
    gumbel[torch.tensor(temperatures) == 0.0] = 0.0
    return (scores + gumbel).max(-1).indices


def numbers(count: int) -> tuple[list[int], list[int]]:
    generator = torch.Generator().manual_seed(count)
    seeds = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    return seeds.tolist(), torch.randint(0, 100_000, (count,), generator=generator).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 8, 16, 31, 1000, 32_001])
@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
def test_the_token_is_the_argmax_of_score_and_noise(isa: str, dtype: torch.dtype, vocab: int, spread: float) -> None:
    temperatures = [0.0, 1e-5, 0.3, 1.0, 1.0, 2.0, 50.0, 0.0]
    logits = (torch.randn(len(temperatures), vocab, generator=torch.Generator().manual_seed(1)) * spread).to(dtype)
    seeds, positions = numbers(len(temperatures))
    expected = by_definition(logits, temperatures, seeds, positions)
    assert torch.equal(draw(logits, temperatures, seeds, positions), expected)


@pytest.mark.parametrize("place", [0, 15, 16, 36])
def test_what_is_no_number_is_never_drawn(isa: str, place: int) -> None:
    logits = torch.zeros(4, 37)
    logits[0, place] = NAN
    logits[1, place], logits[1, 3] = INF, 5.0
    logits[2] = -INF
    logits[3] = -INF
    logits[3, place] = -3.0
    for temperature in (0.0, 1.0):
        ids = draw(logits, [temperature] * 4, [1, 2, 3, 4], [5, 6, 7, 8]).tolist()
        assert ids[0] != place
        assert ids[1:] == [place, 0, place]


def test_equals_go_to_the_lowest_id(isa: str) -> None:
    logits = torch.full((1, 100), -1.0)
    logits[0, [40, 41, 90]] = 2.0
    assert draw(logits, [0.0], [0], [0]).tolist() == [40]


def test_the_noise_of_far_tokens_still_counts(isa: str) -> None:
    """A bound that is too tight would make unlikely tokens impossible: at equal logits each must win as often."""
    seeds = list(range(4000))
    drawn = draw(torch.zeros(4000, 20), [1.0] * 4000, seeds, [0] * 4000)
    counts = torch.bincount(drawn, minlength=20)
    assert (counts - 200).abs().max() < 70


def test_rows_may_lie_apart_and_do_not_depend_on_each_other_or_on_threads() -> None:
    logits = torch.randn(9, 700)[:, :500]
    seeds, positions = numbers(9)
    together = draw(logits, [1.0] * 9, seeds, positions)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(draw(logits, [1.0] * 9, seeds, positions), together)
    finally:
        torch.set_num_threads(threads)
    alone = [draw(logits[i : i + 1], [1.0], seeds[i : i + 1], positions[i : i + 1]).item() for i in range(9)]
    assert alone == together.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_probabilities_are_the_softmax(isa: str, dtype: torch.dtype, spread: float) -> None:
    logits = (torch.randn(5, 777) * spread).to(dtype)
    logits[0, 5] = -INF
    ids = torch.tensor([5, 0, 776, 12, 13])
    expected = logits.float().softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(probabilities(logits, ids), expected, rtol=2e-5, atol=1e-30)


def test_there_is_no_probability_without_a_number(isa: str) -> None:
    logits = torch.zeros(3, 20)
    logits[0, 4] = NAN
    logits[1] = -INF
    logits[2, 7] = NAN
    found = probabilities(logits, torch.tensor([4, 4, 4])).tolist()
    assert found[0] != found[0]
    assert found[1] != found[1]
    assert found[2] == pytest.approx(1 / 19)


def test_other_tensors_are_not_taken() -> None:
    assert takes(torch.zeros(2, 3))
    assert not takes(torch.zeros(2, 3, dtype=torch.float16))
    assert not takes(torch.zeros(3, 2).T)
    assert not takes(torch.zeros(2, 0))


def test_the_sampler_says_the_same_with_and_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [
        SamplingParams(max_tokens=9, temperature=0.0),
        SamplingParams(max_tokens=9, temperature=1.0),
        SamplingParams(max_tokens=9, temperature=0.7, logit_bias={3: 5.0, 9: -100.0}),
        SamplingParams(max_tokens=9, temperature=1.3, top_p=0.9, logprobs=2),
        SamplingParams(max_tokens=9, temperature=1.0, min_tokens=5),
        SamplingParams(max_tokens=9, temperature=0.0, logit_bias={7: 100.0}, logprobs=0),
        SamplingParams(max_tokens=9, temperature=1.0, top_k=4, min_p=0.05),
    ]
    logits = torch.randn(len(kinds) * 20, 300) * 2
    rows = [
        SampleRow(params, seed=i, position=i + j, num_output=0, suppressed=(1, 2))
        for i in range(20)
        for j, params in enumerate(kinds)
    ]
    with_kernels = Sampler().sample(logits, rows)
    monkeypatch.setattr("engines.native.sampling.takes", lambda logits: False)
    assert Sampler().sample(logits, rows) == with_kernels
