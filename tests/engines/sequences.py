"""Sequences for tests of scheduling and block tables, which never look at text."""

from __future__ import annotations

import itertools
from typing import cast

from engines.block_hash import root_hash
from engines.sequence import Sequence
from engines.text_stream import TextStream
from engines.types import GenerateRequest, SamplingParams, TokenPrompt

_ids = itertools.count()


def make_sequence(
    prompt: list[int], *, max_tokens: int = 100, order: float | None = None, salt: str = "", forks: int = 0
) -> Sequence:
    seq_id = next(_ids)
    sampling = SamplingParams(max_tokens=max_tokens)
    request = GenerateRequest(str(seq_id), TokenPrompt(tuple(prompt)), sampling, n=1 + forks)
    return Sequence(
        seq_id=seq_id,
        request=request,
        index=0,
        seed=0,
        order=(float(seq_id) if order is None else order, seq_id),
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        root=root_hash("model", salt=salt),
        text=cast(TextStream, None),
        history=None,
        suppressed=(),
        stop_ids=frozenset(),
        num_pending_forks=forks,
    )
