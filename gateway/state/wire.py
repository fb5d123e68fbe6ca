"""Commands as Redis's protocol has them. A decision asks for hundreds of keys that differ in their last 16 bytes only:
joined in one go they cost some microseconds, packed one by one a good part of the whole decision."""

from __future__ import annotations

from collections.abc import Sequence

from engines.block_hash import BlockHash

Argument = str | bytes | int | float

_HASH_BYTES = 16


def pack(*arguments: Argument) -> bytes:
    """One command."""
    return b"*%d\r\n" % len(arguments) + b"".join(map(pack_word, arguments))


def pack_hashes(prefix: bytes, hashes: Sequence[BlockHash]) -> bytes:
    """Arguments `prefix + hash`, to follow a command's head. Raises ValueError on a hash of another length."""
    if not hashes:
        return b""
    head = b"$%d\r\n%b" % (len(prefix) + _HASH_BYTES, prefix)
    packed = head + (b"\r\n" + head).join(hashes) + b"\r\n"
    if len(packed) != len(hashes) * (len(head) + _HASH_BYTES + 2):
        raise ValueError(f"block hashes must have {_HASH_BYTES} bytes")
    return packed


def head(command: bytes, num_arguments: int) -> bytes:
    """The beginning of a command whose packed arguments follow."""
    return b"*%d\r\n" % (num_arguments + 1) + pack_word(command)


def pack_word(argument: Argument) -> bytes:
    """One argument, to follow a command's head."""
    word = argument if isinstance(argument, bytes) else str(argument).encode()
    return b"$%d\r\n%b\r\n" % (len(word), word)
