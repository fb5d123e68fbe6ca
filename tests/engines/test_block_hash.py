"""Chained block hashes."""

from engines.block_hash import extend_hashes, next_hash, root_hash


def test_root_separates_model_adapter_and_salt() -> None:
    roots = {root_hash("m"), root_hash("m", "a"), root_hash("m", salt="a"), root_hash("ma"), root_hash("m", "a", "a")}
    assert len(roots) == 5


def test_equal_blocks_after_different_prefixes_differ() -> None:
    root = root_hash("m")
    assert next_hash(next_hash(root, [1]), [7]) != next_hash(next_hash(root, [2]), [7])


def test_extend_hashes_full_blocks_only_and_resumes() -> None:
    root, tokens = root_hash("m"), list(range(11))
    whole: list[bytes] = []
    extend_hashes(whole, root, tokens, block_size=4)
    stepwise: list[bytes] = []
    for length in range(len(tokens) + 1):
        extend_hashes(stepwise, root, tokens[:length], block_size=4)
    assert len(whole) == 2
    assert whole == stepwise == [h1 := next_hash(root, [0, 1, 2, 3]), next_hash(h1, [4, 5, 6, 7])]
