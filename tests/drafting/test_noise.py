from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from drafting.noise import _gumbel, _hash, choice_seed, noise, request_seed
from tests.chi_square import chi_square_z

Hash = Callable[[Tensor, Tensor, Tensor], Tensor]
_WORD = 2**64
_GOLDEN = 0x9E3779B97F4A7C15
_INT64 = st.integers(-(2**63), 2**63 - 1)


def _mix(word: int) -> int:
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % _WORD
    return word ^ (word >> 31)


def _reference_hash(seed: int, position: int, token_id: int) -> int:
    """The same function in Python's unbounded integers."""
    key = _mix((_mix((seed + _GOLDEN) % _WORD) + position * _GOLDEN) % _WORD)
    return _mix((key + token_id * _GOLDEN) % _WORD)


def _one(seed: int, position: int, token_id: int) -> Tensor:
    return noise(torch.tensor([seed]), torch.tensor([position]), torch.tensor([token_id]))


@given(seed=_INT64, position=st.integers(0, 2**31), token_id=st.integers(0, 2**20))
def test_the_hash_is_the_documented_one(seed: int, position: int, token_id: int) -> None:
    bits = _hash(torch.tensor([seed]), torch.tensor([position]), torch.tensor([token_id]))
    assert bits.item() % _WORD == _reference_hash(seed, position, token_id)


def test_splitmix64_known_values() -> None:
    # The published first outputs of SplitMix64 from state 1234567 pin our reference, hence the tensor code.
    states = [(1234567 + i * _GOLDEN) % _WORD for i in (1, 2, 3)]
    assert [_mix(state) for state in states] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_noise_is_finite_at_both_ends() -> None:
    ends = _gumbel(torch.tensor([0, -1, 2**63 - 1, -(2**63)]))
    assert torch.isfinite(ends).all()
    assert ends[0].item() == pytest.approx(-math.log(53 * math.log(2)), rel=1e-6)
    assert ends[1].item() == pytest.approx(53 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 10, 1000, 10**6, 10**9])
def test_the_upper_tail_is_resolved(steps: int) -> None:
    """Near u = 1 the noise is -log(1 - u) to float32 precision, at distances that float32's u could not show."""
    bits = torch.tensor([-(steps << 12)])
    distance = (steps - 0.5) * 2.0**-52
    assert _gumbel(bits).item() == pytest.approx(-math.log(-math.log1p(-distance)), rel=1e-6)


@given(st.lists(st.tuples(_INT64, st.integers(0, 2**20), st.integers(0, 200_000)), min_size=1, max_size=40))
def test_a_value_does_not_depend_on_its_batch(keys: list[tuple[int, int, int]]) -> None:
    together = noise(*(torch.tensor(column) for column in zip(*keys, strict=True)))
    assert together.tolist() == [_one(*key).item() for key in keys]


def test_whole_rows_and_candidates_agree() -> None:
    seeds, positions = torch.tensor([[3], [-4], [2**62]]), torch.tensor([[0], [17], [100_000]])
    vocabulary = torch.arange(5003)
    rows = noise(seeds, positions, vocabulary)
    candidates = torch.randint(5003, (3, 37), generator=torch.Generator().manual_seed(0))
    assert torch.equal(rows.gather(1, candidates), noise(seeds, positions, candidates))
    assert torch.equal(rows[:, 1234:4321], noise(seeds, positions, vocabulary[1234:4321]))


def _grid(axis: int, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """`num` keys that differ along one axis only: seed, position or token."""
    keys = [torch.full((num,), 7), torch.full((num,), 100), torch.full((num,), 42)]
    keys[axis] = torch.arange(num)
    return keys[0], keys[1], keys[2]


def _bins(hash_bits: Tensor, shift: int, num_bits: int) -> Tensor:
    return torch.bitwise_and(hash_bits >> shift, 2**num_bits - 1)


def _misfit(function: Hash) -> float:
    """The worst of many tests of uniformity and of independence from neighbours, in standard deviations."""
    worst = -math.inf
    num = 2**15
    # A neighbour may be the next seed, position or token, or seed and position moving against each other.
    neighbours = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -1, 0), (0, 1, -1), (1, 0, -1)]
    for axis in range(3):
        keys = _grid(axis, num)
        bits = function(*keys)
        for shift in (0, 12, 32, 52, 58):
            counts = torch.bincount(_bins(bits, shift, 6), minlength=64).tolist()
            # Too even is as bad as too uneven.
            worst = max(worst, abs(chi_square_z(counts, [1 / 64] * 64)))
        for step in neighbours:
            other = function(*(key + delta for key, delta in zip(keys, step, strict=True)))
            pairs = _bins(bits, 60, 4) * 16 + _bins(other, 60, 4)
            worst = max(worst, abs(chi_square_z(torch.bincount(pairs, minlength=256).tolist(), [1 / 256] * 256)))
    return worst


def test_the_hash_is_uniform_and_independent() -> None:
    assert _misfit(_hash) < 4.5


def _weyl(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Uniform, but without mixing: far too even."""
    total: Tensor = seeds + positions + token_ids
    return total * (_GOLDEN - _WORD)


def _shared(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Well mixed, but seed and position enter as their sum: one request's noise is the next one's, shifted."""
    return _hash(seeds + positions, torch.zeros_like(positions), token_ids)


def _positionless(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    return _hash(seeds, torch.zeros_like(positions), token_ids)


@pytest.mark.parametrize("bad", [_weyl, _shared, _positionless])
def test_bad_hashes_are_found_out(bad: Hash) -> None:
    assert _misfit(bad) > 20


def test_gumbel_max_draws_from_the_law_jointly_over_positions() -> None:
    law = torch.tensor([0.5, 0.3, 0.15, 0.05])
    num = 40_000
    seeds, tokens = torch.arange(num)[:, None], torch.arange(4)
    draws = [(law.log() + noise(seeds, torch.tensor([[position]]), tokens)).argmax(1) for position in (9, 10)]
    counts = torch.bincount(draws[0] * 4 + draws[1], minlength=16).tolist()
    assert chi_square_z(counts, torch.outer(law, law).flatten().tolist()) < 4


def test_choice_seeds() -> None:
    assert choice_seed(5, 0) == 5 == request_seed(5)
    assert choice_seed(2**64 - 1, 0) == -1
    seeds = [
        choice_seed(seed, choice) for seed in (-(2**63), -1, 0, 1, 2, 2**63 - 1, 2**64 - 2) for choice in range(128)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    # Choices of neighbouring seeds are not each other's.
    assert choice_seed(5 + _GOLDEN, 1) != choice_seed(5, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_has_the_same_bits() -> None:
    seeds, positions, tokens = torch.arange(-8, 8)[:, None], torch.arange(16)[:, None], torch.arange(152_064)
    on_gpu = [key.cuda() for key in (seeds, positions, tokens)]
    assert torch.equal(_hash(*on_gpu).cpu(), _hash(seeds, positions, tokens))
    # Logarithms may differ in the last place of float64, which rarely survives rounding to float32.
    assert torch.allclose(noise(*on_gpu).cpu(), noise(seeds, positions, tokens), rtol=2e-7, atol=0)
