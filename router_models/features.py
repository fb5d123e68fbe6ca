"""All that is computed from prompts, for training and serving alike. What changes a number raises the version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from router_models import structure, text
from router_models.prompt import Prompt

FEATURE_VERSION = 1


@dataclass(frozen=True, eq=False, slots=True)
class Features:
    """`structure` float32 [num_prompts, len(FEATURE_NAMES)]; `counts` sparse float32 [num_prompts, NUM_COLUMNS]."""

    structure: NDArray[np.float32]
    counts: sp.csr_matrix

    def __len__(self) -> int:
        return len(self.structure)

    def take(self, rows: NDArray[np.intp]) -> Features:
        return Features(self.structure[rows], self.counts[rows])


def extract(prompts: Sequence[Prompt]) -> Features:
    """The features of these prompts."""
    return Features(structure.vectors(prompts), text.count_all(prompt.text for prompt in prompts))


def stack(parts: Sequence[Features]) -> Features:
    """The prompts of all parts, in order."""
    counts = sp.vstack([part.counts for part in parts], format="csr")
    return Features(np.concatenate([part.structure for part in parts]), counts)
