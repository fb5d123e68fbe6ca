"""A small world whose truth is known: prompts about a few topics, and models that find some of them hard.

Ordering its prompts by topic, which is all there is to know, gives an exact APGR of 0.69 for the strongest pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from router_models.data import Group, group_of
from router_models.embedding import DIMENSION, SentenceEmbedding
from router_models.prompt import Prompt

# Words of a topic and how hard it is: the strong model fails only the hardest, the weak one all but the easiest.
TOPICS = {
    "colours": ("red blue green yellow paint colour shade bright", -2.0),
    "animals": ("dog cat horse bird fish tail wing paw", -1.0),
    "algebra": ("solve equation matrix polynomial integer root factor prime", 1.0),
    "topology": ("manifold homology sheaf functor fibration compact cover limit", 3.0),
}
ABILITIES = {"acme/Strong-1_5": 2.0, "weak": -1.0, "middle": 0.5, "tiny": -2.0}


class Topics(SentenceEmbedding):
    """Knows of a text which topic's words it has."""

    def __init__(self, checksum: str = "1" * 64) -> None:
        self.checksum = checksum

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        found = np.zeros((len(texts), DIMENSION), np.float32)
        for row, text in enumerate(texts):
            for column, (words, _) in enumerate(TOPICS.values()):
                found[row, column] = any(word in text for word in words.split())
        return found


def world(
    num_prompts: int = 400, seed: int = 0, source: str = "world", models: tuple[str, ...] = tuple(ABILITIES)
) -> Group:
    """Prompts with results drawn by the models' abilities: P(right) = sigmoid(2 (ability - difficulty))."""
    rng = np.random.default_rng(seed)
    prompts, results = [], {}
    for i in range(num_prompts):
        topic = list(TOPICS)[rng.integers(len(TOPICS))]
        words, difficulty = TOPICS[topic]
        chosen = rng.choice(words.split(), size=int(rng.integers(4, 12)))
        name = f"{source}-{seed}-{i}"
        prompts.append((name, Prompt.from_text(f"Question {rng.integers(10**6)}: {' '.join(chosen)}?"), topic))
        results[name] = {
            model: float(rng.random() < 1 / (1 + np.exp(-2 * (ABILITIES[model] - difficulty)))) for model in models
        }
    return group_of(source, prompts, results)


def write_tables(folder: Path, *groups: Group) -> Path:
    """The two files of a folder of tables."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [
        {"prompt_id": i, "source": group.source, "subset": str(subset), "prompt": prompt.text}
        for group in groups
        for i, subset, prompt in zip(group.ids, group.subset, group.prompts, strict=True)
    ]
    outcomes = [
        {"prompt_id": i, "model": model, "score": float(score)}
        for group in groups
        for i, row in zip(group.ids, group.results, strict=True)
        for model, score in zip(group.models, row, strict=True)
        if np.isfinite(score)
    ]
    pq.write_table(pa.Table.from_pylist(prompts), folder / "prompts.parquet")
    pq.write_table(pa.Table.from_pylist(outcomes), folder / "outcomes.parquet")
    return folder
