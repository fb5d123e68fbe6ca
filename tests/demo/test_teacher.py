from pathlib import Path

import numpy as np
import pytest
import torch

from demo.recipe import Recipe
from demo.stream import ROW_TOKENS, TokenStream
from demo.teacher import Teacher, fingerprint, write_rows
from tests.demo.conftest import tiny_model


@pytest.fixture
def stream() -> TokenStream:
    return TokenStream(np.random.default_rng(0).integers(5, 512, 4 * ROW_TOKENS).astype(np.uint16))


def test_probabilities_are_the_targets(tmp_path: Path, recipe: Recipe, stream: TokenStream) -> None:
    target = tiny_model(recipe)
    taught = Teacher(target, stream, top_k=4, folder=tmp_path).probs([2], 512)
    with torch.no_grad():
        probs = target(input_ids=stream.windows(ROW_TOKENS, [1])).logits.softmax(-1)
    assert taught.ids.shape == taught.probs.shape == (1, 512, 4)
    # The teacher reads in bf16.
    torch.testing.assert_close(taught.probs, probs[:, :512].gather(-1, taught.ids), atol=1e-3, rtol=5e-2)


def test_a_long_window_is_two_rows(tmp_path: Path, recipe: Recipe, stream: TokenStream) -> None:
    teacher = Teacher(tiny_model(recipe), stream, top_k=4, folder=tmp_path)
    long = teacher.probs([1], 2 * ROW_TOKENS)
    short = teacher.probs([2, 3], ROW_TOKENS)
    assert torch.equal(long.ids.flatten(), short.ids.flatten())


def test_what_was_computed_is_kept(tmp_path: Path, recipe: Recipe, stream: TokenStream) -> None:
    first = Teacher(tiny_model(recipe), stream, top_k=4, folder=tmp_path).probs([0], 512)
    # Another model would say something else: that it does not shows that the answer was read, not computed.
    again = Teacher(tiny_model(recipe, seed=1), stream, top_k=4, folder=tmp_path).probs([0], 512)
    assert torch.equal(first.probs, again.probs)


def test_fingerprints_tell_targets_apart(recipe: Recipe) -> None:
    assert fingerprint(tiny_model(recipe)) == fingerprint(tiny_model(recipe))
    assert fingerprint(tiny_model(recipe)) != fingerprint(tiny_model(recipe, seed=1))


def test_the_target_writes_whole_rows_after_the_prompts(recipe: Recipe, stream: TokenStream) -> None:
    prompts = stream.windows(ROW_TOKENS // 2 - 4, [0, 1])
    torch.manual_seed(0)
    written = write_rows(tiny_model(recipe), prompts, temperature=0.8)
    assert written.num_rows == 1
    assert torch.equal(written.windows(ROW_TOKENS // 2, [0, 1])[:, :-4], prompts)
