"""A tiny library of two modules, and a tokenizer and model small enough to train in a moment."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo.model import build_model
from demo.recipe import Recipe, Schedule, Shape
from demo.tokenizer import train_tokenizer

ALPHA = '''"""Counting things.

It counts.
"""


def count(items, start=0):
    """Return how many items there are."""
    return start + len(items)


class Counter:
    """Counts as it is called."""

    def __init__(self, start: int = 0):
        self.value = start

    def add(self, amount):
        """Add an amount."""
        self.value += amount

    def _hidden(self):
        """Not for users."""
'''

BETA = '''"""Greets."""


def greet(name: str) -> str:
    """Return a greeting.

    The greeting is long and has a second paragraph, so that an explanation is longer than a summary of it.
    """
    return "Hello, " + name + "! I hope that this file is long enough to be read as a document of the corpus."
'''


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stdlib")
    (root / "alpha.py").write_text(ALPHA)
    (root / "package").mkdir()
    (root / "package" / "__init__.py").write_text(BETA)
    (root / "package" / "copy.py").write_text(BETA)
    (root / "test").mkdir()
    (root / "test" / "test_alpha.py").write_text(ALPHA + "# only a test\n")
    (root / "tiny.py").write_text("x = 1\n")
    (root / "pydoc_data").mkdir()
    (root / "pydoc_data" / "topics.py").write_text("# made\ntopics = {'while': 'The while statement\\n\\nRepeats.'}\n")
    return root


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([ALPHA, BETA] * 20, vocab_size=512, max_positions=2048)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    shape = Shape(hidden_size=16, num_layers=1, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8)
    schedule = Schedule(
        num_steps=6,
        peak_lr=1e-2,
        warmup_steps=2,
        batch_tokens=64,
        window_tokens=32,
        long_window_tokens=64,
        long_share=0.2,
    )
    return Recipe(
        vocab_size=512,
        shapes={"target": shape, "mid": shape, "draft": shape},
        schedules={"target": schedule, "mid": schedule, "draft": schedule},
    )


def tiny_model(recipe: Recipe, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return build_model(recipe.shapes["target"], recipe, eos_token_id=0)
