"""At which depths of a prompt the state is told of it and asked about it: at all of the first, then at ever fewer.

Blocks that are held: every one up to the 32nd, every second one up to the 64th, every fourth up to the 128th, and so
on: a match comes out short by less than a sixteenth of itself, and a decision about a prompt of a thousand blocks costs
twice what one about forty does. Between two such depths, whoever holds the deeper one is taken to hold all: that is so
but for rare holes.

Blocks that were sent: four in each octave are enough to keep siblings together until an engine has said what it holds,
and to see where a prefix that many ask for ends.
"""

from __future__ import annotations

import functools

_HELD_DENSE = 32
_SENT_DENSE = 8


@functools.lru_cache(maxsize=1024)
def held_depths(num_blocks: int) -> tuple[int, ...]:
    """Those of a prompt of so many blocks, ascending; a shorter prompt's are the first of a longer one's."""
    return _depths(num_blocks, _HELD_DENSE)


@functools.lru_cache(maxsize=1024)
def sent_depths(num_blocks: int) -> tuple[int, ...]:
    """As held_depths; some of these."""
    return _depths(num_blocks, _SENT_DENSE)


def _depths(num_blocks: int, num_dense: int) -> tuple[int, ...]:
    depths = list(range(1, min(num_blocks, num_dense) + 1))
    step = 2
    while step * num_dense // 2 < num_blocks:
        first, last = step * num_dense // 2 + step, min(num_blocks, step * num_dense)
        depths += range(first, last + 1, step)
        step *= 2
    return tuple(depths)
