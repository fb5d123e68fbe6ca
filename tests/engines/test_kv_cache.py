"""Block tables: prefix sharing, copy-on-write, and nothing left behind."""

from engines.block_pool import BlockPool
from engines.kv_cache import KVCacheManager
from engines.sequence import Sequence
from tests.engines.sequences import make_sequence


def manager(num_blocks: int = 8, block_size: int = 4, caching: bool = True) -> KVCacheManager:
    return KVCacheManager(BlockPool(num_blocks), block_size, enable_prefix_caching=caching)


def compute_all(kv: KVCacheManager, sequence: Sequence) -> None:
    assert kv.extend(sequence, sequence.num_uncomputed_tokens)
    sequence.num_computed_tokens = sequence.num_tokens
    kv.publish(sequence)


def test_a_finished_prompt_is_found_by_the_next_one() -> None:
    kv = manager()
    first = make_sequence(list(range(10)))
    compute_all(kv, first)
    kv.free(first)
    second = make_sequence([*range(8), 77, 78])
    prefix = kv.cached_prefix(second)
    kv.admit(second, prefix)
    assert len(prefix) == 2
    assert second.num_computed_tokens == 8
    assert kv.pool.num_used == 2


def test_a_wholly_cached_prompt_still_computes_its_last_token() -> None:
    kv = manager()
    first = make_sequence(list(range(8)))
    compute_all(kv, first)
    assert len(kv.cached_prefix(make_sequence(list(range(8))))) == 1


def test_another_salt_finds_nothing() -> None:
    kv = manager()
    first = make_sequence(list(range(9)), salt="tenant-a")
    compute_all(kv, first)
    assert kv.cached_prefix(make_sequence(list(range(9)), salt="tenant-b")) == []
    assert len(kv.cached_prefix(make_sequence(list(range(9)), salt="tenant-a"))) == 2


def test_caching_off_finds_and_publishes_nothing() -> None:
    kv = manager(caching=False)
    first = make_sequence(list(range(9)))
    compute_all(kv, first)
    assert kv.cached_prefix(make_sequence(list(range(9)))) == []
    assert kv.pool.num_cached == 0


def test_only_full_blocks_are_published() -> None:
    kv = manager()
    sequence = make_sequence(list(range(7)))
    compute_all(kv, sequence)
    assert kv.pool.num_cached == 1


def test_blocks_of_unverified_tokens_are_not_published() -> None:
    kv = manager()
    sequence = make_sequence(list(range(7)))
    assert kv.extend(sequence, 12)  # seven known tokens and five drafts
    sequence.num_computed_tokens = 7  # all drafts rejected
    kv.publish(sequence)
    assert kv.pool.num_cached == 1


def test_extend_changes_nothing_when_blocks_are_short() -> None:
    kv = manager(num_blocks=2)
    sequence = make_sequence(list(range(9)))
    assert not kv.extend(sequence, 9)
    assert len(sequence.block_table) == 0
    assert kv.pool.num_free == 2


def test_a_fork_copies_the_shared_partial_block_before_it_writes() -> None:
    kv = manager()
    parent, child = make_sequence(list(range(6))), make_sequence(list(range(6)))
    compute_all(kv, parent)
    kv.fork(parent, child)
    assert list(child.block_table) == list(parent.block_table)
    shared = parent.block_table[1]
    child.token_ids.append(50)
    parent.token_ids.append(60)
    assert kv.extend(child, 1)
    assert kv.extend(parent, 1)
    assert kv.take_copies() == [(shared, child.block_table[1])], "the last holder writes in place"
    assert parent.block_table[1] == shared
    assert parent.block_table[0] == child.block_table[0]
    assert kv.take_copies() == []


def test_a_fork_does_not_inherit_the_hash_of_its_parents_own_token() -> None:
    kv = manager()
    parent, child = make_sequence(list(range(7))), make_sequence(list(range(7)))
    assert kv.extend(parent, 7)
    parent.num_computed_tokens = 7
    parent.token_ids.append(60)
    kv.publish(parent)  # hashes are known for eight tokens now
    kv.fork(parent, child)
    child.token_ids.append(50)
    assert kv.extend(child, 1)
    child.num_computed_tokens = 8
    kv.publish(child)
    assert kv.cached_prefix(make_sequence([*range(7), 60, 0])) == [child.block_table[0]]
    assert kv.cached_prefix(make_sequence([*range(7), 50, 0])) == list(child.block_table)


