"""One precision's measurement: load the engine as a server would, read the evaluation set, ask it, and let it go."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engines.build import load_engine
from engines.loading import resolve_device, resolve_source
from engines.local import LoadedEngine
from engines.precision.answers import Answer, greedy_answers
from engines.precision.candidates import Candidate
from engines.precision.data import Row
from engines.precision.examples import Example, encode
from engines.precision.likelihood import KVSpace, Likelihood, likelihoods
from engines.tokenizer import Tokenizer

# Told what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one candidate said of each row, and the bytes it takes."""

    examples: Sequence[Example]
    likelihoods: Sequence[Likelihood]
    answers: Sequence[Answer | None]
    weight_bytes: int
    kv_bytes_per_token: float
    max_model_len: int

    @property
    def nats(self) -> float:
        return sum(likelihood.nats for likelihood in self.likelihoods)

    @property
    def num_scored(self) -> int:
        return sum(example.num_scored for example in self.examples)

    @property
    def loss(self) -> float:
        """Mean over all scored tokens of minus the log-likelihood, in nats."""
        return self.nats / self.num_scored


def measure(candidate: Candidate, rows: Sequence[Row], max_new_tokens: int, progress: Progress) -> Measurement:
    """Load, measure, free. Without `max_new_tokens` nothing is generated.

    Raises ModelLoadError and EvaluationError; the latter for rows that do not fit the engine, too.
    """
    progress(f"{candidate.name}: loading", 0, 0)
    engine = load_engine(candidate.config)
    try:
        return _measure(engine, candidate, rows, max_new_tokens, progress)
    finally:
        del engine
        _free()


def _measure(
    engine: LoadedEngine, candidate: Candidate, rows: Sequence[Row], max_new_tokens: int, progress: Progress
) -> Measurement:
    limits, config = engine.limits, candidate.config
    tokenizer = Tokenizer.load(resolve_source(config.model), config.revision)
    examples = encode(rows, tokenizer, limits.max_model_len)
    space = KVSpace(limits.num_blocks, limits.block_size, resolve_device(config.device))
    # Before the first request: reading overwrites blocks that the prefix cache would otherwise know.
    read = likelihoods(
        engine.core.runner, examples, space, lambda done: progress(f"{candidate.name}: reading", done, len(examples))
    )
    num_prompts = sum(example.prompt is not None for example in examples) if max_new_tokens else 0
    answers: Sequence[Answer | None] = [None] * len(examples)
    if num_prompts:
        answers = greedy_answers(
            engine.core,
            examples,
            max_new_tokens=max_new_tokens,
            max_model_len=limits.max_model_len,
            progress=lambda done: progress(f"{candidate.name}: answering", done, num_prompts),
        )
    details = engine.card.details
    return Measurement(
        examples=examples,
        likelihoods=read,
        answers=answers,
        weight_bytes=int(details["weight_bytes"]),
        kv_bytes_per_token=int(details["kv_cache_bytes"]) / (limits.num_blocks * limits.block_size),
        max_model_len=limits.max_model_len,
    )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
