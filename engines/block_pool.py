"""The pool of KV blocks: who is used, who is free, and whose content is known (arXiv 2309.06180).

A block is used (reference count above 0) or free. A free block may still hold hashed content and be found by it, until
it is handed out again. The free list is in eviction order: blocks without a hash first, then the longest free.

    allocate ---> used, no hash --set_hash--> used, hashed --release--> free, hashed --share--> used, hashed
        ^                                                                    |
        `---------------------------- evicted (hash forgotten) <------------'
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from engines.block_hash import BlockHash
from engines.block_journal import BlockObserver


class BlockPool:
    """Bookkeeping for blocks 0 to `num_blocks` - 1. The only writer of reference counts and hashes."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._by_hash: dict[BlockHash, int] = {}
        self._drafted = bytearray(num_blocks)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._observer: BlockObserver | None = None

    def watch(self, observer: BlockObserver) -> None:
        """Tell `observer` which contents can be found from now on, and which no longer."""
        self._observer = observer

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out, cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks, used or free, that can be found by their hash."""
        return len(self._by_hash)

    def references(self, block_id: int) -> int:
        return self._references[block_id]

    def is_free(self, block_id: int) -> bool:
        return block_id in self._free

    def find(self, block_hash: BlockHash) -> int | None:
        """The block with this content, used or free, or None."""
        return self._by_hash.get(block_hash)

    def hash_of(self, block_id: int) -> BlockHash | None:
        return self._hashes[block_id]

    def is_drafted(self, block_id: int) -> bool:
        """Whether the draft model has read all of this block's content as well."""
        return bool(self._drafted[block_id])

    def set_drafted(self, block_id: int) -> None:
        """The draft model has read all of a full, used block. Forgotten when the block is handed out again."""
        assert self._references[block_id] > 0
        self._drafted[block_id] = True

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Take that many blocks, with one reference and no hash each; None, and no change, if too few are free."""
        if num_blocks > len(self._free):
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block_id in taken:
            self._forget(block_id)
            self._references[block_id] = 1
        return taken

    def share(self, block_id: int) -> None:
        """Add a reference to a used block, or to a free one whose content is still known."""
        if self._references[block_id] == 0:
            assert self._hashes[block_id] is not None, f"block {block_id} is free and holds nothing"
            del self._free[block_id]
        self._references[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Drop one reference each. Pass a sequence's blocks last first, so that its tail is evicted before its head."""
        for block_id in block_ids:
            assert self._references[block_id] > 0, f"block {block_id} released too often"
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def set_hash(self, block_id: int, block_hash: BlockHash) -> None:
        """Publish the content of a full, used block. The first one with a content keeps the name."""
        assert self._references[block_id] > 0
        assert self._hashes[block_id] is None
        if block_hash not in self._by_hash:
            self._hashes[block_id] = block_hash
            self._by_hash[block_hash] = block_id
            if self._observer is not None:
                self._observer.added(block_hash)

    def _forget(self, block_id: int) -> None:
        self._drafted[block_id] = False
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._hashes[block_id] = None
            if self._observer is not None:
                self._observer.evicted(block_hash)
