"""The benchmark's texts are the target's, its drafts the drafter's, and its figures what the two laws imply."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.acceptance import RULES, Positions, compare, law, position_row, step_rows
from benchmarks.target_text import write
from benchmarks.workloads import Prompt
from engines.sampler import Sampler, SampleRow
from tests.benchmarks.tiny_llama import PROMPTS, VOCAB, sampled, tiny_llama


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_p": 0.8}])
def test_a_drafter_equal_to_the_target_is_always_right(settings: dict[str, float]) -> None:
    model, params = tiny_llama(0), sampled(**settings)
    for text in write(model, PROMPTS, params):
        positions = compare(text, model, params)
        assert positions.coupled.eq(1).all()
        torch.testing.assert_close(positions.ratios, torch.ones_like(positions.ratios), rtol=1e-4, atol=1e-4)
        assert positions.total_variation.max() < 1e-4
        assert positions.greedy.eq(1).any()
        assert positions.greedy.eq(0).any()


def test_the_law_is_that_of_the_sampler() -> None:
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)) * 2
    params = sampled(temperature=0.7, top_p=0.8)
    count = 20_000
    rows = [SampleRow(params, seed, 0, 0) for seed in range(count)]
    drawn = torch.tensor([token.token_id for token in Sampler().sample(logits.expand(count, 8), rows)])
    shares = torch.bincount(drawn, minlength=8) / count
    expected = law(logits, params)[0]
    assert expected.eq(0).any()
    torch.testing.assert_close(expected, shares.double(), atol=0.015, rtol=0)
    assert shares[expected == 0].eq(0).all()


@pytest.fixture(scope="module")
def observed() -> list[Positions]:
    """A drafter near the target, along some thousand tokens."""
    target, drafter, params = tiny_llama(0), tiny_llama(0, noise=0.05), sampled(48)
    starts = [Prompt((i % VOCAB, 1 + i // VOCAB)) for i in range(64)]
    return [compare(text, drafter, params) for text in write(target, starts, params)]


def test_the_ratio_test_accepts_one_minus_tv(observed: list[Positions]) -> None:
    """Two estimates of the same: from the ratios of the emitted tokens, and from the whole rows."""
    row = position_row(observed)
    accepted = torch.cat([positions.ratios.clamp(max=1) for positions in observed]).mean().item()
    assert row["positions"] == 64 * 48
    assert 0.3 < row["one_minus_tv"] < 0.97
    assert accepted == pytest.approx(row["one_minus_tv"], abs=0.02)


def test_the_coupling_lies_between_its_floor_and_the_ratio_test(observed: list[Positions]) -> None:
    row = position_row(observed)
    assert row["coupled_floor"] < row["coupled"] + 2 * row["coupled_se"]
    assert row["coupled"] < row["one_minus_tv"] + 2 * row["coupled_se"]
    assert row["greedy"] < row["coupled"]


def test_rows_order_the_rules_and_are_consistent(observed: list[Positions]) -> None:
    rows = {(row["rule"], row["draft_length"]): row for row in step_rows(observed, [1, 4, 8])}
    assert rows.keys() == {(rule, length) for rule in RULES for length in (1, 4, 8)}
    for length in (1, 4, 8):
        assert rows["ratio", length]["beside_ratio_test"] == 1.0
        assert rows["block", length]["tokens_per_step"] >= rows["ratio", length]["tokens_per_step"]
        assert rows["coupled", length]["tokens_per_step"] > rows["greedy", length]["tokens_per_step"]
        for rule in RULES:
            row = rows[rule, length]
            assert 1 <= row["tokens_per_step"] <= length + 1
            assert row["tokens_per_step_se"] > 0
            share = row["tokens_per_step"] / rows["ratio", length]["tokens_per_step"]
            assert row["beside_ratio_test"] == pytest.approx(share, abs=1e-4)
    assert rows["block", 1]["tokens_per_step"] == pytest.approx(rows["ratio", 1]["tokens_per_step"])
    assert rows["block", 8]["beside_ratio_test"] > 1.001


def test_json_is_the_last_line_and_has_a_row_per_setting() -> None:
    options = "--num-prompts 2 --max-tokens 6 --max-draft-length 2 --temperature 0.7,1.0 --top-p 0.95 --json"
    command = [sys.executable, "-m", "benchmarks.acceptance", *options.split()]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    document = json.loads(answer.stdout.splitlines()[-1])
    assert {"commit", "cpu", "torch", "threads"} <= document["environment"].keys()
    settings = {(row["workload"], row["temperature"], row["top_p"]) for row in document["positions"]}
    assert settings == {(workload, heat, 0.95) for workload in ("code", "chat") for heat in (0.7, 1.0)}
    assert len(document["runs"]) == len(settings) * len(RULES) * 2


def test_a_law_without_randomness_is_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.acceptance", "--temperature", "0.7,0"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert "temperature" in answer.stderr
