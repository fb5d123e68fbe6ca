"""Who runs, with how much, and who has to wait."""

from __future__ import annotations

from engines.block_pool import BlockPool
from engines.kv_cache import KVCacheManager
from engines.scheduler import Scheduled, Scheduler, StepPlan
from engines.sequence import Sequence, Status
from tests.engines.sequences import make_sequence


def make_scheduler(
    num_blocks: int = 64, *, max_num_seqs: int = 4, budget: int = 16, block_size: int = 4, drafts: int = 0
) -> Scheduler:
    kv = KVCacheManager(BlockPool(num_blocks), block_size, enable_prefix_caching=True)

    def wanted(items: list[Scheduled]) -> dict[int, int]:
        return {item.sequence.seq_id: drafts for item in items if item.sequence.is_decoding}

    return Scheduler(kv, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, drafts_wanted=wanted)


def advance(scheduler: Scheduler, plan: StepPlan, token: int = 99) -> None:
    for item in plan.scheduled:
        scheduler.advance(item, [token] if item.reaches_end else [], 0)


def counts(plan: StepPlan) -> dict[int, int]:
    return {item.sequence.seq_id: item.num_tokens for item in plan.scheduled}


def prompt(length: int, first: int = 0) -> list[int]:
    return [first * 1000 + i for i in range(length)]


def test_a_long_prompt_is_prefilled_in_chunks_beside_decodes() -> None:
    scheduler = make_scheduler(budget=8)
    short, long = make_sequence(prompt(3, 1)), make_sequence(prompt(12, 2))
    scheduler.add(short)
    scheduler.add(long)
    seen = []
    for _ in range(3):
        plan = scheduler.schedule()
        seen.append(counts(plan))
        advance(scheduler, plan)
    assert seen == [
        {short.seq_id: 3, long.seq_id: 5},
        {short.seq_id: 1, long.seq_id: 7},
        {short.seq_id: 1, long.seq_id: 1},
    ]


def test_room_for_rejected_drafts_keeps_nobody_waiting() -> None:
    scheduler = make_scheduler(num_blocks=5, drafts=8)
    drafting, waiting = make_sequence(prompt(3, 1)), make_sequence(prompt(9, 2))
    scheduler.add(drafting)
    for _ in range(2):
        advance(scheduler, scheduler.schedule())
    assert len(drafting.block_table) == 3, "one for what is known, and room for eight drafts"
    scheduler.add(waiting)
    assert counts(scheduler.schedule())[waiting.seq_id] == 9


def test_the_budget_is_never_exceeded_and_never_wasted() -> None:
    scheduler = make_scheduler(budget=8)
    for first in range(4):
        scheduler.add(make_sequence(prompt(7, first)))
    used = []
    for _ in range(4):
        plan = scheduler.schedule()
        used.append(plan.num_tokens)
        advance(scheduler, plan)
    assert used == [8, 8, 8, 4 + 4]


def test_first_come_first_served_within_priority() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    late, early, urgent = make_sequence([1], order=2.0), make_sequence([2], order=1.0), make_sequence([3], order=-30.0)
    for sequence in (late, early, urgent):
        scheduler.add(sequence)
    served = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        served.append(plan.scheduled[0].sequence)
        scheduler.finish([plan.scheduled[0].sequence])
    assert served == [urgent, early, late]


def test_the_head_of_the_queue_is_not_overtaken_by_a_smaller_request() -> None:
    scheduler = make_scheduler(num_blocks=4, budget=64)
    running, big, small = make_sequence(prompt(8, 1)), make_sequence(prompt(12, 2)), make_sequence(prompt(2, 3))
    for sequence in (running, big, small):
        scheduler.add(sequence)
    assert counts(scheduler.schedule()) == {running.seq_id: 8}
    assert (big.status, small.status) == (Status.WAITING, Status.WAITING)


def test_admission_counts_what_running_prefills_have_still_to_take() -> None:
    scheduler = make_scheduler(num_blocks=4, budget=8)
    first, second = make_sequence(prompt(12, 1)), make_sequence(prompt(8, 2))
    scheduler.add(first)
    advance(scheduler, scheduler.schedule())
    scheduler.add(second)
    plan = scheduler.schedule()  # first needs its third block, which leaves one of the two that second needs
    assert counts(plan) == {first.seq_id: 4}


def test_out_of_blocks_preempts_the_youngest_and_computes_it_again() -> None:
    scheduler = make_scheduler(num_blocks=4, budget=16)
    old, young = make_sequence(prompt(7, 1)), make_sequence(prompt(7, 2))
    scheduler.add(old)
    scheduler.add(young)
    advance(scheduler, scheduler.schedule())
    for _ in range(3):
        plan = scheduler.schedule()
        advance(scheduler, plan)
    assert young.status is Status.WAITING
    assert young.num_preemptions == 1
    assert counts(plan) == {old.seq_id: 1}
    scheduler.finish([old])
    plan = scheduler.schedule()
    assert plan.scheduled[0].sequence is young
    assert young.num_computed_tokens == 4, "its first block was still in the prefix cache"


