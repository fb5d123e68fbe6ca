"""How far each replica's cache matches a prompt: a chain of ANDs over the bitmaps of its blocks' holders.

Exact whatever an engine evicts first, and cheap where neighbours are held by the same replicas, as most are. Bit s of a
block's bitmap is slot s, from the highest bit of its first byte, as SETBIT counts. What is known of a block that was
sent is how many requests lately asked for it, and a prediction for each replica that they were sent to: a slot and the
end of its life.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

_HEAT = struct.Struct("<dQ")  # requests, and when that was so, in ms
_PREDICTION = struct.Struct("<HQ")  # slot, ends in ms


Groups = list[tuple[int, int]]  # (depth, bits of the slots whose match ends there), ascending; depth > 0


@dataclass(slots=True)
class PrefixMatch:
    """How many blocks from the prompt's start each slot holds. Slot s is the bit 8 * `width` - 1 - s."""

    width: int  # bytes
    confirmed: Groups = field(default_factory=list)
    predicted: Groups = field(default_factory=list)  # confirmed or sent there lately

    def holders(self) -> tuple[tuple[int, int], ...]:
        """(depth, slots whose match ends there), ascending."""
        return tuple([(depth, slots.bit_count()) for depth, slots in self.predicted])

    def depths(self, slot: int) -> tuple[int, int]:
        """Blocks in a row there: confirmed, predicted."""
        bit = 1 << 8 * self.width - 1 - slot if slot < 8 * self.width else 0
        confirmed = predicted = 0
        for depth, slots in self.confirmed:
            if slots & bit:
                confirmed = depth
                break
        for depth, slots in self.predicted:
            if slots & bit:
                predicted = depth
                break
        return confirmed, predicted

    def deepest(self, limit: int, turn: int) -> list[int]:
        """The slots with the longest matches; of the last depth that fits in part, others in each turn."""
        chosen: list[int] = []
        for _, slots in reversed(self.predicted):
            room = limit - len(chosen)
            if not room:
                break
            group = self._slots(slots)
            chosen += group if len(group) <= room else [group[(index + turn) % len(group)] for index in range(room)]
        return chosen

    def _slots(self, bits: int) -> list[int]:
        slots = []
        while bits:
            top = bits.bit_length()
            slots.append(8 * self.width - top)
            bits ^= 1 << (top - 1)
        return slots


def match_prefix(
    live: bytes,
    held_depths: Sequence[int],
    held: Sequence[bytes | None],
    sent_depths: Sequence[int],
    sent: Sequence[bytes | None],
    now: int,
) -> PrefixMatch:
    """Of the slots in `live`. `held` are bitmaps of the prompt's blocks at `held_depths`, `sent` what is known of those
    that were sent. Depths ascend, and each stands for those between it and the one before. `now` is in ms.
    """
    match = PrefixMatch(width=len(live))
    confirmed = predicted = int.from_bytes(live, "big")
    told = zip(sent_depths, sent, strict=True)
    depth, sent_depth = 0, 0.0
    block: bytes | None = live
    receivers = 0
    for next_depth, next_block in zip(held_depths, held, strict=True):
        before = receivers
        while sent_depth < next_depth:
            sent_depth, known = next(told, (math.inf, None))
            receivers = 0 if known is None else _receivers(known, match.width, now)
        if next_block != block or receivers != before:
            holders = 0 if next_block is None else _bits(next_block, match.width)
            confirmed = _keep(confirmed, holders, depth, match.confirmed)
            predicted = _keep(predicted, holders | receivers, depth, match.predicted)
            if not predicted:
                return match
        depth, block = next_depth, next_block
    _keep(confirmed, 0, depth, match.confirmed)
    _keep(predicted, 0, depth, match.predicted)
    return match


def recent_requests(known: bytes, now: int, heat_ms: float) -> float:
    """For a block of which that is known; each counts for less as time goes by, a third after `heat_ms`."""
    count, since = _HEAT.unpack_from(known)
    return float(count * math.exp((since - now) / heat_ms))


def _bits(bitmap: bytes, width: int) -> int:
    missing = width - len(bitmap)
    return int.from_bytes(bitmap, "big") << 8 * missing if missing >= 0 else int.from_bytes(bitmap[:width], "big")


def _receivers(known: bytes, width: int, now: int) -> int:
    bits = 0
    for slot, ends in _PREDICTION.iter_unpack(known[_HEAT.size :]):
        if ends > now and slot < 8 * width:
            bits |= 1 << (8 * width - 1 - slot)
    return bits


def _keep(alive: int, holders: int, depth: int, groups: Groups) -> int:
    """Slots that go on; those that do not, end at `depth`."""
    kept = alive & holders
    if kept != alive and depth:
        groups.append((depth, alive ^ kept))
    return kept
