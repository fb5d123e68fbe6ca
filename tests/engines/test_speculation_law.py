"""The law of whole outputs under speculation is the target's, jointly over positions, with every sampling parameter.

On a vocabulary of 8 the target is a table of all contexts, so that the law of outputs is known by enumeration. 20,000
seeds are verified by the sampler and `accepted_prefix`, vectorised; the engine itself, fed with fewer seeds, is shown
to emit the same tokens seed by seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from drafting.noise import choice_seed
from drafting.protocol import Draft, DraftRequest, Verdict
from drafting.verify import accepted_prefix
from engines.admission import Limits
from engines.batch import RaggedBatch
from engines.core import CoreSettings, EngineCore
from engines.draft_reader import DraftReader
from engines.logits import TokenHistory, needs_history
from engines.sampler import Sampler, SampleRow
from engines.types import GenerateRequest, SamplingParams, TokenPrompt
from tests.chi_square import chi_square_z
from tests.engines.speculating import ScriptedLength, speculating
from tests.engines.tokenizers import word_tokenizer

VOCAB = 8
PROMPT = (3,)
NUM_TOKENS = 3
NUM_SEEDS = 20_000
NUM_CORE_SEEDS = 500
_GROUP = 1000  # seeds at once: few enough for a cache
_BASE = VOCAB + 1
_CPU = torch.device("cpu")
_SAMPLER = Sampler(vocab_size=VOCAB)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.75},
    "min_p": {"min_p": 0.2},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -1.0},
    "repetition": {"repetition_penalty": 1.8},
    "logit_bias": {"logit_bias": {2: 2.0, 5: -100.0}},
    "stop ids": {"stop_token_ids": (1, 6)},
    "min_tokens": {"stop_token_ids": (1, 6), "min_tokens": 2},
    "everything": {"temperature": 1.4, "top_k": 6, "top_p": 0.95, "min_p": 0.02, "logit_bias": {3: 1.0}}
    | {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    | {"stop_token_ids": (6,), "min_tokens": 2},
}
# The size of what the drafter's logits are off, None for drafts at random; and its draft lengths.
DRAFTERS: dict[str, tuple[float | None, tuple[int, ...]]] = {
    "good": (0.5, (2,)),
    "good, 0 to 2 at a time": (0.5, (1, 0, 2)),
    "middling": (2.0, (2,)),
    "bad": (None, (2, 1)),
}


@cache
def table(perturbation: float) -> Tensor:
    """Logits [num_contexts, vocab] of each context; a perturbed table agrees with that of 0.0 in part."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(_BASE**NUM_TOKENS, VOCAB, generator=generator) * 1.5
    return logits + perturbation * torch.randn(logits.shape, generator=generator)


def number(output: Sequence[int]) -> int:
    """The row of a context in a table."""
    row = 0
    for token_id in output:
        row = row * _BASE + token_id + 1
    return row


def params_of(case: str) -> SamplingParams:
    return SamplingParams(**({"max_tokens": NUM_TOKENS, "ignore_eos": True} | CASES[case]))


def next_law(params: SamplingParams, output: tuple[int, ...]) -> NDArray[np.float64]:
    """The target's law of the token after `output`, written down the slow way."""
    scores = table(0.0)[number(output)].double().numpy().copy()
    for token_id, bias in params.logit_bias.items():
        scores[token_id] += bias
    for token_id in range(VOCAB):
        count = output.count(token_id)
        if count or token_id in PROMPT:
            scores[token_id] *= 1 / params.repetition_penalty if scores[token_id] > 0 else params.repetition_penalty
        scores[token_id] -= params.presence_penalty * (count > 0) + params.frequency_penalty * count
    if len(output) < params.min_tokens:
        scores[list(params.stop_token_ids)] = -np.inf
    law = np.exp((scores - scores.max()) / params.temperature)
    law /= law.sum()
    if params.top_k:
        law[law < sorted(law)[-params.top_k]] = 0
        law /= law.sum()
    if params.top_p < 1:
        law[np.array([law[law > one].sum() for one in law]) >= params.top_p] = 0
    law[law < params.min_p * law.max()] = 0
    result: NDArray[np.float64] = law / law.sum()
    return result


def output_law(params: SamplingParams, output: tuple[int, ...] = ()) -> dict[tuple[int, ...], float]:
    """The probability of each whole output that begins with `output`, given that it does."""
    if len(output) == params.max_tokens or (output and output[-1] in params.stop_token_ids):
        return {output: 1.0}
    return {
        whole: float(p) * rest
        for token_id, p in enumerate(next_law(params, output))
        if p > 0
        for whole, rest in output_law(params, (*output, token_id)).items()
    }


