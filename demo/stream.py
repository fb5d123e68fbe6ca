"""Token rows: the corpus packed into one flat array that every model trains on."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerFast

from demo.chats import Chat
from demo.corpus import Document
from demo.tokenizer import END_OF_TEXT, token_id

Tokens = npt.NDArray[np.uint16]
ROW_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class TokenStream:
    """Tokens of whole rows, `[num_rows * ROW_TOKENS]`, read in aligned windows.

    A window of `length` tokens starts at a multiple of `length`, so that a row of teacher probabilities computed once
    serves every pass over the text.
    """

    tokens: Tokens

    @property
    def num_rows(self) -> int:
        return len(self.tokens) // ROW_TOKENS

    def num_windows(self, length: int) -> int:
        """How many aligned windows of `length` tokens there are."""
        return len(self.tokens) // length

    def windows(self, length: int, indices: Sequence[int]) -> torch.Tensor:
        """The windows at `indices`: int64 `[len(indices), length]`."""
        table = self.tokens[: self.num_windows(length) * length].reshape(-1, length)
        return torch.from_numpy(table[list(indices)].astype(np.int64))

    def save(self, path: Path) -> None:
        """Writes the tokens to `path` (npy)."""
        np.save(path, self.tokens)

    @classmethod
    def load(cls, path: Path) -> "TokenStream":
        """The stream that `save` wrote."""
        return cls(np.load(path))


class WindowOrder:
    """A seeded order of windows: every window once an epoch, in a new order each epoch.

    A batch depends only on the step, so a resumed run needs no loader state.
    """

    def __init__(self, num_windows: int, batch_size: int, seed: int) -> None:
        self._num_windows = num_windows
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def batch(self, step: int) -> list[int]:
        """Window indices of a step, `batch_size` of them."""
        start = step * self._batch_size
        return [self._window(position) for position in range(start, start + self._batch_size)]

    def _window(self, position: int) -> int:
        epoch, offset = divmod(position, self._num_windows)
        if epoch != self._epoch:
            self._permutation = list(range(self._num_windows))
            random.Random(f"{self._seed}-{epoch}").shuffle(self._permutation)
            self._epoch = epoch
        return self._permutation[offset]


def pack_documents(documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast) -> TokenStream:
    """Documents end to end, each closed by the end-of-text token; the last part of a row is dropped."""
    end = token_id(tokenizer, END_OF_TEXT)
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document.text)
        ids.append(end)
    whole = len(ids) // ROW_TOKENS * ROW_TOKENS
    return TokenStream(np.array(ids[:whole], dtype=np.uint16))


def pack_chats(chats: Iterable[Chat], tokenizer: PreTrainedTokenizerFast) -> TokenStream:
    """Rows of conversations: every row begins with one, as a request does; the last of a row may be cut."""
    end = token_id(tokenizer, END_OF_TEXT)
    rows: list[int] = []
    row: list[int] = []
    for chat in chats:
        row += tokenizer.encode(tokenizer.apply_chat_template(list(chat.messages), tokenize=False))
        row.append(end)
        if len(row) >= ROW_TOKENS:
            rows += row[:ROW_TOKENS]
            row = []
    return TokenStream(np.array(rows, dtype=np.uint16))


def concatenate(streams: Sequence[TokenStream]) -> TokenStream:
    """The streams one after another."""
    return TokenStream(np.concatenate([stream.tokens for stream in streams]))
