from pathlib import Path

import numpy as np
import pytest
import torch

from demo.losses import cut_divergence, distillation_loss, text_loss
from demo.recipe import Recipe
from demo.stream import ROW_TOKENS, TokenStream
from demo.teacher import Teacher
from tests.demo.conftest import tiny_model


def test_divergence_from_itself_is_zero() -> None:
    log_probs = torch.randn(2, 3, 16).log_softmax(-1)
    best = log_probs.exp().topk(4, dim=-1)
    assert cut_divergence(log_probs, best.indices, best.values).abs().max() < 1e-5


def test_with_every_token_kept_it_is_the_divergence() -> None:
    model, teacher = torch.randn(2, 1, 5, 8).log_softmax(-1)
    ids = torch.arange(8).expand(1, 5, 8)
    expected = (teacher.exp() * (teacher - model)).sum(-1)
    torch.testing.assert_close(cut_divergence(model, ids, teacher.exp()), expected, atol=1e-4, rtol=1e-4)


def test_lumping_the_tail_never_overstates() -> None:
    model, teacher = torch.randn(2, 4, 5, 16).log_softmax(-1)
    best = teacher.exp().topk(4, dim=-1)
    whole = (teacher.exp() * (teacher - model)).sum(-1)
    cut = cut_divergence(model, best.indices, best.values)
    assert (cut >= -1e-5).all()
    assert (cut <= whole + 1e-5).all()


def test_the_mixture_is_of_text_loss_and_divergence(tmp_path: Path, recipe: Recipe) -> None:
    stream = TokenStream(np.random.default_rng(0).integers(5, 512, ROW_TOKENS).astype(np.uint16))
    model, target = tiny_model(recipe, seed=1), tiny_model(recipe, seed=2)
    teacher = Teacher(target, stream, top_k=8, folder=tmp_path)
    text = text_loss(model, stream)([0, 1], 32).item()
    assert distillation_loss(model, stream, teacher, teacher_weight=0)([0, 1], 32).item() == pytest.approx(
        text, abs=1e-3
    )
    own = Teacher(model, stream, top_k=8, folder=tmp_path / "own")
    # Rows of the teacher are longer than these windows, but a window at a row's start has the same context.
    assert distillation_loss(model, stream, own, teacher_weight=1)([0], 32).item() == pytest.approx(0, abs=1e-2)
