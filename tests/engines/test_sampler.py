from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engines import race
from engines import sampler as module
from engines.logits import TokenHistory
from engines.sampler import Sampler, SampleRow
from engines.types import SamplingParams
from tests.chi_square import chi_square_z
from tests.engines.fake_device import FakeDevice

INF = math.inf
VOCAB = 8
LOGITS = [1.5, -0.5, 2.0, 0.0, -2.0, 1.0, -INF, 2.0]
PROMPT, OUTPUT, DRAFTS = (0, 1, 5), (2, 2, 1), (7, 2)


def _params(**fields: Any) -> SamplingParams:
    return SamplingParams.model_validate({"max_tokens": 10, **fields})


def _history() -> TokenHistory:
    history = TokenHistory(PROMPT)
    for token_id in OUTPUT:
        history.observe(token_id)
    return history


def _row(seed: int = 0, position: int = 20, num_output: int = 3, **fields: Any) -> SampleRow:
    return SampleRow(_params(**fields), seed, position, num_output, _history())


def _ids(logits: torch.Tensor, rows: list[SampleRow]) -> list[int]:
    return [token.token_id for token in Sampler().sample(logits, rows)]


def _law(row: SampleRow) -> NDArray[np.float64]:
    """The law of LOGITS under the row's parameters, written down the slow way."""
    params, scores = row.params, np.array(LOGITS)
    output = [*OUTPUT, *row.draft_prefix]
    for token_id, bias in params.logit_bias.items():
        scores[token_id] += bias
    for token_id in range(VOCAB):
        if token_id in output or token_id in PROMPT:
            factor = params.repetition_penalty
            scores[token_id] *= 1 / factor if scores[token_id] > 0 else factor
        count = output.count(token_id)
        scores[token_id] -= params.presence_penalty * (count > 0) + params.frequency_penalty * count
    if row.num_output < params.min_tokens:
        scores[list(row.suppressed)] = -INF
    law = np.exp((scores - scores.max()) / params.temperature)
    law /= law.sum()
    if params.top_k:
        law[law < sorted(law)[-min(params.top_k, VOCAB)]] = 0
        law /= law.sum()
    if params.top_p < 1:
        better = np.array([law[law > p].sum() for p in law])
        law[better >= params.top_p] = 0
        law /= law.sum()
    law[law < params.min_p * law.max()] = 0
    result: NDArray[np.float64] = law / law.sum()
    return result


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 3},
    "top_k_ties": {"top_k": 2, "logit_bias": {5: 0.5}},
    "top_p": {"top_p": 0.75},
    "min_p": {"min_p": 0.2},
    "bias": {"logit_bias": {4: 5.0, 2: -100.0, 6: 50.0}},
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 1.2},
    "frequency": {"frequency_penalty": -0.7},
    "min_tokens": {"min_tokens": 4},
    "everything": {"temperature": 1.7, "top_k": 6, "top_p": 0.9, "min_p": 0.05, "logit_bias": {3: 1.0}}
    | {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2, "min_tokens": 9},
}


@pytest.mark.parametrize("drafts", [(), DRAFTS], ids=["committed", "drafted"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_follow_the_law(case: str, drafts: tuple[int, ...]) -> None:
    row = replace(_row(**CASES[case]), draft_prefix=drafts, suppressed=(2, 3))
    num = 4000
    # Each case has seeds of its own, so that one unlucky stretch of noise cannot fail them all.
    first = (list(CASES).index(case) * 2 + bool(drafts)) * num
    ids = _ids(torch.tensor([LOGITS]).expand(num, VOCAB), [replace(row, seed=first + i) for i in range(num)])
    law = _law(row)
    assert chi_square_z(np.bincount(ids, minlength=VOCAB).tolist(), law.tolist()) < 4


def test_successive_positions_are_independent() -> None:
    num = 4000
    logits = torch.tensor([LOGITS]).expand(num, VOCAB)
    first, second = (np.array(_ids(logits, [_row(i, position) for i in range(num)])) for position in (8, 9))
    law = _law(_row())
    joint = np.bincount(first * VOCAB + second, minlength=VOCAB * VOCAB)
    assert chi_square_z(joint.tolist(), np.outer(law, law).flatten().tolist()) < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1e-9}, {"top_k": 1}, {"top_p": 0}])
