"""The requests under way: which sequences are whose choices, from arrival until the last choice has ended."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from drafting.noise import choice_seed, request_seed
from engines.block_hash import root_hash
from engines.logits import TokenHistory, needs_history
from engines.sequence import Sequence
from engines.text_stream import TextStream
from engines.tokenizer import Tokenizer
from engines.types import GenerateRequest


@dataclass(slots=True)
class _Request:
    request: GenerateRequest
    sequences: list[Sequence] = field(default_factory=list)
    num_finished: int = 0


class Requests:
    """Makes the sequences of requests, which are known by a key of the caller's choosing.

    `model` is the identity at the root of block hashes. `len` counts requests.
    """

    def __init__(self, model: str, eos_token_ids: frozenset[int], tokenizer: Tokenizer) -> None:
        self._model = model
        self._eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self._requests: dict[int, _Request] = {}
        self._key_of: dict[int, int] = {}  # seq_id -> request key
        self._seq_ids = itertools.count()

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, key: int) -> bool:
        return key in self._requests

    def key_of(self, sequence: Sequence) -> int:
        """The key of the request that a sequence is a choice of."""
        return self._key_of[sequence.seq_id]

    def open(
        self, key: int, request: GenerateRequest, token_ids: SequenceOf[int], order: tuple[float, int]
    ) -> Sequence:
        """A new request; its first choice. The others join when the prompt is computed (`forks`)."""
        seed = request.sampling.seed
        seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        self._requests[key] = _Request(request)
        first = self._sequence(key, 0, choice_seed(request_seed(seed), 0), order, token_ids)
        first.num_pending_forks = request.n - 1
        return first

    def forks(self, parent: Sequence) -> list[Sequence]:
        """The further choices of the request whose first one is `parent`."""
        key = self.key_of(parent)
        prompt = parent.token_ids[: parent.num_prompt_tokens]
        forks = []
        for index in range(1, parent.num_pending_forks + 1):
            fork = self._sequence(key, index, choice_seed(parent.seed, index), parent.order, prompt)
            fork.num_cached_tokens = parent.num_cached_tokens
            forks.append(fork)
        return forks

    def drop(self, key: int) -> list[Sequence]:
        """Forget a request; its sequences, none for a request that has ended or never was."""
        state = self._requests.pop(key, None)
        if state is None:
            return []
        for sequence in state.sequences:
            del self._key_of[sequence.seq_id]
        return state.sequences

    def note_finished(self, key: int, num_choices: int) -> bool:
        """So many more choices have ended; whether all have, and the request is forgotten."""
        state = self._requests[key]
        state.num_finished += num_choices
        is_over = state.num_finished == state.request.n
        if is_over:
            self.drop(key)
        return is_over

    def _sequence(
        self, key: int, index: int, seed: int, order: tuple[float, int], token_ids: SequenceOf[int]
    ) -> Sequence:
        state = self._requests[key]
        sampling = state.request.sampling
        stop_ids = (frozenset() if sampling.ignore_eos else self._eos_token_ids) | frozenset(sampling.stop_token_ids)
        sequence = Sequence(
            seq_id=next(self._seq_ids),
            request=state.request,
            index=index,
            seed=seed,
            order=order,
            token_ids=list(token_ids),
            num_prompt_tokens=len(token_ids),
            root=root_hash(self._model, salt=state.request.cache_salt),
            text=TextStream(self._tokenizer, sampling.stop, token_ids),
            history=TokenHistory(token_ids) if needs_history(sampling) else None,
            suppressed=tuple(sorted(stop_ids)) if sampling.min_tokens else (),
            stop_ids=stop_ids,
        )
        state.sequences.append(sequence)
        self._key_of[sequence.seq_id] = key
        return sequence
