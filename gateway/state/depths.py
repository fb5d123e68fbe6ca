"""At which depths of a prompt the state is told of it and asked about it: at all of the first, then at ever fewer.

Every block up to the 32nd, every second one up to the 64th, every fourth up to the 128th, and so on: a match comes out
short by less than a sixteenth of itself, and a decision about a prompt of a thousand blocks costs twice what one about
forty does. Between two such depths, whoever holds the deeper one is taken to hold all: that is so but for rare holes.
"""

from __future__ import annotations

import functools

_NUM_DENSE = 32
_HEAT_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)


@functools.lru_cache(maxsize=1024)
def asked_depths(num_blocks: int) -> tuple[int, ...]:
    """Those of a prompt of so many blocks, ascending; a shorter prompt's are the first of a longer one's."""
    depths = list(range(1, min(num_blocks, _NUM_DENSE) + 1))
    step = 2
    while step * _NUM_DENSE // 2 < num_blocks:
        first, last = step * _NUM_DENSE // 2 + step, min(num_blocks, step * _NUM_DENSE)
        depths += range(first, last + 1, step)
        step *= 2
    return tuple(depths)


@functools.lru_cache(maxsize=1024)
def heat_depths(num_blocks: int) -> tuple[int, ...]:
    """Where requests are counted: two depths per octave say enough about where a common prefix ends; ascending."""
    return tuple(depth for depth in _HEAT_DEPTHS if depth <= num_blocks)