def test_can_hold_counts_free_prefix_blocks_once() -> None:
    kv = manager(num_blocks=3)
    first = make_sequence(list(range(9)))
    compute_all(kv, first)
    kv.free(first)
    second = make_sequence(list(range(9)))
    prefix = kv.cached_prefix(second)
    assert kv.can_hold(second, prefix, promised=0)
    assert not kv.can_hold(second, prefix, promised=1)


def test_spare_blocks_go_back_with_what_the_draft_model_read_into_them() -> None:
    kv = manager()
    sequence = make_sequence(list(range(6)))
    assert kv.extend(sequence, 14)  # six known tokens and eight drafts: four blocks
    sequence.num_computed_tokens = 5
    kv.note_drafted(sequence, 11, (70, 71, 72, 73, 74, 75, 76, 77))
    assert sequence.draft_tail == (70, 71, 72, 73, 74)
    kv.give_back_spare([sequence])
    assert (len(sequence.block_table), kv.pool.num_used) == (2, 2)
    assert sequence.draft_tail == (70, 71), "positions 6 and 7 are still its own"
    sequence.token_ids += [70, 71, 72]
    assert kv.drafted(sequence) == 8
    kv.give_back_spare([sequence])
    assert kv.pool.num_used == 2


def test_what_the_draft_model_read_for_another_sequence_is_not_read_again() -> None:
    kv = manager()
    first, second = make_sequence(list(range(14))), make_sequence(list(range(14)))
    compute_all(kv, first)
    kv.admit(second, kv.cached_prefix(second))
    compute_all(kv, second)
    assert kv.drafted(first) == kv.drafted(second) == 0
    kv.note_drafted(first, 13, ())
    assert kv.drafted(first) == 13
    assert kv.drafted(second) == 12, "three blocks are shared, the rest is its own"
    kv.note_drafted(second, 14, (50,))
    assert kv.drafted(second) == 14


def test_freeing_returns_every_block() -> None:
    kv = manager()
    parent, child = make_sequence(list(range(6))), make_sequence(list(range(6)))
    compute_all(kv, parent)
    kv.fork(parent, child)
    kv.free(parent)
    assert kv.pool.num_used == 2
    kv.free(child)
    assert kv.pool.num_used == 0


