"""Gumbel-max: every token's score plus its noise, and the highest wins. The law is the softmax of the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from drafting.noise import noise

# Noise is made in blocks of about this many elements. On a CPU they then stay in its caches; elsewhere their 64-bit
# words stay below 256 MiB, in few launches.
_BLOCK_ELEMENTS = {"cpu": 2**16}
_BLOCK_ELEMENTS_ELSEWHERE = 2**24


def race_all(scores: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """argmax(scores [num_rows, vocab] + noise) over the whole vocabulary, int64 [num_rows].

    `seeds` and `positions` are int64 [num_rows], as drafting.noise has them; the lowest id wins among equals.
    """
    block = _BLOCK_ELEMENTS.get(scores.device.type, _BLOCK_ELEMENTS_ELSEWHERE)
    num_rows = max(1, block // scores.shape[1])
    parts = zip(scores.split(num_rows), seeds.split(num_rows), positions.split(num_rows), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([_race_block(*part, block) for part in parts])


def race_survivors(scores: Tensor, floor: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """`race_all` over the scores that are not below `floor` [num_rows].

    Makes less noise, but the host has to count the survivors: for a CPU.
    """
    row, token_id = (scores >= floor[:, None]).nonzero(as_tuple=True)
    value = scores[row, token_id] + noise(seeds[row], positions[row], token_id)
    best = torch.full_like(floor, float("-inf")).scatter_reduce_(0, row, value, "amax")
    at_best = value == best[row]
    last = torch.full_like(seeds, scores.shape[1])
    return last.scatter_reduce_(0, row[at_best], token_id[at_best], "amin")


def _race_block(scores: Tensor, seeds: Tensor, positions: Tensor, width: int) -> Tensor:
    """`race_all` of a few rows, `width` columns at a time."""
    best = torch.full((len(scores),), float("-inf"), device=scores.device)
    winner = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    for start in range(0, scores.shape[1], width):
        part = scores[:, start : start + width]
        token_ids = torch.arange(start, start + part.shape[1], device=scores.device)
        value, column = (part + noise(seeds[:, None], positions[:, None], token_ids)).max(-1)
        winner = torch.where(value > best, column + start, winner)  # strictly: the lowest id wins among equals
        best = best.maximum(value)
    return winner
