"""When not to speculate, whatever the estimates say."""

from __future__ import annotations

import itertools
import random

from drafting.pace import Pace


def plain_steps(pace: Pace, num_steps: int) -> list[int]:
    """The steps that have to be plain, of so many that would otherwise all speculate."""
    found = []
    for step in range(num_steps):
        pace.begin_step()
        if pace.is_plain_due:
            found.append(step)
        pace.end_step(was_plain=pace.is_plain_due)
    return found


def looked_at(pace: Pace, seq_id: int, num_steps: int) -> list[int]:
    found = []
    for step in range(num_steps):
        pace.begin_step()
        if not pace.rests(seq_id):
            found.append(step)
            pace.note(seq_id, bought=False)
    return found


def test_early_steps_are_plain_often_and_later_ones_seldom() -> None:
    steps = plain_steps(Pace(is_experienced=False), 300)
    assert steps[:8] == list(range(0, 24, 3))
    assert 3 <= len(steps[8:]) <= 5


def test_a_process_that_knows_its_costs_wastes_no_steps_at_first() -> None:
    assert plain_steps(Pace(is_experienced=True), 130) == [64, 129]


def test_steps_that_were_plain_anyway_count() -> None:
    pace = Pace(is_experienced=True)
    for step in range(500):
        pace.begin_step()
        assert not pace.is_plain_due
        pace.end_step(was_plain=step % 50 == 0)


def test_a_sequence_that_nothing_is_bought_for_is_looked_at_ever_less() -> None:
    steps = looked_at(Pace(is_experienced=True), 3, 400)
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    assert gaps[:3] == [1, 1, 1]
    assert gaps[-10:] == [8] * 10
    assert max(gaps) < 16, "it comes back within tens of steps"


def test_a_purchase_ends_the_rest() -> None:
    pace = Pace(is_experienced=True)
    looked_at(pace, 3, 100)
    pace.note(3, bought=True)
    assert looked_at(pace, 3, 3) == [0, 1, 2]


def test_sequences_rest_on_their_own() -> None:
    pace = Pace(is_experienced=True)
    looked_at(pace, 3, 100)
    assert looked_at(pace, 4, 3) == [0, 1, 2]


def test_the_resting_wake_together() -> None:
    """What a round of the draft model costs is shared by whoever is awake."""
    pace = Pace(is_experienced=True)
    for seq_id in range(16):
        for _ in range(5 * seq_id):
            pace.note(seq_id, bought=False)
    awake = []
    for _ in range(16):
        pace.begin_step()
        awake.append(sum(not pace.rests(seq_id) for seq_id in range(16)))
    assert awake.count(16) == 2


def rested(pace: Pace, num_steps: int, gain: float, num_decodes: int = 8) -> list[bool]:
    found = []
    for _ in range(num_steps):
        pace.begin_step(num_decodes)
        found.append(pace.rests(0))
        if not found[-1]:
            pace.judge(plain_s=gain, spent_s=1.0)
    return found


def test_where_looking_costs_more_than_it_brings_everybody_rests_ever_longer() -> None:
    found = rested(Pace(is_experienced=True), 600, gain=0.95)
    assert found[:6] == [False] * 6
    assert sum(found[-216:]) >= 180, "nine tenths of the time in the end"


def test_the_more_is_lost_the_sooner_it_is_given_up() -> None:
    def num_tried(gain: float) -> int:
        return rested(Pace(is_experienced=True), 400, gain).index(True)

    assert num_tried(0.9) <= 4
    assert 6 <= num_tried(0.95) <= 10
    assert 25 <= num_tried(0.98) <= 40


def test_looking_that_costs_next_to_nothing_goes_on() -> None:
    assert not any(rested(Pace(is_experienced=True), 400, gain=0.992))


def test_drafts_that_are_found_now_and_then_have_time_to_pay() -> None:
    pace = Pace(is_experienced=True)
    for step in range(400):
        pace.begin_step(1)
        assert not pace.rests(0)
        pace.judge(plain_s=1.4 if step % 10 == 9 else 0.98, spent_s=1.0)


def test_drafts_that_pay_well_and_fail_every_other_time_are_not_put_to_rest() -> None:
    pace, draw = Pace(is_experienced=True), random.Random(0)
    num_rests = 0
    for _ in range(4000):
        pace.begin_step(1)
        if pace.rests(0):
            num_rests += 1
        else:
            pace.judge(plain_s=draw.choice((1.0, 2.0)), spent_s=1.15)
    assert num_rests <= 40


def test_what_was_gained_long_ago_is_not_lost_for_long() -> None:
    pace = Pace(is_experienced=True)
    assert not any(rested(pace, 1000, gain=2.0))
    assert rested(pace, 100, gain=0.9).index(True) <= 15
    assert not any(rested(pace := Pace(is_experienced=True), 1000, gain=2.0))
    assert rested(pace, 100, gain=0.95).index(True) <= 35


def test_a_step_that_the_machine_was_held_up_in_decides_nothing() -> None:
    pace = Pace(is_experienced=True)
    pace.judge(plain_s=0.05, spent_s=1.0)
    pace.begin_step()
    assert not pace.rests(0)


def test_what_was_found_out_holds_for_a_load_and_its_drafters() -> None:
    pace = Pace(is_experienced=True)
    while not rested(pace, 1, gain=0.9, num_decodes=32)[0]:
        pass
    assert not any(rested(pace, 5, gain=1.5, num_decodes=8)), "a smaller batch"
    pace.begin_step(32, "another drafter")
    assert not pace.rests(0)
    assert any(rested(pace, 12, gain=0.9, num_decodes=33)), "the same load again"


def test_what_pays_is_never_put_to_rest() -> None:
    assert not any(rested(Pace(is_experienced=True), 200, gain=1.02))


def test_a_batch_that_drains_wakes_at_once() -> None:
    pace = Pace(is_experienced=True)
    while not rested(pace, 1, gain=0.9, num_decodes=32)[0]:
        pass
    assert not any(rested(pace, 5, gain=1.5, num_decodes=8))


def test_nothing_is_left_of_ended_sequences() -> None:
    pace = Pace(is_experienced=True)
    pace.note(1, bought=False)
    pace.forget(1)
    pace.forget(1)
    assert len(pace) == 0
