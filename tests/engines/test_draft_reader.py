"""The draft model's reading and guessing over real attention: as the target would sample, at its own logits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from drafting.draft_model import Guess, Reading
from engines import drawn, sampler
from engines.attention import select_backend
from engines.block_pool import BlockPool
from engines.draft_reader import DraftReader
from engines.kv_cache import KVCacheManager
from engines.loading import LoadedModel
from engines.logits import TokenHistory
from engines.model_runner import ModelRunner
from engines.sampler import Sampler, SampleRow
from engines.sequence import Sequence as EngineSequence
from engines.types import SamplingParams
from tests.engines import tiny_models
from tests.engines.sequences import make_sequence

BLOCK_SIZE = 4
VOCAB = tiny_models.VOCAB_SIZE
TOKENS = [5, 17, 40, 8, 23, 60, 11, 90, 33]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_models.load("llama")


class Desk:
    """A reader, block tables and the sequences on them."""

    def __init__(self, loaded: LoadedModel, vocab_size: int = VOCAB) -> None:
        runner = ModelRunner(loaded, select_backend("torch", CPU), 32, BLOCK_SIZE)
        self.reader = DraftReader(runner, max_position=512, vocab_size=vocab_size, device=CPU)
        self.kv = KVCacheManager(BlockPool(32), BLOCK_SIZE, enable_prefix_caching=True)
        self.sequences: dict[int, EngineSequence] = {}
        self.reader.attach(self.kv, self.sequences)

    def add(self, token_ids: Sequence[int], room: int = 8, seed: int = 0, **sampling: Any) -> EngineSequence:
        """A sequence whose newest token is all that the target has not computed."""
        sequence = make_sequence(list(token_ids))
        params = SamplingParams(max_tokens=50, **sampling)
        object.__setattr__(sequence.request, "sampling", params)
        sequence.seed = seed
        sequence.history = TokenHistory(token_ids)
        assert self.kv.extend(sequence, len(token_ids) + room)
        sequence.num_computed_tokens = len(token_ids) - 1
        self.sequences[sequence.seq_id] = sequence
        return sequence

    def read(self, sequence: EngineSequence, start: int, stop: int, *drafts: int, guesses: bool = True) -> Guess | None:
        return self.reader.read([Reading(sequence.seq_id, start, stop, drafts, guesses)])[0]


def eager(loaded: LoadedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits [1, vocab] after these tokens."""
    loaded.model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits: torch.Tensor = loaded.model(torch.tensor([list(token_ids)])).logits[0, -1:]
    loaded.model.set_attn_implementation("outrider")
    return logits


def expected(loaded: LoadedModel, token_ids: Sequence[int], params: SamplingParams, seed: int, prefix: int = 0) -> int:
    """What the target's rule would sample; the last `prefix` of the tokens are drafts."""
    known = token_ids[: len(token_ids) - prefix]
    row = SampleRow(
        params, seed, len(token_ids), prefix, TokenHistory(known), tuple(token_ids[len(token_ids) - prefix :])
    )
    return Sampler().sample(eager(loaded, token_ids), [row])[0].token_id


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {}, {"top_p": 0.7}, {"frequency_penalty": 2.0, "top_k": 9}])
def test_guesses_follow_the_targets_rule_draft_after_draft(loaded: LoadedModel, fields: dict[str, Any]) -> None:
    desk, params = Desk(loaded), SamplingParams(max_tokens=50, **fields)
    sequence = desk.add(TOKENS, seed=7, **fields)
    drafts: list[int] = []
    start = 0
    for _ in range(6):
        stop = len(TOKENS) + len(drafts)
        guess = desk.read(sequence, start, stop, *drafts)
        assert guess is not None
        assert guess.token_id == expected(loaded, [*TOKENS, *drafts], params, 7, len(drafts))
        drafts.append(guess.token_id)
        start = stop


def test_a_belief_is_the_probability_of_the_guess(loaded: LoadedModel) -> None:
    desk = Desk(loaded)
    guess = desk.read(desk.add(TOKENS, seed=3), 0, len(TOKENS))
    assert guess is not None
    assert guess.belief == pytest.approx(float(eager(loaded, TOKENS).softmax(-1)[0, guess.token_id]), rel=1e-3)


@pytest.mark.parametrize("cuts", [[3], [4], [1, 2, 8], [8]])
def test_reading_in_pieces_is_reading(loaded: LoadedModel, cuts: list[int]) -> None:
    desk = Desk(loaded)
    whole = desk.read(desk.add(TOKENS, seed=1), 0, len(TOKENS))
    sequence = desk.add(TOKENS, seed=1)
    bounds = [0, *cuts, len(TOKENS)]
    for start, stop in itertools.pairwise(bounds[:-1]):
        assert desk.read(sequence, start, stop, guesses=False) is None
        assert desk.reader.num_read(sequence.seq_id) == stop
    last = desk.read(sequence, bounds[-2], bounds[-1])
    assert whole is not None
    assert last is not None
    assert last.token_id == whole.token_id
    assert last.belief == pytest.approx(whole.belief, rel=1e-3)


