"""Bytes on the wire: what redis-py's own packer would send for the same words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.connection import Connection

from gateway.state.wire import head, pack, pack_hashes, pack_word


def reference(*words: str | bytes | float) -> bytes:
    packed: list[bytes] = Connection().pack_command(*words)  # type: ignore[no-untyped-call]
    return b"".join(packed)


@given(st.lists(st.one_of(st.binary(), st.integers(), st.floats(allow_nan=False), st.text("aé ")), max_size=8))
def test_a_command_is_packed_as_the_client_library_does(words: list[str | bytes | float]) -> None:
    assert pack("EVALSHA", *words) == reference("EVALSHA", *words)


@given(st.binary(max_size=20), st.lists(st.binary(min_size=16, max_size=16), max_size=40), st.lists(st.text("ab/")))
def test_keys_joined_in_one_go_are_those_packed_one_by_one(
    prefix: bytes, hashes: list[bytes], names: list[str]
) -> None:
    packed = head(b"MGET", len(names) + len(hashes)) + b"".join(map(pack_word, names)) + pack_hashes(prefix, hashes)
    assert packed == reference("MGET", *names, *(prefix + h for h in hashes))


@pytest.mark.parametrize("length", [0, 15, 17])
def test_a_hash_of_another_length_is_refused_before_it_is_sent(length: int) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        pack_hashes(b"ns:b:", [b"x" * 16, b"y" * length])