def test_greedy(fields: dict[str, Any], dtype: torch.dtype) -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = [int(np.argmax(row)) for row in logits.float().numpy()]
    assert _ids(logits, [_row(i, **fields) for i in range(50)]) == expected
    # The same through the path of rows with processors.
    assert _ids(logits, [_row(i, logit_bias={0: 0.0}, **fields) for i in range(50)]) == expected


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert _ids(torch.tensor([LOGITS]), [_row(temperature=0)]) == [2]
    assert _ids(torch.zeros(1, 5), [_row(top_k=1)]) == [0]


def test_a_low_temperature_comes_out_greedy_where_there_is_a_best() -> None:
    logits = torch.randn(200, 100, generator=torch.Generator().manual_seed(1))
    rows = [_row(i, temperature=1.1e-5) for i in range(200)]
    assert _ids(logits, rows) == logits.argmax(1).tolist()


def _random_row(rng: np.random.Generator) -> SampleRow:
    options: list[dict[str, Any]] = [{}, {"temperature": 0}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}]
    options += [{"top_k": 50, "top_p": 0.5}, {"repetition_penalty": 1.3, "top_p": 0.9}, {"logit_bias": {1: 3}}]
    options += [{"temperature": 0, "frequency_penalty": 1}, {"min_tokens": 9, "temperature": 0.7}]
    fields = options[rng.integers(len(options))] | {"logprobs": [None, 0, 3, 20][rng.integers(4)]}
    row = _row(int(rng.integers(2**62)), int(rng.integers(10_000)), **fields)
    return replace(row, suppressed=(0, 1), draft_prefix=tuple(rng.integers(20, size=rng.integers(3)).tolist()))


@pytest.mark.parametrize(("vocab", "dtype"), [(700, torch.bfloat16), (5001, torch.float32), (70_001, torch.float32)])
def test_a_row_reads_the_same_alone_and_in_any_batch(vocab: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(vocab)
    num = 24 if vocab < 10_000 else 8
    rows = [_random_row(rng) for _ in range(num)]
    logits = (torch.randn(num, vocab, generator=torch.Generator().manual_seed(vocab)) * 3).to(dtype)
    together = Sampler().sample(logits, rows)
    for i, row in enumerate(rows):
        assert Sampler().sample(logits[i : i + 1], [row]) == [together[i]], "bitwise, logprobs included"
    for _ in range(4):
        some = rng.permutation(num)[: rng.integers(2, num)]
        batch = Sampler().sample(logits[torch.from_numpy(some)], [rows[i] for i in some])
        assert batch == [together[i] for i in some]


def test_blocks_and_groups_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [_random_row(np.random.default_rng(i)) for i in range(30)]
    logits = torch.randn(30, 500, generator=torch.Generator().manual_seed(2))
    expected = Sampler().sample(logits, rows)
    monkeypatch.setattr(module, "_GROUP_ELEMENTS", {"cpu": 1300})
    monkeypatch.setattr(race, "_BLOCK_ELEMENTS", {"cpu": 64})
    assert Sampler().sample(logits, rows) == expected


def test_seed_and_position_decide() -> None:
    logits = torch.zeros(1, 1000)
    tokens = {_ids(logits, [_row(seed, position)])[0] for seed in range(5) for position in range(5)}
    assert len(tokens) > 15
    assert _ids(logits, [_row(2**64 - 1)]) == _ids(logits, [_row(-1)])


def test_padding_beyond_the_vocabulary_is_never_drawn() -> None:
    logits = torch.zeros(64, 10)
    logits[:, 8:] = 50.0
    rows = [_row(i, logprobs=20) if i % 2 else _row(i, temperature=0) for i in range(64)]
    tokens = Sampler(vocab_size=8).sample(logits, rows)
    assert max(token.token_id for token in tokens) < 8
    assert tokens[1].logprob is not None
    assert sorted(tokens[1].logprob.top_ids) == list(range(8))
    assert tokens[1].logprob.logprob == pytest.approx(-math.log(8))


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.tensor([LOGITS] * 3)
    rows = [_row(temperature=0, logprobs=3, logit_bias={4: 100.0}), _row(), _row(temperature=0.1, top_k=2, logprobs=0)]
    forced, silent, bare = Sampler().sample(logits, rows)
    raw = torch.log_softmax(torch.tensor(LOGITS), 0).tolist()
    assert forced.token_id == 4
    assert forced.logprob is not None
    assert forced.logprob.logprob == pytest.approx(raw[4])
    assert forced.logprob.top_ids == (2, 7, 0), "equals in order of their ids"
    assert forced.logprob.top_logprobs == pytest.approx((raw[2], raw[7], raw[0]))
    assert silent.logprob is None
    assert bare.logprob is not None
    assert bare.logprob.top_ids == ()


@pytest.mark.parametrize("fields", [{}, {"temperature": 0}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 2}])
def test_a_row_without_any_legal_token_emits_token_0(fields: dict[str, Any]) -> None:
    row = replace(_row(min_tokens=9, **fields), suppressed=tuple(range(4)))
    assert _ids(torch.randn(1, 4), [row]) == [0]


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.5}, {"top_k": 2, "min_p": 0.1}, {"temperature": 0}])
def test_broken_logits_stay_in_the_vocabulary(fields: dict[str, Any]) -> None:
    logits = torch.tensor([[math.nan] * 4, [INF, INF, 0, 0], [1, math.nan, 0, -INF]])
    ids = _ids(logits, [_row(i, **fields) for i in range(3)])
    assert all(0 <= token_id < 4 for token_id in ids)


