"""Chained block hashes: the identity of a prefix, computed alike by engines and gateways.

    h_0 = H(model, adapter, tenant salt)        h_i = H(h_{i-1}, token ids of block i)

Equal hashes mean equal token ids in the block and in everything before it, for one model, adapter and tenant.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

BlockHash = bytes  # 16 bytes

_DIGEST_BYTES = 16


def root_hash(model: str, adapter: str = "", salt: str = "") -> BlockHash:
    """h_0. The parts are length-prefixed, so that no two triples read alike."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in (model, adapter, salt):
        encoded = part.encode(errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def next_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """h_i from h_{i-1} and the block's token ids (each below 2**32)."""
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


def extend_hashes(hashes: list[BlockHash], root: BlockHash, token_ids: Sequence[int], block_size: int) -> None:
    """Append to `hashes`, in place, those of the full blocks of `token_ids` that it does not have yet."""
    first, end = len(hashes) * block_size, len(token_ids) // block_size * block_size
    if first >= end:
        return
    # In one go: converting block by block takes longer than hashing.
    packed = array("I", token_ids[first:end])
    data, step = packed.tobytes(), block_size * packed.itemsize
    parent = hashes[-1] if hashes else root
    for start in range(0, len(data), step):
        parent = hashlib.blake2b(parent + data[start : start + step], digest_size=_DIGEST_BYTES).digest()
        hashes.append(parent)
