"""What sampling yields: chosen on the logits' device, read by the host when it needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class TokenLogprobIds:
    """Log-softmax of the raw logits, before any processor; `top_*` run from the most likely on."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprob: TokenLogprobIds | None = None


class Drawn:
    """The tokens of a step's rows. On a GPU they may still be in the making; `read` waits for them.

    `token_ids` are int64 [num_rows]; `logprobs` are the `logprob_rows` of some rows, one after another, which
    `num_tops` names with the number of best tokens that each has asked for.
    """

    def __init__(
        self, token_ids: Tensor, logprobs: Tensor | None = None, num_tops: Mapping[int, int] | None = None
    ) -> None:
        self._num_tops = num_tops or {}
        # Ids are exact in float64, so everything travels in one copy.
        self._values = token_ids if logprobs is None else torch.cat([token_ids.double(), logprobs.flatten()])
        self._num_rows = len(token_ids)
        if not self._num_rows:
            # Read as well, so that a step without rows is over when it has been read.
            self._values = torch.zeros(1, device=token_ids.device)

    def read(self) -> list[SampledToken]:
        """One token per row. The one place where the host waits for a step."""
        values = self._values.cpu().tolist()
        answers = self._answers(values[self._num_rows :])
        return [SampledToken(int(value), answers.get(i)) for i, value in enumerate(values[: self._num_rows])]

    def _answers(self, values: Sequence[float]) -> dict[int, TokenLogprobIds]:
        if not self._num_tops:
            return {}
        width = len(values) // len(self._num_tops)
        return {
            row: _unpack(values[i * width : (i + 1) * width], num_top)
            for i, (row, num_top) in enumerate(self._num_tops.items())
        }


def logprob_rows(logits: Tensor, token_ids: Tensor) -> Tensor:
    """logprob, MAX_TOP_LOGPROBS ids, as many logprobs: float64 [num_rows, 1 + 2 * num_top].

    The number is fixed and `logits` are not processed, so that an answer does not depend on what other rows asked for.
    """
    logprobs = torch.log_softmax(logits.float(), -1)
    chosen = logprobs.gather(1, token_ids[:, None])
    top = logprobs.topk(min(MAX_TOP_LOGPROBS, logits.shape[1]))
    return torch.cat([chosen.double(), top.indices.double(), top.values.double()], -1)


def _unpack(answer: Sequence[float], num_top: int) -> TokenLogprobIds:
    """One of `logprob_rows`; equals are ordered by id, since topk leaves their order open."""
    half = 1 + len(answer) // 2
    top = sorted(zip(answer[1:half], answer[half:], strict=True), key=lambda pair: (-pair[1], pair[0]))[:num_top]
    return TokenLogprobIds(answer[0], tuple(int(i) for i, _ in top), tuple(value for _, value in top))