class TestDrafted:
    """What the draft model has read, in the sequence's own blocks."""

    def decoding(self, kv: KVCacheManager, prompt: list[int], room: int = 8) -> Sequence:
        """A sequence whose prompt is computed and whose next `room` positions are writable."""
        sequence = make_sequence(prompt)
        compute_all(kv, sequence)
        assert kv.extend(sequence, room)
        return sequence

    def test_nothing_is_read_at_first(self) -> None:
        kv = manager()
        assert kv.drafted(self.decoding(kv, [1, 2, 3, 4, 5])) == 0

    def test_known_tokens_that_were_read_count(self) -> None:
        kv = manager()
        sequence = self.decoding(kv, [1, 2, 3, 4, 5])
        kv.note_drafted(sequence, 3, ())
        assert kv.drafted(sequence) == 3
        kv.note_drafted(sequence, 5, ())
        assert kv.drafted(sequence) == 5

    def test_guesses_count_as_far_as_they_came_true(self) -> None:
        for emitted, expected in (([7, 8, 9], 8), ([7, 8, 0], 7), ([7], 6), ([0], 5), ([], 5), ([0, 8, 9], 5)):
            kv = manager()
            sequence = self.decoding(kv, [1, 2, 3, 4, 5])
            kv.note_drafted(sequence, 8, (7, 8, 9))
            sequence.token_ids.extend(emitted)
            assert kv.drafted(sequence) == expected
            assert kv.drafted(sequence) == expected, "asking changes nothing"

    def test_guesses_beyond_what_is_known_may_still_come_true(self) -> None:
        kv = manager()
        sequence = self.decoding(kv, [1, 2, 3, 4, 5])
        kv.note_drafted(sequence, 8, (7, 8, 9))
        counts = []
        for token in (7, 8, 9, 1):
            sequence.token_ids.append(token)
            counts.append(kv.drafted(sequence))
        assert counts == [6, 7, 8, 8]

    def test_a_guess_after_a_wrong_one_never_counts(self) -> None:
        kv = manager()
        sequence = self.decoding(kv, [1, 2, 3, 4, 5])
        kv.note_drafted(sequence, 8, (7, 8, 9))
        sequence.token_ids.append(0)
        assert kv.drafted(sequence) == 5
        sequence.token_ids.extend([8, 9])
        assert kv.drafted(sequence) == 5
        sequence.token_ids[5:] = [7, 8, 9]
        assert kv.drafted(sequence) == 5, "it was forgotten when it was known to be wrong"

    def test_of_more_guesses_than_were_read_only_those_count(self) -> None:
        kv = manager()
        sequence = self.decoding(kv, [1, 2, 3, 4, 5])
        kv.note_drafted(sequence, 6, (7, 8, 9))
        sequence.token_ids.extend([7, 8, 9])
        assert kv.drafted(sequence) == 6

    def test_full_blocks_are_marked_for_others_once_all_their_tokens_are_true(self) -> None:
        kv = manager()
        sequence = self.decoding(kv, [1, 2, 3, 4, 5])
        kv.note_drafted(sequence, 8, (7, 8, 9))
        sequence.token_ids.extend([7, 8])
        kv.drafted(sequence)
        assert [kv.pool.is_drafted(block) for block in sequence.block_table[:2]] == [True, False]
        sequence.token_ids.append(9)
        kv.drafted(sequence)
        assert kv.pool.is_drafted(sequence.block_table[1])

    def test_a_prefix_hit_counts_up_to_the_first_block_that_was_not_read(self) -> None:
        tokens = list(range(12))
        for num_read, expected in ((0, 0), (3, 0), (4, 4), (9, 8), (12, 8)):
            kv = manager()
            first = self.decoding(kv, tokens, room=0)
            kv.note_drafted(first, num_read, ())
            kv.publish(first)
            kv.free(first)
            second = make_sequence([*tokens[:8], 50, 51])
            kv.admit(second, kv.cached_prefix(second))
            assert second.num_computed_tokens == 8
            assert kv.drafted(second) == expected

    def test_a_hole_in_what_was_read_ends_it(self) -> None:
        kv = manager()
        first = self.decoding(kv, list(range(9)), room=0)
        kv.pool.set_drafted(first.block_table[1])
        second = make_sequence(list(range(9)))
        kv.admit(second, kv.cached_prefix(second))
        assert kv.drafted(second) == 0

    def test_a_block_handed_out_again_was_not_read(self) -> None:
        kv = manager(num_blocks=2)
        first = self.decoding(kv, list(range(8)), room=0)
        kv.note_drafted(first, 8, ())
        kv.publish(first)
        kv.free(first)
        other = self.decoding(kv, [9] * 8, room=0)
        assert not any(kv.pool.is_drafted(block) for block in other.block_table)
        assert kv.drafted(other) == 0

    def test_a_fork_inherits_what_was_read_of_the_shared_tokens_and_no_guesses(self) -> None:
        kv = manager()
        parent = self.decoding(kv, [1, 2, 3, 4, 5, 6], room=0)
        kv.note_drafted(parent, 7, (50,))
        parent.token_ids.append(50)
        child = make_sequence([1, 2, 3, 4, 5, 6])
        kv.fork(parent, child)
        child.token_ids.append(50)
        assert (kv.drafted(parent), kv.drafted(child)) == (7, 6)

    def test_freeing_forgets_it(self) -> None:
        kv = manager(caching=False)
        sequence = self.decoding(kv, [7, 8, 3, 4, 5])
        kv.note_drafted(sequence, 7, (7, 8))
        kv.free(sequence)
        compute_all(kv, sequence)
        assert kv.drafted(sequence) == 0, "nor is an old guess taken for the first tokens"