def test_a_sequence_that_is_the_youngest_preempts_itself() -> None:
    scheduler = make_scheduler(num_blocks=3, budget=16)
    young, old = make_sequence(prompt(4, 1), order=2.0), make_sequence(prompt(4, 2), order=1.0)
    scheduler.add(young)
    scheduler.add(old)
    advance(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert counts(plan) == {old.seq_id: 1}
    assert young.status is Status.WAITING


def test_a_preempted_sequence_keeps_its_place() -> None:
    scheduler = make_scheduler(num_blocks=4, budget=16)
    old, young, newcomer = (make_sequence(prompt(7, i)) for i in range(3))
    scheduler.add(old)
    scheduler.add(young)
    advance(scheduler, scheduler.schedule())
    scheduler.add(newcomer)
    for _ in range(3):
        advance(scheduler, scheduler.schedule())
    scheduler.finish([old])
    assert scheduler.schedule().scheduled[0].sequence is young


def test_slots_are_reserved_for_choices_that_fork_later() -> None:
    scheduler = make_scheduler(max_num_seqs=4)
    forking, other, last = make_sequence([1], forks=2), make_sequence([2]), make_sequence([3])
    for sequence in (forking, other, last):
        scheduler.add(sequence)
    plan = scheduler.schedule()
    assert counts(plan) == {forking.seq_id: 1, other.seq_id: 1}
    advance(scheduler, plan)
    child = make_sequence([1])
    scheduler.fork(forking, child)
    assert child.num_computed_tokens == 1
    assert scheduler.num_running == 3


def test_drafts_take_only_what_budget_is_left() -> None:
    scheduler = make_scheduler(budget=6, drafts=4)
    first, second = make_sequence([1]), make_sequence([2])
    scheduler.add(first)
    scheduler.add(second)
    plan = scheduler.schedule()
    assert [item.num_drafts for item in plan.scheduled] == [0, 0], "no drafts before the prompt is computed"
    advance(scheduler, plan)
    assert [item.num_drafts for item in scheduler.schedule().scheduled] == [4, 0]


def test_room_for_rejected_drafts_is_given_back_before_anybody_is_preempted() -> None:
    scheduler = make_scheduler(num_blocks=6, budget=32, drafts=8)
    first, second = make_sequence(list(range(3))), make_sequence(list(range(3)))
    scheduler.add(first)
    scheduler.add(second)
    advance(scheduler, scheduler.schedule())
    for _ in range(6):
        plan = scheduler.schedule()
        assert plan.num_preempted == 0
        for item in plan.scheduled:
            scheduler.advance(item, [99], num_accepted_drafts=0)
    assert first.num_tokens == second.num_tokens == 10


def test_drafts_never_preempt() -> None:
    scheduler = make_scheduler(num_blocks=2, budget=16, drafts=4)
    first, second = make_sequence([1]), make_sequence([2])
    scheduler.add(first)
    scheduler.add(second)
    advance(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert plan.num_preempted == 0
    assert [item.num_drafts for item in plan.scheduled] == [0, 0]


def test_rejected_drafts_are_not_computed_tokens() -> None:
    scheduler = make_scheduler(drafts=3)
    sequence = make_sequence(prompt(4))
    scheduler.add(sequence)
    advance(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    scheduler.advance(plan.scheduled[0], [7, 8], num_accepted_drafts=1)
    assert sequence.num_computed_tokens == 6
    assert sequence.token_ids[4:] == [99, 7, 8]
    assert sequence.is_decoding


def test_a_stop_inside_an_accepted_run_leaves_no_computed_token_that_is_not_known() -> None:
    scheduler = make_scheduler(drafts=3)
    sequence = make_sequence(prompt(4))
    scheduler.add(sequence)
    advance(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    scheduler.advance(plan.scheduled[0], [7], num_accepted_drafts=3)
    assert sequence.num_computed_tokens == sequence.num_tokens == 6


def test_finishing_waiting_and_running_sequences_frees_everything() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = make_sequence([1, 2]), make_sequence([3])
    scheduler.add(running)
    scheduler.add(waiting)
    advance(scheduler, scheduler.schedule())
    scheduler.finish([running, waiting])
    scheduler.finish([running])
    assert not scheduler.has_work
    assert running.status is waiting.status is Status.FINISHED


def test_nobody_starves_under_a_stream_of_newcomers() -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_seqs=2, budget=8)
    patient: Sequence = make_sequence(prompt(14, 1), order=0.5)
    for i in range(40):
        scheduler.add(make_sequence(prompt(5, 2 + i), order=float(i)))
        if i == 1:
            scheduler.add(patient)
        plan = scheduler.schedule()
        advance(scheduler, plan)
        scheduler.finish([s for s in scheduler.running if s is not patient and s.num_output_tokens > 3])
    assert patient.num_output_tokens > 3
