"""What the target would say: its most probable next tokens at every position of a stream, computed once and kept."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaForCausalLM

from demo.model import generate, logits_of, maybe_compiled
from demo.stream import ROW_TOKENS, TokenStream

BLOCK_ROWS = 4  # rows computed together, always the same ones, so that a compiled forward sees one shape


def fingerprint(model: LlamaForCausalLM) -> str:
    """A digest of the weights: what another target said is not used."""
    digest = hashlib.sha256()
    for weight in model.parameters():
        digest.update(weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class TeacherProbs:
    """The target's next-token distribution, cut to its `k` most probable tokens.

    `ids` int64 and `probs` fp32, both `[batch, length, k]`; what is missing from a sum of 1 lies on all other tokens.
    """

    ids: torch.Tensor
    probs: torch.Tensor


class Teacher:
    """The target's distribution over a stream, filled in blocks of rows as windows are asked for.

    Keeps three arrays under `folder`, memory-mapped: ids, probabilities, and which rows are filled; the folder must
    belong to this target and stream. A row is computed with no context before it, so the second row of a longer window
    is taught as if it began there.
    """

    def __init__(
        self, target: LlamaForCausalLM, stream: TokenStream, top_k: int, folder: Path, compiled: bool = False
    ) -> None:
        self._target = target
        self._predict = maybe_compiled(self._predict_rows, compiled)
        self._stream = stream
        self._top_k = top_k
        shape = (stream.num_rows, ROW_TOKENS, top_k)
        folder.mkdir(parents=True, exist_ok=True)
        self._ids = self._kept(folder / f"ids-{stream.num_rows}-{top_k}.npy", np.uint16, shape)
        self._probs = self._kept(folder / f"probs-{stream.num_rows}-{top_k}.npy", np.float16, shape)
        self._filled = self._kept(folder / f"filled-{stream.num_rows}-{top_k}.npy", np.bool_, shape[:1])

    @staticmethod
    def _kept(path: Path, dtype: type, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """A memory-mapped array at `path`, zeros where it is new."""
        if path.exists():
            return np.lib.format.open_memmap(path, "r+")
        return np.lib.format.open_memmap(path, "w+", dtype, shape)

    def probs(self, indices: Sequence[int], length: int) -> TeacherProbs:
        """Distributions over the aligned windows at `indices`, of at most two rows each."""
        rows = {position // ROW_TOKENS for index in indices for position in (index * length, (index + 1) * length - 1)}
        for block in sorted({row // BLOCK_ROWS for row in rows if not self._filled[row]}):
            self._fill(range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, self._stream.num_rows)))
        ids = self._ids.reshape(-1, self._top_k)
        probs = self._probs.reshape(-1, self._top_k)
        spans = [slice(index * length, (index + 1) * length) for index in indices]
        return TeacherProbs(
            torch.from_numpy(np.stack([ids[span] for span in spans]).astype(np.int64)),
            torch.from_numpy(np.stack([probs[span] for span in spans]).astype(np.float32)),
        )

    def _fill(self, rows: range) -> None:
        ids, probs = self._predict(self._stream.windows(ROW_TOKENS, rows).to(self._target.device))
        self._ids[rows] = ids.cpu().numpy().astype(np.uint16)
        self._probs[rows] = probs.cpu().numpy().astype(np.float16)
        self._filled[rows] = True

    @torch.no_grad()
    def _predict_rows(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits_of(self._target, tokens).float()
        best = logits.topk(self._top_k, dim=-1)
        return best.indices, (best.values - logits.logsumexp(-1, keepdim=True)).exp()


def write_rows(
    target: LlamaForCausalLM, prompts: torch.Tensor, temperature: float, batch_size: int = 128
) -> TokenStream:
    """Text that the target writes after `prompts` `[num_windows, prompt_length]`: half a row each."""
    num_new_tokens = ROW_TOKENS // 2 - prompts.shape[1]
    batches = [
        generate(target, prompts[start : start + batch_size], num_new_tokens, temperature)
        for start in range(0, len(prompts), batch_size)
    ]
    tokens = torch.cat(batches).numpy().astype(np.uint16).reshape(-1)
    return TokenStream(tokens[: len(tokens) // ROW_TOKENS * ROW_TOKENS])