def test_known_tokens_and_drafts_are_read_in_one_go(loaded: LoadedModel) -> None:
    desk = Desk(loaded)
    guess = desk.read(desk.add(TOKENS, seed=1), 0, len(TOKENS) + 2, 44, 45)
    assert guess is not None
    params = SamplingParams(max_tokens=50)
    assert guess.token_id == expected(loaded, [*TOKENS, 44, 45], params, 1, 2)


def test_the_newest_token_is_always_read_again(loaded: LoadedModel) -> None:
    desk = Desk(loaded)
    sequence = desk.add(TOKENS)
    assert desk.reader.num_read(sequence.seq_id) == 0
    first = desk.read(sequence, 0, len(TOKENS))
    assert desk.reader.num_read(sequence.seq_id) == len(TOKENS) - 1
    again = desk.read(sequence, len(TOKENS) - 1, len(TOKENS))
    assert first is not None
    assert again is not None
    assert again.token_id == first.token_id
    assert again.belief == pytest.approx(first.belief, rel=1e-3)


def test_drafts_that_came_true_are_not_read_again_and_wrong_ones_are(loaded: LoadedModel) -> None:
    for emitted, num_read in (([44, 45, 1], 2), ([44, 1], 1), ([1], 0), ([44], 0), ([44, 45, 46, 47], 3)):
        desk = Desk(loaded)
        sequence = desk.add(TOKENS, seed=2)
        desk.read(sequence, 0, len(TOKENS) + 3, 44, 45, 46)
        sequence.token_ids.extend(emitted)
        assert desk.reader.num_read(sequence.seq_id) == len(TOKENS) + num_read
        guess = desk.read(sequence, len(TOKENS) + num_read, sequence.num_tokens)
        assert guess is not None
        assert guess.token_id == expected(loaded, sequence.token_ids, SamplingParams(max_tokens=50), 2)


def test_sequences_of_one_forward_do_not_mix(loaded: LoadedModel) -> None:
    desk = Desk(loaded)
    long, short, silent = desk.add(TOKENS, seed=1), desk.add(TOKENS[:3], seed=2), desk.add(TOKENS[2:], seed=3)
    guesses = desk.reader.read(
        [
            Reading(silent.seq_id, 0, 2, guesses=False),
            Reading(short.seq_id, 0, 4, (9,)),
            Reading(long.seq_id, 0, len(TOKENS)),
        ]
    )
    params = SamplingParams(max_tokens=50)
    wanted = [None, expected(loaded, [*TOKENS[:3], 9], params, 2, 1), expected(loaded, TOKENS, params, 1)]
    assert [guess and guess.token_id for guess in guesses] == wanted


def test_what_is_no_token_of_the_target_is_never_guessed(loaded: LoadedModel) -> None:
    desk = Desk(loaded, vocab_size=10)
    guesses = [desk.read(desk.add(TOKENS[:5], room=0, seed=seed), 0, 5) for seed in range(12)]
    assert all(guess is not None and guess.token_id < 10 for guess in guesses)


def test_copied_blocks_carry_what_was_read(loaded: LoadedModel) -> None:
    desk = Desk(loaded)
    parent = desk.add(TOKENS, room=0, seed=4)
    desk.read(parent, 0, len(TOKENS), guesses=False)
    parent.num_computed_tokens = len(TOKENS)
    child = make_sequence(list(TOKENS))
    child.seed = 4
    desk.kv.fork(parent, child)
    desk.sequences[child.seq_id] = child
    child.token_ids.append(50)
    assert desk.kv.extend(child, 2)
    copies = desk.kv.take_copies()
    assert len(copies) == 1
    desk.reader.copy_blocks(copies)
    assert desk.reader.num_read(child.seq_id) == len(TOKENS)
    guess = desk.read(child, len(TOKENS), len(TOKENS) + 1)
    assert guess is not None
    assert guess.token_id == expected(loaded, [*TOKENS, 50], SamplingParams(max_tokens=100), 4)


def test_logprobs_are_not_computed_for_guesses(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(drawn, "logprob_rows")
    monkeypatch.delattr(sampler, "logprob_rows")
    desk = Desk(loaded)
    guess = desk.read(desk.add(TOKENS, logprobs=5), 0, len(TOKENS))
    assert guess is not None
    assert guess.token_id == expected(loaded, TOKENS, SamplingParams(max_tokens=50), 0)
