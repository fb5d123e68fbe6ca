"""Randomness as a function: the Gumbel noise of (seed, position, token id), the same wherever it is asked for.

Adding it to log-probabilities and taking the argmax draws from their law (the Gumbel-max trick). Because target and
drafter look up the *same* noise, their draws agree often (Gumbel coupling, arXiv 2408.07978); because it is a function
and not a stream, a seeded request reads the same alone, in any batch, after preemption, and with or without drafts.

The function is counter-based: a key is mixed from seed and position, and the token id is a step of SplitMix64 from that
key (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants are Stafford's Mix13).
It uses wrapping 64-bit integer arithmetic only, so every device computes the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as `value` modulo 2**64."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
_UNIFORM_BITS = 52


def request_seed(seed: int) -> int:
    """`seed`, an integer of -2**63 to 2**64 - 1, as the int64 that keys the noise: equal modulo 2**64, equal noise."""
    return _signed(seed)


def choice_seed(seed: int, choice: int) -> int:
    """The int64 seed of the `choice`-th of n choices; choice 0 keeps the request's own, so n does not change it."""
    if choice == 0:
        return request_seed(seed)
    # Two rounds: one step of SplitMix64 alone would hand (seed + golden, choice) the noise of (seed, choice + 1).
    return int(_mix(_mix(torch.tensor(request_seed(seed))) + _signed(choice * _GOLDEN)))


def noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 and always finite (-3.7 to 36.8).

    `seeds` and `positions` (absolute, in tokens from the start of the sequence) are int64 and broadcast against
    `token_ids`, int64: [num_rows, 1] with [vocab] for whole rows, [num_rows, 1] with [num_rows, k] or [n] with [n] for
    candidates. An element depends on its own three numbers and on nothing else.
    """
    return _gumbel(_hash(seeds, positions, token_ids))


def _hash(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """64 well-mixed bits per (seed, position, token id), as int64."""
    # Mixed twice with the seed in between, so that no small steps in seed and position cancel out.
    keys = _mix(_mix(seeds + _GOLDEN) + positions * _GOLDEN)
    return _mix(token_ids * _GOLDEN + keys)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's bijection of 64-bit words, elementwise."""
    bits = bits ^ _shift_right(bits, 30)
    bits *= _MIX_1
    bits ^= _shift_right(bits, 27)
    bits *= _MIX_2
    bits ^= _shift_right(bits, 31)
    return bits


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift; torch's own is arithmetic on int64."""
    return (bits >> count).bitwise_and_(2 ** (64 - count) - 1)


def _gumbel(bits: Tensor) -> Tensor:
    """-log(-log(u)) of the upper bits; u has half a step of distance to both 0 and 1, so both logs are finite.

    In float64, as float32 has no numbers between 1 - 2**-24 and 1, and the likely winners live there.
    """
    uniform = _shift_right(bits, 64 - _UNIFORM_BITS).to(torch.float64)
    uniform += 0.5
    uniform *= 2.0**-_UNIFORM_BITS
    return uniform.log_().neg_().log_().neg_().to(torch.float32)
