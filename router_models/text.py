"""Hashed n-grams of words and of bytes, without a vocabulary: the same code counts them in training and in serving.

Words (with single punctuation marks) and pairs of words go into one space of 2^15 columns, runs of 3 to 5 bytes into a
second of 2^16 behind it (feature hashing: arXiv 0902.2206). Counts enter as 1 + log(count), weighted by inverse
document frequency, each of the two parts of length one.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

WORD_BITS = 15
BYTE_BITS = 16
NUM_COLUMNS = (1 << WORD_BITS) + (1 << BYTE_BITS)
_BYTE_RUNS = (3, 4, 5)
_TOKEN = re.compile(r"\w+|[^\w\s]")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0x9E3779B1), np.uint64(0x85EBCA77)

Columns = NDArray[np.int64]
Values = NDArray[np.float32]


def count(text: str) -> tuple[Columns, Values]:
    """Ascending columns of the n-grams of `text` and 1 + log of how often each occurs."""
    lowered = text.lower()
    columns, counts = np.unique(np.concatenate([_word_columns(lowered), _byte_columns(lowered)]), return_counts=True)
    return columns, (1 + np.log(counts)).astype(np.float32)


def count_all(texts: Iterable[str]) -> sp.csr_matrix:
    """Float32 [num_texts, NUM_COLUMNS], rows as `count`."""
    rows = [count(text) for text in texts]
    ends = np.cumsum([0, *(len(columns) for columns, _ in rows)])
    columns = np.concatenate([columns for columns, _ in rows]) if rows else np.zeros(0, np.int64)
    values = np.concatenate([values for _, values in rows]) if rows else np.zeros(0, np.float32)
    return sp.csr_matrix((values, columns, ends), shape=(len(rows), NUM_COLUMNS))


def inverse_document_frequency(counts: sp.csr_matrix, min_documents: int = 2) -> Values:
    """Float32 [NUM_COLUMNS]; 0 where fewer than `min_documents` texts have the n-gram: it cannot generalise."""
    documents = np.bincount(counts.indices, minlength=NUM_COLUMNS)
    weights = np.log((1 + counts.shape[0]) / (1 + documents)) + 1
    return np.where(documents >= min_documents, weights, 0).astype(np.float32)


def weigh(counts: sp.csr_matrix, idf: Values) -> sp.csr_matrix:
    """TF-IDF of all rows: float32 [num_texts, NUM_COLUMNS]; words and bytes each of length one, or zero."""
    weighed = (counts @ sp.diags(idf)).tocsr()
    parts = [weighed[:, : 1 << WORD_BITS], weighed[:, 1 << WORD_BITS :]]
    scaled = [sp.diags(1 / np.maximum(_row_lengths(part), 1e-12)) @ part for part in parts]
    return sp.hstack(scaled, format="csr", dtype=np.float32)


def weigh_one(columns: Columns, values: Values, idf: Values) -> Values:
    """TF-IDF of one text's `count`: float32 [num_columns_in_it], as `weigh` would."""
    weighed = values * idf[columns]
    split = int(np.searchsorted(columns, 1 << WORD_BITS))
    for part in (weighed[:split], weighed[split:]):
        part /= max(float(np.linalg.norm(part)), 1e-12)
    return weighed


def _row_lengths(matrix: sp.csr_matrix) -> NDArray[np.float64]:
    return np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1), dtype=np.float64).ravel())


def _word_columns(text: str) -> Columns:
    hashes = _hash_words(_TOKEN.findall(text))
    pairs = hashes[:-1] * _FIRST + hashes[1:] * _SECOND + np.uint64(1)
    return _fold(np.concatenate([hashes, pairs]), WORD_BITS)


def _hash_words(words: Sequence[str]) -> NDArray[np.uint64]:
    return np.array([zlib.crc32(word.encode(errors="replace")) for word in words], dtype=np.uint64)


def _byte_columns(text: str) -> Columns:
    data = np.frombuffer(f" {' '.join(text.split())} ".encode(errors="replace"), dtype=np.uint8).astype(np.uint64)
    runs, found = data, []
    for length in range(2, max(_BYTE_RUNS) + 1):
        runs = runs[: max(len(data) - length + 1, 0)] * np.uint64(257) + data[length - 1 :]
        if length in _BYTE_RUNS:
            found.append(_fold(runs + np.uint64(length), BYTE_BITS))
    return np.concatenate(found) + (1 << WORD_BITS)


def _fold(hashes: NDArray[np.uint64], bits: int) -> Columns:
    """Multiplicative hashing: the upper bits of the product are the well mixed ones."""
    return (hashes * _GOLDEN >> np.uint64(64 - bits)).astype(np.int64)