def test_suppression_ends_with_min_tokens() -> None:
    logits = torch.tensor([[0.0, 9.0]] * 2)
    rows = [replace(_row(temperature=0, min_tokens=3, num_output=n), suppressed=(1,)) for n in (2, 3)]
    assert _ids(logits, rows) == [0, 1]


def test_the_callers_logits_stay_as_they_are() -> None:
    logits = torch.tensor([LOGITS] * len(CASES))
    Sampler().sample(logits, [replace(_row(**fields), suppressed=(2,)) for fields in CASES.values()])
    assert logits.tolist() == [LOGITS] * len(CASES)


def test_no_rows() -> None:
    assert Sampler().sample(torch.empty(0, 5), []) == []


@pytest.mark.parametrize("group_elements", [2**26, 1500], ids=["one group", "groups"])
@pytest.mark.parametrize("seed", range(4))
def test_on_a_device_rows_of_every_kind_wait_for_one_read_only(
    seed: int, group_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GROUP_ELEMENTS_ELSEWHERE", group_elements)
    rng = np.random.default_rng(seed)
    rows = [_random_row(rng) for _ in range(24)]
    logits = torch.randn(24, 500, generator=torch.Generator().manual_seed(seed)) * 3
    with FakeDevice() as device:
        drawn = Sampler(vocab_size=490).draw(device.hold(logits), rows)
        assert device.num_reads == 0
        tokens = drawn.read()
    assert device.num_reads == 1
    expected = Sampler(vocab_size=490).sample(logits, rows)
    assert [token.token_id for token in tokens] == [token.token_id for token in expected]
    assert [token.logprob for token in tokens] == [token.logprob for token in expected]


@pytest.mark.parametrize("num_kinds", [1, 3])
def test_on_a_device_sampled_rows_are_sent_their_numbers_together(num_kinds: int) -> None:
    kinds: list[dict[str, Any]] = [{}, {"top_p": 0.9, "top_k": 30, "min_p": 0.01}, {"temperature": 0.0}]
    rows = [_row(i, **kinds[i % num_kinds]) for i in range(6)]
    with FakeDevice() as device:
        Sampler().draw(device.hold(torch.randn(6, 100)), rows)
    # Alone: temperatures, seeds and positions. Else also: which rows are not greedy, and what filters them.
    assert device.num_sent == {1: 1, 3: 3}[num_kinds]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_samples_the_same_tokens() -> None:
    rng = np.random.default_rng(0)
    rows = [_random_row(rng) for _ in range(64)]
    logits = torch.randn(64, 32_000, generator=torch.Generator().manual_seed(4)) * 3
    on_cpu, on_gpu = (_ids(logits.to(device), rows) for device in ("cpu", "cuda"))
    # A nucleus whose border falls between devices' roundings may differ by one token.
    assert sum(a != b for a, b in zip(on_cpu, on_gpu, strict=True)) <= 1
