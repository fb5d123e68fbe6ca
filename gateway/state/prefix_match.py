"""How far each replica's cache matches a prompt: a chain of ANDs over the bitmaps of its blocks' holders.

Exact whatever an engine evicts first, and cheap where neighbours are held by the same replicas, as most are. Bit s of a
block's bitmap is slot s, from the highest bit of its first byte, as SETBIT counts. A prediction is a slot and the end
of its life; a block has one for each replica that was sent it lately.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

_PREDICTION = struct.Struct("<HQ")  # slot, ends in ms


@dataclass(slots=True)
class PrefixMatch:
    """Blocks from the prompt's start, by slot; slots that hold none are left out. Shallow ones come first."""

    confirmed: dict[int, int] = field(default_factory=dict)
    predicted: dict[int, int] = field(default_factory=dict)  # confirmed or sent there lately

    def holders(self) -> tuple[tuple[int, int], ...]:
        """(depth, slots whose match ends there), ascending."""
        return tuple(Counter(self.predicted.values()).items())

    def deepest(self, limit: int, turn: int) -> list[int]:
        """The slots with the longest matches; of the last depth that fits in part, others in each turn."""
        slots = list(self.predicted)
        chosen: list[int] = []
        for _, count in reversed(self.holders()):
            group, room = slots[-count:], limit - len(chosen)
            del slots[-count:]
            if count > room:
                return chosen + [group[(index + turn) % count] for index in range(room)]
            chosen += group
        return chosen


def match_prefix(
    live: bytes,
    depths: Sequence[int],
    blocks: Sequence[bytes | None],
    predictions: Sequence[bytes | None],
    now: int,
) -> PrefixMatch:
    """Of the slots in `live`. `blocks` are bitmaps and `predictions` joined pairs, of the prompt's blocks at `depths`.

    Each stands for those between it and the one before. `now` is in ms.
    """
    width, match = len(live), PrefixMatch()
    confirmed = predicted = int.from_bytes(live, "big")
    depth = 0
    previous_block: bytes | None = live
    previous_sent: bytes | None = None
    for next_depth, block, sent in zip(depths, blocks, predictions, strict=True):
        if block == previous_block and sent == previous_sent:
            depth = next_depth
            continue
        holders = _bits(block, width)
        confirmed = _keep(confirmed, holders, depth, width, match.confirmed)
        if sent is not None:
            holders |= _sent(sent, width, now)
        predicted = _keep(predicted, holders, depth, width, match.predicted)
        if not predicted:
            break
        depth, previous_block, previous_sent = next_depth, block, sent
    _keep(confirmed, 0, depth, width, match.confirmed)
    _keep(predicted, 0, depth, width, match.predicted)
    return match


def _bits(bitmap: bytes | None, width: int) -> int:
    return 0 if bitmap is None else int.from_bytes(bitmap[:width].ljust(width, b"\0"), "big")


def _sent(predictions: bytes, width: int, now: int) -> int:
    bits = 0
    for slot, ends in _PREDICTION.iter_unpack(predictions):
        if ends > now and slot < 8 * width:
            bits |= 1 << (8 * width - 1 - slot)
    return bits


def _keep(alive: int, holders: int, depth: int, width: int, depths: dict[int, int]) -> int:
    """Slots that go on; those that do not, end at `depth`."""
    lost = alive & ~holders
    while lost and depth:
        top = lost.bit_length()
        depths[8 * width - top] = depth
        lost ^= 1 << (top - 1)
    return alive & holders
