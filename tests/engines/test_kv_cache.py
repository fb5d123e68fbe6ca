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


def test_freeing_returns_every_block() -> None:
    kv = manager()
    parent, child = make_sequence(list(range(6))), make_sequence(list(range(6)))
    compute_all(kv, parent)
    kv.fork(parent, child)
    kv.free(parent)
    assert kv.pool.num_used == 2
    kv.free(child)
    assert kv.pool.num_used == 0
