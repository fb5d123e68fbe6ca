"""A tiny checkpoint with a tokenizer, and evaluation sets for it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from engines.precision.data import Row
from engines.precision.examples import Example
from tests.engines.quantized_checkpoints import save_dense, tiny_tokenizer

WORDS = ("alpha", "beta", "gamma", "delta", "x+1", "(y)", "zero", "omega")


def save_model(folder: Path) -> Path:
    """A random Llama in bf16 over a vocabulary of 96 bytes, with a chat template."""
    save_dense(folder)
    tiny_tokenizer(["a", "b"]).save_pretrained(folder)
    return folder


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def example(token_ids: Sequence[int], first_scored: int, num_prompt_tokens: int | None = None) -> Example:
    row = Row(1, "x", None, None, None, None, {})
    return Example(row, tuple(token_ids), first_scored, num_prompt_tokens)