def misfit(outputs: Sequence[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """Chi-square of whole outputs, as a number of standard deviations; rare ones are counted together."""
    counts = Counter(outputs)
    if not counts.keys() <= law.keys():
        return float("inf")
    cells: list[list[float]] = [[0.0, 0.0]]
    for output in sorted(law, key=lambda one: -law[one]):
        if cells[-1][1] * len(outputs) >= 8:
            cells.append([0.0, 0.0])
        cells[-1][0] += counts[output]
        cells[-1][1] += law[output]
    total = sum(p for _, p in cells)
    return chi_square_z([count for count, _ in cells], [p / total for _, p in cells])


class Choice:
    """One seed's output in the making."""

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self.params, self.seed = params, seed
        self.output: list[int] = []
        self.history = TokenHistory(PROMPT) if needs_history(params) else None

    @property
    def is_done(self) -> bool:
        return len(self.output) == NUM_TOKENS or (bool(self.output) and self.output[-1] in self.params.stop_token_ids)

    def row(self, prefix: tuple[int, ...]) -> SampleRow:
        num_output = len(self.output) + len(prefix)
        position = len(PROMPT) + num_output
        suppressed = self.params.stop_token_ids if self.params.min_tokens else ()
        return SampleRow(self.params, self.seed, position, num_output, self.history, prefix, suppressed)

    def keep(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if not self.is_done:
                self.output.append(token_id)
                if self.history is not None:
                    self.history.observe(token_id)


def sample(choices: Sequence[tuple[Choice, tuple[int, ...]]], perturbation: float) -> list[int]:
    """The token after each choice's output and a prefix."""
    if not choices:
        return []
    rows = torch.tensor([number((*choice.output, *prefix)) for choice, prefix in choices])
    sampled = _SAMPLER.sample(table(perturbation)[rows], [choice.row(prefix) for choice, prefix in choices])
    return [token.token_id for token in sampled]


def draft(
    choices: Sequence[Choice], perturbation: float | None, length: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """A draft for each choice: coupled samples from a perturbed table, or random tokens."""
    if perturbation is None:
        return [tuple(row) for row in rng.integers(VOCAB, size=(len(choices), length)).tolist()]
    drafts: list[tuple[int, ...]] = [()] * len(choices)
    for _ in range(length):
        guesses = sample(list(zip(choices, drafts, strict=True)), perturbation)
        drafts = [(*one, guess) for one, guess in zip(drafts, guesses, strict=True)]
    return drafts


def speculate(
    params: SamplingParams, seeds: Sequence[int], perturbation: float | None, lengths: Sequence[int]
) -> tuple[list[tuple[int, ...]], int]:
    """Each seed's output by drafting and verifying, and how many drafts were accepted."""
    groups = [seeds[i : i + _GROUP] for i in range(0, len(seeds), _GROUP)]
    results = [_speculate(params, group, perturbation, lengths) for group in groups]
    return [output for outputs, _ in results for output in outputs], sum(accepted for _, accepted in results)


def _speculate(
    params: SamplingParams, seeds: Sequence[int], perturbation: float | None, lengths: Sequence[int]
) -> tuple[list[tuple[int, ...]], int]:
    choices = [Choice(params, seed) for seed in seeds]
    rng, num_accepted = np.random.default_rng(seeds[0] % 2**32), 0
    for turn in range(NUM_TOKENS):
        active = [choice for choice in choices if not choice.is_done]
        # So many drafts that the longest of the contexts is still in the table.
        length = min(lengths[turn % len(lengths)], NUM_TOKENS - 1 - max((len(one.output) for one in active), default=0))
        drafts = draft(active, perturbation, max(0, length), rng)
        rows = [(choice, one[:j]) for choice, one in zip(active, drafts, strict=True) for j in range(len(one) + 1)]
        sampled = iter(sample(rows, 0.0))
        for choice, one in zip(active, drafts, strict=True):
            own = [next(sampled) for _ in range(len(one) + 1)]
            accepted = accepted_prefix(one, own)
            num_accepted += accepted
            choice.keep(own[: accepted + 1])
    return [tuple(choice.output) for choice in choices], num_accepted


@cache
def seeds_of(count: int) -> list[int]:
    """The seeds of so many choices of a request whose own is 5."""
    return [choice_seed(5, index) for index in range(count)]


@pytest.mark.parametrize("drafter", ["good", "bad"])
@pytest.mark.parametrize("case", CASES)
def test_whole_outputs_follow_the_targets_law(case: str, drafter: str) -> None:
    # Each has seeds of its own, so that one unlucky stretch of noise cannot fail them all.
    first = NUM_SEEDS * (2 * list(CASES).index(case) + (drafter == "bad"))
    outputs, num_accepted = speculate(params_of(case), range(first, first + NUM_SEEDS), *DRAFTERS[drafter])
    assert num_accepted > NUM_SEEDS / 20
    assert misfit(outputs, output_law(params_of(case))) < 4


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_good_and_bad_drafters_leave_the_law_and_even_the_outputs(drafter: str) -> None:
    params = params_of("everything")
    outputs, num_accepted = speculate(params, range(NUM_SEEDS // 5), *DRAFTERS[drafter])
    assert outputs[:500] == speculate(params, range(500), None, (0,))[0]
    assert misfit(outputs, output_law(params)) < 4
    assert num_accepted > 0


def test_the_measure_tells_a_wrong_law() -> None:
    outputs, _ = speculate(params_of("plain"), range(NUM_SEEDS), *DRAFTERS["good"])
    for other in ("cold", "presence", "repetition"):
        assert misfit(outputs, output_law(params_of(other))) > 10
    swapped = [(output[1], output[0], *output[2:]) for output in outputs]
    assert misfit(swapped, output_law(params_of("plain"))) > 10, "the same tokens in another order"


class TableRunner:
    """The Runner protocol over a table; contexts are read from the slots."""

    def __init__(self, num_blocks: int, block_size: int, perturbation: float) -> None:
        self._slots = torch.zeros(num_blocks, block_size, dtype=torch.int64)
        self._table = table(perturbation)

    def forward(self, batch: RaggedBatch) -> Tensor:
        self._slots.view(-1)[batch.slot_mapping] = batch.input_ids
        rows, size = batch.logit_rows, batch.block_size
        owners = torch.searchsorted(batch.cu_seqlens_q[1:].long(), rows, right=True)
        numbers = torch.zeros(len(rows), dtype=torch.int64)
        for position in range(len(PROMPT), int(batch.positions.max()) + 1):
            block = batch.block_table[owners, position // size].long()
            known = batch.positions[rows] >= position
            numbers = torch.where(known, numbers * _BASE + self._slots[block, position % size] + 1, numbers)
        return self._table[numbers]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        sources, destinations = zip(*copies, strict=True)
        self._slots[list(destinations)] = self._slots[list(sources)]


class Guessing:
    """Drafts at random."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(1)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        tokens = [tuple(self._rng.integers(VOCAB, size=one.max_drafts).tolist()) for one in requests]
        return [Draft(one, (0.1,) * len(one)) for one in tokens]

    def observe(self, verdicts: Sequence[Verdict]) -> None:
        pass

    def forget(self, seq_id: int) -> None:
        pass


def run_core(params: SamplingParams, drafter: str, count: int) -> tuple[list[tuple[int, ...]], int]:
    """The outputs of `count` choices of one request, from the engine, and how many drafts were accepted."""
    perturbation, lengths = DRAFTERS[drafter]
    num_blocks = 6 * count
    reader = None
    if perturbation is not None:
        runner = TableRunner(num_blocks, 2, perturbation)
        reader = DraftReader(runner, max_position=100, vocab_size=VOCAB, device=_CPU)
    speculation = speculating({} if reader else {"ngram": Guessing()}, ScriptedLength(lengths), reader)
    limits = Limits(max_model_len=12, vocab_size=VOCAB, num_blocks=num_blocks, block_size=2, max_num_seqs=count)
    settings = CoreSettings("table", limits, 8 * count, True, 30.0, frozenset(), _CPU)
    core = EngineCore(settings, TableRunner(num_blocks, 2, 0.0), word_tokenizer(VOCAB), speculation)
    sampling = params.model_copy(update={"seed": 5})
    core.add(0, GenerateRequest("r", TokenPrompt(PROMPT), sampling, n=count), arrival_s=0.0)
    outputs: dict[int, tuple[int, ...]] = {}
    while core.has_work:
        for _, deltas in core.step():
            for delta in deltas:
                outputs[delta.index] = (*outputs.get(delta.index, ()), *delta.token_ids)
    return [outputs[index] for index in range(count)], core.stats().num_accepted_tokens


@pytest.mark.parametrize("case", CASES)
def test_the_engine_emits_what_the_law_was_shown_for(case: str) -> None:
    params = params_of(case)
    drafter = list(DRAFTERS)[(list(CASES).index(case) + 1) % len(DRAFTERS)]
    outputs, num_accepted = run_core(params, drafter, NUM_CORE_SEEDS)
    assert outputs == speculate(params, seeds_of(NUM_CORE_SEEDS), *DRAFTERS[drafter])[0]
    assert num_accepted > NUM_CORE_SEEDS / 50
