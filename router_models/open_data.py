"""Which parts of the routing tables the shipped artifact may learn from: those whose licence is known and permissive.

A source's own licence covers its results; a prompt keeps the licence of the data set that it comes from. Left out are
data sets whose licence is unknown, disputed, non-commercial or share-alike: the artifact holds no text, but whether
weights that were fitted to text are a work derived from it is not settled. `default/README.md` tells the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from router_models.data import Group

# By source, and there by the start of the subset's name; "" is all of the source. Licences of the prompts.
OPEN: Mapping[str, Mapping[str, str]] = {
    "routellm_mmlu": {"": "MIT"},
    "mmlu_pro": {"": "MIT"},
    "zeroeval_crux": {"": "MIT"},
    "zeroeval_math_l5": {"": "MIT"},
    "llmrouter": {
        "commonsense_qa": "MIT",
        "gsm8k": "MIT",
        "human_eval": "MIT",
        "math": "MIT",
        "mbpp": "CC-BY-4.0",
        "mmlu": "MIT",
    },
    "routerarena": {
        "FinQA": "MIT",
        "MATH": "MIT",
        "MMLU_": "MIT",
        "MMLUPro_": "MIT",
        "MathQA": "Apache-2.0",
        "MedMCQA": "MIT",
        "PubMedQA": "MIT",
    },
}


def openly_licensed(groups: Iterable[Group]) -> list[Group]:
    """The prompts of these groups that the shipped artifact may learn from; groups with none of them are left out."""
    kept = []
    for group in groups:
        starts = tuple(OPEN.get(group.source, ()))
        rows = np.flatnonzero([str(name).startswith(starts) for name in group.subset]) if starts else ()
        if len(rows):
            kept.append(group.take(np.asarray(rows, dtype=np.intp)))
    return kept


def licences(groups: Sequence[Group]) -> dict[str, int]:
    """How many prompts of `openly_licensed` groups come under each licence."""
    found: dict[str, int] = {}
    for group in groups:
        for name in group.subset:
            licence = next(value for start, value in OPEN[group.source].items() if str(name).startswith(start))
            found[licence] = found.get(licence, 0) + 1
    return found
