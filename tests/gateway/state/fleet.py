"""A clock that only tests move, and block hashes by name."""

import hashlib

from engines.block_hash import BlockHash


class Clock:
    """Seconds, and the milliseconds that scripts get."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def milliseconds(self) -> int:
        return round(self.now_s * 1000)


def chain(name: str, length: int) -> list[BlockHash]:
    """`length` hashes that no other name has."""
    return [hashlib.blake2b(f"{name}/{number}".encode(), digest_size=16).digest() for number in range(length)]
