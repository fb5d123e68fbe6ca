"""What the journal tells is what the pool knows, whatever happens to the pool."""

import random

from engines.block_journal import BlockJournal
from engines.block_pool import BlockPool


def _replayed(journal: BlockJournal, held: set[bytes]) -> set[bytes]:
    for block_hash, is_held in journal.take():
        assert (block_hash in held) is not is_held, "told twice"
        (held.add if is_held else held.discard)(block_hash)
    return held


def test_a_content_is_told_when_it_can_be_found_and_when_it_no_longer_can() -> None:
    pool, journal = BlockPool(2), BlockJournal()
    pool.watch(journal)
    first, second = pool.allocate(2) or []
    pool.set_hash(first, b"a")
    pool.set_hash(second, b"a")  # the first keeps the name
    assert list(journal.take()) == [(b"a", True)]
    pool.release([first, second])
    assert list(journal.take()) == [], "free is not forgotten"
    pool.allocate(2)
    assert list(journal.take()) == [(b"a", False)]


def test_events_add_up_to_what_the_pool_finds() -> None:
    rng, pool, journal = random.Random(1), BlockPool(12), BlockJournal()
    pool.watch(journal)
    used: list[int] = []
    held: set[bytes] = set()
    for _ in range(2000):
        if used and rng.random() < 0.5:
            pool.release([used.pop(rng.randrange(len(used)))])
        elif taken := pool.allocate(rng.randint(1, 3)):
            used += taken
            for block in taken:
                pool.set_hash(block, bytes([rng.randrange(40)]))
        if rng.random() < 0.2:
            held = _replayed(journal, held)
            assert held == {bytes([i]) for i in range(40) if pool.find(bytes([i])) is not None}
    assert held


def test_taking_removes() -> None:
    journal = BlockJournal()
    journal.added(b"a")
    assert list(journal.take()) == [(b"a", True)]
    assert list(journal.take()) == []
