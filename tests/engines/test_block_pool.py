"""The pool's conservation laws, under random operation sequences."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from engines.block_pool import BlockPool


def test_allocate_is_all_or_nothing() -> None:
    pool = BlockPool(3)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert sorted(pool.allocate(3) or []) == [0, 1, 2]
    assert pool.allocate(1) is None


def test_free_blocks_without_content_are_handed_out_before_cached_ones() -> None:
    pool = BlockPool(3)
    first, second, third = pool.allocate(3) or []
    pool.set_hash(first, b"a")
    pool.set_hash(third, b"c")
    pool.release([first, third, second])
    assert pool.allocate(1) == [second]
    assert pool.allocate(1) == [first], "then the longest free"
    assert pool.find(b"a") is None
    assert pool.find(b"c") == third


def test_a_shared_free_block_is_not_handed_out() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1) or []
    pool.set_hash(block, b"a")
    pool.release([block])
    pool.share(block)
    assert pool.allocate(2) is None
    assert pool.references(block) == 1


def test_the_first_block_with_a_content_keeps_the_name() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2) or []
    pool.set_hash(first, b"a")
    pool.set_hash(second, b"a")
    assert pool.find(b"a") == first
    assert pool.hash_of(second) is None


def test_releasing_too_often_is_caught() -> None:
    pool = BlockPool(1)
    pool.allocate(1)
    pool.release([0])
    with pytest.raises(AssertionError, match="released too often"):
        pool.release([0])


def test_what_the_draft_model_has_read_outlives_its_reader_but_not_its_content() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2) or []
    pool.set_hash(first, b"a")
    pool.set_drafted(first)
    pool.release([first])
    pool.share(first)
    assert pool.is_drafted(first)
    assert not pool.is_drafted(second)
    pool.release([first])
    assert pool.allocate(1) == [first]
    assert not pool.is_drafted(first)


def test_only_a_block_in_use_can_have_been_read() -> None:
    with pytest.raises(AssertionError):
        BlockPool(1).set_drafted(0)


class PoolMachine(RuleBasedStateMachine):
    """A model beside the pool: who holds what, and what each named block was filled with."""

    held = Bundle("held")

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.references = [0] * num_blocks
        self.content: dict[int, bytes] = {}
        self.drafted: set[int] = set()

    @rule(target=held, count=st.integers(0, 5))
    def allocate(self, count: int) -> object:
        free = self.pool.num_free
        blocks = self.pool.allocate(count)
        if blocks is None:
            assert count > free
            return multiple()
        assert len(set(blocks)) == count
        for block in blocks:
            assert self.references[block] == 0, "handed out while in use"
            self.references[block] = 1
            self.content.pop(block, None)
            self.drafted.discard(block)
        return multiple(*blocks)

    @rule(block=consumes(held))
    def release(self, block: int) -> None:
        self.pool.release([block])
        self.references[block] -= 1

    @rule(target=held, block=held)
    def share_used(self, block: int) -> int:
        self.pool.share(block)
        self.references[block] += 1
        return block

    @rule(target=held, name=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def share_cached(self, name: bytes) -> object:
        block = self.pool.find(name)
        if block is None:
            return multiple()
        assert self.content[block] == name, "the hash points at another content"
        self.pool.share(block)
        self.references[block] += 1
        return block

    @rule(block=held, name=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def fill(self, block: int, name: bytes) -> None:
        if block not in self.content:
            self.content[block] = name
            if self.pool.hash_of(block) is None:
                self.pool.set_hash(block, name)

    @rule(block=held)
    def read_by_the_draft_model(self, block: int) -> None:
        self.pool.set_drafted(block)
        self.drafted.add(block)

    @invariant()
    def conserved(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert self.pool.num_free + self.pool.num_used == self.pool.num_blocks
        assert self.pool.num_used == sum(count > 0 for count in self.references)
        for block, count in enumerate(self.references):
            assert self.pool.references(block) == count
            assert self.pool.is_free(block) == (count == 0)
            assert self.pool.is_drafted(block) == (block in self.drafted)
            block_hash = self.pool.hash_of(block)
            if block_hash is not None:
                assert self.pool.find(block_hash) == block
                assert self.content[block] == block_hash


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
