"""All that is computed from prompts, for training and serving alike. What changes a number raises the version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from router_models import structure, text
from router_models.embedding import SentenceEmbedding
from router_models.prompt import Prompt

FEATURE_VERSION = 1


@dataclass(frozen=True, eq=False, slots=True)
class Features:
    """`structure` float32 [num_prompts, len(FEATURE_NAMES)]; `counts` sparse float32 [num_prompts, NUM_COLUMNS].

    `embedding` float32 [num_prompts, embedding.DIMENSION], where one was asked for.
    """

    structure: NDArray[np.float32]
    counts: sp.csr_matrix
    embedding: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.structure)

    def take(self, rows: NDArray[np.intp]) -> Features:
        return Features(
            self.structure[rows], self.counts[rows], None if self.embedding is None else self.embedding[rows]
        )


def extract(prompts: Sequence[Prompt], embedding: SentenceEmbedding | None = None) -> Features:
    """The features of these prompts."""
    texts = [prompt.text for prompt in prompts]
    embedded = None if embedding is None else embedding.embed(texts)
    return Features(structure.vectors(prompts), text.count_all(texts), embedded)


def stack(parts: Sequence[Features]) -> Features:
    """The prompts of all parts, in order, without embeddings."""
    counts = sp.vstack([part.counts for part in parts], format="csr")
    return Features(np.concatenate([part.structure for part in parts]), counts)
