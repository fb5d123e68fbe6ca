"""Block tables: which blocks hold a sequence's keys and values (arXiv 2309.06180).

Asking (`cached_prefix`, `can_hold`) is apart from doing (`admit`, `extend`). Being out of blocks is an answer, not an
error.
"""

from __future__ import annotations

from collections.abc import Iterable

from engines.block_hash import extend_hashes
from engines.block_pool import BlockPool
from engines.sequence import Sequence


class KVCacheManager:
    """The only writer of block tables. Owned by the loop thread."""

    def __init__(self, pool: BlockPool, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.pool = pool
        self.block_size = block_size
        self._caching = enable_prefix_caching
        self._copies: dict[int, int] = {}  # destination -> source

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest cached prefix. Leaves at least one token to compute, since its logits are needed."""
        if not self._caching:
            return []
        extend_hashes(sequence.block_hashes, sequence.root, sequence.token_ids, self.block_size)
        found: list[int] = []
        for block_hash in sequence.block_hashes[: (sequence.num_tokens - 1) // self.block_size]:
            block_id = self.pool.find(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def missing_blocks(self, sequence: Sequence) -> int:
        """Blocks still to be allocated before all known tokens are computed."""
        return max(self.blocks_for(sequence.num_tokens) - len(sequence.block_table), 0)

    def can_hold(self, sequence: Sequence, prefix: list[int], promised: int) -> bool:
        """Whether all known tokens fit now, sharing `prefix`, beside `promised` blocks that others have still to take.

        A free block of the prefix is one fewer to hand out.
        """
        revived = sum(self.pool.is_free(block_id) for block_id in prefix)
        return self.blocks_for(sequence.num_tokens) - len(prefix) <= self.pool.num_free - revived - promised

    def admit(self, sequence: Sequence, prefix: list[int]) -> None:
        """Give a sequence without blocks its cached prefix."""
        assert not sequence.block_table
        for block_id in prefix:
            self.pool.share(block_id)
        sequence.block_table.extend(prefix)
        sequence.num_computed_tokens = len(prefix) * self.block_size
        sequence.num_published_blocks = len(prefix)
        sequence.num_drafted_blocks = next(
            (i for i, block_id in enumerate(prefix) if not self.pool.is_drafted(block_id)), len(prefix)
        )
        sequence.num_drafted_tokens = sequence.num_drafted_blocks * self.block_size

    def extend(self, sequence: Sequence, num_new_tokens: int) -> bool:
        """Make the next `num_new_tokens` positions writable; False, and nothing changed, if blocks are short.

        A block that others hold as well is replaced by a copy before it is written to (copy-on-write); the copy is due
        before the step's forward (`take_copies`).
        """
        first = sequence.num_computed_tokens // self.block_size
        shared = [
            i for i in range(first, len(sequence.block_table)) if self.pool.references(sequence.block_table[i]) > 1
        ]
        missing = self.blocks_for(sequence.num_computed_tokens + num_new_tokens) - len(sequence.block_table)
        blocks = self.pool.allocate(len(shared) + max(missing, 0))
        if blocks is None:
            return False
        for i, block_id in zip(shared, blocks, strict=False):
            self._copies[block_id] = sequence.block_table[i]
            self.pool.release([sequence.block_table[i]])
            sequence.block_table[i] = block_id
        sequence.block_table.extend(blocks[len(shared) :])
        return True

    def give_back_spare(self, sequences: Iterable[Sequence]) -> None:
        """Free the blocks beyond the known tokens: room for drafts that were rejected."""
        for sequence in sequences:
            num_kept = self.blocks_for(sequence.num_tokens)
            if len(sequence.block_table) > num_kept:
                self.pool.release(reversed(sequence.block_table[num_kept:]))
                del sequence.block_table[num_kept:]
                sequence.draft_tail = sequence.draft_tail[: num_kept * self.block_size - sequence.num_drafted_tokens]

    def take_copies(self) -> list[tuple[int, int]]:
        """The (source, destination) block copies due before the next forward.

        All sources are to be read before any destination is written: a source may have been released and handed out
        again within the same step.
        """
        copies = [(source, destination) for destination, source in self._copies.items()]
        self._copies.clear()
        return copies

    def drafted(self, sequence: Sequence) -> int:
        """How many of its leading known tokens the draft model has read; settles the tail it read beyond them.

        A block that it has read in full is read for all sequences that share it.
        """
        start = sequence.num_drafted_tokens
        known = sequence.token_ids[start : start + len(sequence.draft_tail)]
        agrees = (read == token for read, token in zip(sequence.draft_tail, known, strict=False))
        num_right = next((i for i, is_right in enumerate(agrees) if not is_right), len(known))
        sequence.num_drafted_tokens += num_right
        sequence.draft_tail = sequence.draft_tail[num_right:] if num_right == len(known) else ()
        num_full = sequence.num_drafted_tokens // self.block_size
        for i in range(sequence.num_drafted_blocks, num_full):
            self.pool.set_drafted(sequence.block_table[i])
        sequence.num_drafted_blocks = max(sequence.num_drafted_blocks, num_full)
        self._follow_readers(sequence)
        return sequence.num_drafted_tokens

    def _follow_readers(self, sequence: Sequence) -> None:
        """Skip shared blocks that the draft model has meanwhile read for somebody else."""
        num_known = min(sequence.num_tokens // self.block_size, len(sequence.block_table))
        first = sequence.num_drafted_blocks
        while sequence.num_drafted_blocks < num_known and self.pool.is_drafted(
            sequence.block_table[sequence.num_drafted_blocks]
        ):
            sequence.num_drafted_blocks += 1
        if sequence.num_drafted_blocks > first:
            sequence.num_drafted_tokens = sequence.num_drafted_blocks * self.block_size
            sequence.draft_tail = ()

    def note_drafted(self, sequence: Sequence, stop: int, drafts: tuple[int, ...]) -> None:
        """The draft model has read the known tokens and then `drafts`, up to position `stop`."""
        sequence.num_drafted_tokens = min(stop, sequence.num_tokens)
        sequence.draft_tail = drafts[: max(0, stop - sequence.num_tokens)]

    def publish(self, sequence: Sequence) -> None:
        """Name the blocks that computed, verified tokens have filled, so that others can find them."""
        if not self._caching:
            return
        extend_hashes(sequence.block_hashes, sequence.root, sequence.token_ids, self.block_size)
        self.drafted(sequence)
        num_full = sequence.num_computed_tokens // self.block_size
        for i in range(sequence.num_published_blocks, num_full):
            if self.pool.hash_of(sequence.block_table[i]) is None:
                self.pool.set_hash(sequence.block_table[i], sequence.block_hashes[i])
        sequence.num_published_blocks = max(sequence.num_published_blocks, num_full)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, whose tokens begin with the parent's computed ones, share all blocks that hold them."""
        assert not child.block_table
        held = parent.block_table[: self.blocks_for(parent.num_computed_tokens)]
        for block_id in held:
            self.pool.share(block_id)
        child.block_table.extend(held)
        child.num_computed_tokens = parent.num_computed_tokens
        child.num_published_blocks = parent.num_published_blocks
        child.num_drafted_tokens = min(self.drafted(parent), child.num_computed_tokens)
        child.num_drafted_blocks = child.num_drafted_tokens // self.block_size
        # Later hashes of the parent may cover its own first token.
        child.block_hashes = parent.block_hashes[: parent.num_computed_tokens // self.block_size]

    def free(self, sequence: Sequence) -> None:
        """Take all blocks back; what was computed is to be computed again, or found in the prefix cache."""
        self.pool.release(reversed(sequence.block_table))
        del sequence.block_table[:]
        sequence.num_computed_tokens = 0
        sequence.num_published_blocks = 0
        sequence.num_drafted_tokens = 0
        sequence.num_drafted_blocks = 0
        sequence.draft_tail = ()
