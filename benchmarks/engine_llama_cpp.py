"""llama.cpp as a system of `benchmarks.engine`."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import gguf_file
from benchmarks.engine_systems import Prompts, Timing
from benchmarks.llama_cpp_model import Context, Model


class LlamaCpp:
    """The same bf16 weights as a GGUF file: one batch holds all prompts, then one token of each sequence a step, as in
    llama.cpp's own `llama-batched-bench`, with the most likely token picked from the logits."""

    name = "llama.cpp"

    def __init__(self, model: Path) -> None:
        """Raises what `gguf_file.write` raises, OSError if llama.cpp does not load the file."""
        self._model = Model(gguf_file.materialize(model))
        self._context: Context | None = None

    def run(self, prompts: Prompts, num_new: int) -> Timing:
        """Timings for prompts of one length."""
        length = len(prompts[0])
        context = self._context_for(len(prompts), length + num_new)
        context.clear()
        sequences = np.arange(len(prompts), dtype=np.int32)
        positions = np.tile(np.arange(length, dtype=np.int32), len(prompts))
        started = time.perf_counter()
        logits = context.decode(np.concatenate(prompts), positions, sequences.repeat(length), positions == length - 1)
        chosen = logits.argmax(-1)
        first = time.perf_counter()
        for position in range(length, length + num_new - 1):
            chosen = context.decode(chosen, np.full_like(sequences, position), sequences).argmax(-1)
        return Timing(first - started, time.perf_counter() - first)

    def close(self) -> None:
        if self._context is not None:
            self._context.close()
        self._model.close()

    def _context_for(self, num_sequences: int, num_tokens: int) -> Context:
        """The context at hand where it fits the load exactly, else a new one."""
        context = self._context
        if context is not None and context.num_sequences == num_sequences and context.num_tokens >= num_tokens:
            return context
        if context is not None:
            context.close()
        self._context = Context(self._model, num_sequences, num_tokens, torch.get_num_threads())
        return self._context
