from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafting.prediction import PredictionDrafter
from drafting.protocol import Draft, DraftRequest, Verdict
from drafting.verify import accepted_prefix

PROMPT = [500, 501]
LINES = list(range(100, 140))  # a prediction without repetitions


def draft(drafter: PredictionDrafter, output: list[int], prediction: list[int], max_drafts: int = 4) -> Draft:
    request = DraftRequest(1, PROMPT + output, len(PROMPT), max_drafts, prediction=tuple(prediction))
    return drafter.propose([request])[0]


def after(output: list[int], prediction: list[int], max_drafts: int = 4) -> Draft:
    """The draft of a sequence that emitted `output` token by token."""
    drafter = PredictionDrafter()
    for length in range(len(output)):
        draft(drafter, output[:length], prediction)
    return draft(drafter, output, prediction, max_drafts)


def generate(output: list[int], prediction: list[int], max_drafts: int = 4) -> int:
    """Forwards of the target needed to emit `output` when each verifies a draft."""
    drafter, emitted, num_forwards = PredictionDrafter(), list[int](), 0
    while len(emitted) < len(output):
        rest = output[len(emitted) :]
        token_ids = draft(drafter, emitted, prediction, max_drafts).token_ids[: len(rest) - 1]
        accepted = accepted_prefix(token_ids, rest[: len(token_ids) + 1])
        emitted += rest[: accepted + 1]
        num_forwards += 1
    return num_forwards


def test_the_draft_is_the_prediction_from_its_start() -> None:
    assert after([], LINES).token_ids == (100, 101, 102, 103)
    assert after(LINES[:7], LINES).token_ids == (107, 108, 109, 110)


def test_a_prediction_that_comes_true_costs_a_forward_per_draft() -> None:
    assert generate(LINES, LINES, max_drafts=4) == 8


def test_an_exhausted_prediction_drafts_nothing() -> None:
    assert after(LINES[:-2], LINES).token_ids == (138, 139)
    assert after(LINES, LINES) == Draft()
    assert after([*LINES, 7, 8], LINES) == Draft()


def test_without_prediction_there_is_neither_draft_nor_state() -> None:
    drafter = PredictionDrafter()
    assert draft(drafter, [1], []) == Draft()
    assert draft(drafter, [1], LINES, max_drafts=0) == Draft()
    assert not drafter._cursors


def test_no_draft_while_lost() -> None:
    assert after([100, 101, 7], LINES) == Draft()
    assert after([100, 101, 7, 8, 9], LINES) == Draft()


@pytest.mark.parametrize(
    ("edited", "following"),
    [
        pytest.param([*LINES[:9], 7, *LINES[10:12]], 112, id="replaced"),
        pytest.param([*LINES[:9], 7, 8, *LINES[9:11]], 111, id="inserted"),
        pytest.param([*LINES[:9], *LINES[15:17]], 117, id="deleted"),
        pytest.param([9, *LINES[:2]], 102, id="another start"),
        pytest.param([*LINES[:5], 7, *LINES[5:8], 8, *LINES[9:15], *LINES[18:20]], 120, id="several edits"),
    ],
)
def test_after_an_edit_the_draft_goes_on_behind_it(edited: list[int], following: int) -> None:
    assert after(edited, LINES).token_ids[0] == following


def test_an_output_seen_late_is_found_too() -> None:
    assert draft(PredictionDrafter(), [7, *LINES[20:25]], LINES).token_ids[0] == 125


def test_of_equal_places_the_nearest_ahead_is_taken() -> None:
    prediction = [1, 2, 3, 50, 1, 2, 3, 51, 1, 2, 3, 52]
    assert after([1, 2, 3, 50, 99, 1, 2, 3], prediction).token_ids[0] == 51


def test_text_moved_far_away_or_back_is_found_after_a_few_tokens() -> None:
    prediction = list(range(1000, 1400))
    assert after([*prediction[:10], *prediction[300:302]], prediction) == Draft()
    assert after([*prediction[:10], *prediction[300:304]], prediction).token_ids[0] == 1304
    assert after([*prediction[100:130], *prediction[10:14]], prediction).token_ids[0] == 1014


def test_of_places_far_away_the_next_one_ahead_is_taken_or_else_the_last() -> None:
    moved, rest = [1, 2, 3, 4, 5], list(range(1000, 1400))
    prediction = [*moved, *rest[:100], *moved, *rest[100:300], *moved, *rest[300:]]
    assert after([*rest[:10], *moved], prediction).token_ids[0] == rest[100]
    assert after([*rest[100:150], *moved], prediction).token_ids[0] == rest[300]
    assert after([*rest[300:350], *moved], prediction).token_ids[0] == rest[300]


def test_a_wrong_place_does_not_lose_the_right_one() -> None:
    # The inserted 105 looks like a jump ahead; what follows belongs where we left.
    assert after([*LINES[:3], 7, 105, 8, *LINES[3:5]], LINES).token_ids[0] == 105


def test_beliefs_are_high_from_the_start_low_after_a_resync_and_recover() -> None:
    resynced = [*LINES[:9], 7, LINES[10]]
    start, lost, recovered = after([], LINES), after(resynced, LINES), after([*resynced, *LINES[11:20]], LINES)
    assert start.beliefs[0] > 0.85
    assert lost.beliefs[0] == 0.5
    assert recovered.beliefs[0] > 0.85
    assert after(LINES[:7], LINES).beliefs[0] > after(LINES[:6], LINES).beliefs[0] > start.beliefs[0]
    assert all(low <= high < 1 for low, high in pairwise(lost.beliefs))


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), max_size=30), st.integers(0, 5))
def test_a_draft_is_always_a_piece_of_the_prediction(output: list[int], prediction: list[int], most: int) -> None:
    found = after(output, prediction, most)
    assert len(found.token_ids) == len(found.beliefs) <= most
    pieces = (prediction[i : i + len(found.token_ids)] for i in range(len(prediction) + 1))
    assert any(list(found.token_ids) == piece for piece in pieces)
    assert all(0 < value < 1 for value in found.beliefs)


@given(st.integers(0, 2**16))
def test_a_lightly_edited_prediction_saves_most_forwards(seed: int) -> None:
    rng = random.Random(seed)
    prediction = [rng.randrange(1000) for _ in range(300)]
    output = [rng.randrange(1000) if rng.random() < 0.03 else token_id for token_id in prediction]
    assert generate(output, prediction, max_drafts=8) < 120


def test_a_forgotten_sequence_leaves_nothing() -> None:
    drafter = PredictionDrafter()
    draft(drafter, [], LINES)
    assert drafter._cursors
    drafter.forget(1)
    drafter.forget(1)
    drafter.observe([Verdict(1, [500, 501, 100], 2, 1)])
    assert not drafter._cursors
