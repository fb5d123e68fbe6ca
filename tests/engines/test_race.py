"""Everybody's score and noise, in blocks, or those of the survivors only: the same winner."""

from __future__ import annotations

import math

import pytest
import torch

from drafting.noise import noise
from engines import race
from engines.race import race_all, race_survivors

SCORES = torch.randn(40, 300, generator=torch.Generator().manual_seed(3))
SEEDS, POSITIONS = torch.arange(40), torch.arange(40) * 3


def test_the_best_of_score_and_noise_wins() -> None:
    total = SCORES + noise(SEEDS[:, None], POSITIONS[:, None], torch.arange(300))
    assert torch.equal(race_all(SCORES, SEEDS, POSITIONS), total.argmax(-1))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = race_all(SCORES, SEEDS, POSITIONS)
    monkeypatch.setattr(race, "_BLOCK_ELEMENTS", {"cpu": 64})
    assert torch.equal(race_all(SCORES, SEEDS, POSITIONS), expected)


def test_racing_the_survivors_equals_racing_everyone() -> None:
    floor = SCORES.topk(25).values[:, -1]
    everyone = race_all(SCORES.masked_fill(floor[:, None] > SCORES, -math.inf), SEEDS, POSITIONS)
    assert torch.equal(race_survivors(SCORES, floor, SEEDS, POSITIONS), everyone)
