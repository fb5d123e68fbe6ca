"""llama.cpp, plain and with its own speculation, as systems of `benchmarks.speculation`: one sequence at a time.

Its Python package drafts by prompt lookup alone. Speculation with a draft model lives in its `common/speculative.cpp`
("draft-simple") and `examples/speculative-simple`: a program that takes one text and loads its models anew for each, so
it cannot take turns with us. Their loop is written here again over the C API, fed with token ids:

- the draft model continues greedily, a token at a time, up to `max_drafts`, and stops where its probability of the next
  token, among its ten likeliest, falls below `min_probability` (llama.cpp's `--spec-draft-n-max` and `-p-min`);
- the target evaluates the last token and the drafts in one batch, samples at each place in turn, and goes on while the
  sample is the draft;
- both caches then drop what was rejected.

One thing is left out, in llama.cpp's favour: it has the draft model evaluate every verified batch once more, of which
its cache holds all but the last token already.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import gguf_file
from benchmarks.llama_cpp_model import Context, Model
from benchmarks.speculation_systems import Length, Measured
from benchmarks.workloads import Prompt

_MAX_TOKENS = 2048  # of one sequence
_CANDIDATES = 10
# Drafts at most, and their least probability: llama.cpp's own default, and what beat it where drafts are often wrong.
_SETTINGS = ((3, 0.0), (8, 0.5))


@dataclass(slots=True)
class _Counts:
    num_tokens: int = 0
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


class LlamaCpp:
    """llama.cpp decoding one sequence, a token a step; with `draft`, speculatively."""

    def __init__(
        self,
        target: Model,
        draft: Model | None = None,
        max_drafts: int = _SETTINGS[0][0],
        min_probability: float = _SETTINGS[0][1],
    ) -> None:
        self.name = "llama.cpp" if draft is None else "llama.cpp_speculative"
        self.drafter = "none" if draft is None else "model"
        self.length: Length = 0 if draft is None else max_drafts
        threads = torch.get_num_threads()
        self._target = Context(target, 1, _MAX_TOKENS, threads)
        self._drafter = draft and _Drafter(draft, max_drafts, min_probability, threads)

    def run(self, prompts: Sequence[Prompt], temperature: float, num_new: int) -> Measured:
        """Decode at least `num_new` tokens for each prompt, one prompt after another, from its first token on."""
        counts, seconds = _Counts(), 0.0
        for seed, prompt in enumerate(prompts):
            sampler = _Sampler(self._target, temperature, seed)
            seconds += self._decode(prompt, sampler, num_new, counts)
            sampler.close()
        return Measured(counts.num_tokens, counts.num_steps, 1, seconds, counts.num_drafted, counts.num_accepted)

    def _decode(self, prompt: Prompt, sampler: _Sampler, num_new: int, counts: _Counts) -> float:
        """Seconds from the first token until `num_new` more; adds to `counts`."""
        text = list(prompt.token_ids)
        self._target.clear()
        last = np.arange(len(text)) == len(text) - 1
        text.append(sampler.sample(self._target.decode(text, np.arange(len(text)), wanted=last), -1))
        if self._drafter:
            self._drafter.begin(text)
        started, end = time.perf_counter(), len(text) + num_new
        while len(text) < end:
            drafts = self._drafter.draft(text) if self._drafter else []
            emitted = self._verify(text, drafts, sampler)
            text += emitted
            counts.num_tokens += len(emitted)
            counts.num_steps += 1
            counts.num_drafted += len(drafts)
            counts.num_accepted += len(emitted) - 1
        return time.perf_counter() - started

    def _verify(self, text: list[int], drafts: list[int], sampler: _Sampler) -> list[int]:
        """The accepted drafts and one token more; the target's cache ends with the last accepted one."""
        first = len(text) - 1
        logits = self._target.decode([text[-1], *drafts], np.arange(first, first + 1 + len(drafts)))
        emitted: list[int] = []
        for row in range(len(drafts) + 1):
            emitted.append(sampler.sample(logits, row))
            if row == len(drafts) or emitted[-1] != drafts[row]:
                break
        self._target.forget(start=first + len(emitted))
        return emitted


def systems(target: Path, draft: Path) -> list[LlamaCpp]:
    """Plain, and speculative at each of the settings, of which the faster counts.

    Raises what `gguf_file.write` raises, OSError if llama.cpp does not load a file.
    """
    large, small = (Model(gguf_file.materialize(path)) for path in (target, draft))
    return [LlamaCpp(large), *(LlamaCpp(large, small, *setting) for setting in _SETTINGS)]


class _Drafter:
    """The draft model and its cache."""

    def __init__(self, model: Model, max_drafts: int, min_probability: float, threads: int) -> None:
        self._context = Context(model, 1, _MAX_TOKENS, threads)
        self._max_drafts = max_drafts
        self._min_probability = min_probability
        self._num_cached = 0

    def begin(self, text: list[int]) -> None:
        """Read a new sequence up to its last token."""
        self._context.clear()
        self._num_cached = len(text) - 1
        self._context.decode(text[:-1], np.arange(self._num_cached), wanted=False)

    def draft(self, text: list[int]) -> list[int]:
        """Up to `max_drafts` tokens after `text`: the last one, drafts that were accepted, and one token more."""
        self._num_cached = min(self._num_cached, len(text) - 1)
        self._context.forget(start=self._num_cached)
        drafts: list[int] = []
        new = text[self._num_cached :]
        while True:
            positions = np.arange(self._num_cached, self._num_cached + len(new))
            logits = self._context.decode(new, positions, wanted=positions == positions[-1])[0]
            self._num_cached += len(new)
            token = int(logits.argmax())
            if self._min_probability and _probability(logits, token) < self._min_probability:
                return drafts
            drafts.append(token)
            if len(drafts) == self._max_drafts:
                return drafts
            new = [token]


def _probability(logits: NDArray[np.float32], token: int) -> float:
    """Of the likeliest token, among the likeliest few."""
    best = np.partition(logits, -_CANDIDATES)[-_CANDIDATES:]
    return float(1 / np.exp(best - logits[token]).sum())


class _Sampler:
    """Temperature alone, through llama.cpp's own sampler; at 0 the most likely token."""

    def __init__(self, context: Context, temperature: float, seed: int) -> None:
        self._context = context
        self._chain = None
        if temperature:
            self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
            llama_cpp.llama_sampler_chain_add(self._chain, llama_cpp.llama_sampler_init_temp(temperature))
            llama_cpp.llama_sampler_chain_add(self._chain, llama_cpp.llama_sampler_init_dist(seed))

    def sample(self, logits: NDArray[np.float32], row: int) -> int:
        """The token after that `row` of a batch whose logits are all wanted; -1 is the last one of any batch."""
        if self._chain is None:
            return int(logits[row].argmax())
        return int(llama_cpp.llama_sampler_sample(self._chain, self._context.handle, row))

    def close(self) -> None:
        if self._chain is not None:
            llama_cpp.llama_sampler_free(self._chain)
