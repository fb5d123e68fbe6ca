import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from demo.measure import agreement, answer_positions, fit, greedy_agreement_on_own_text
from demo.recipe import Recipe
from demo.stream import ROW_TOKENS, TokenStream
from tests.demo.conftest import tiny_model


@pytest.fixture
def stream() -> TokenStream:
    return TokenStream(np.random.default_rng(0).integers(5, 256, ROW_TOKENS).astype(np.uint16))


def test_answers_run_from_the_marker_to_the_end_of_the_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = torch.tensor([tokenizer.encode("<|user|>a<|end|><|assistant|>b<|end|><|user|>")])
    assert answer_positions(tokens, tokenizer).tolist() == [[False, False, False, True, True, False]]


def test_a_model_agrees_with_itself(recipe: Recipe, stream: TokenStream) -> None:
    model = tiny_model(recipe)
    itself = agreement(model, model, stream)
    assert itself.greedy == 1
    assert itself.overlap == pytest.approx(1, abs=1e-5)
    assert greedy_agreement_on_own_text(model, model, stream.windows(16, [0, 1])) == 1


def test_models_that_differ_agree_less(recipe: Recipe, stream: TokenStream) -> None:
    assert agreement(tiny_model(recipe, seed=1), tiny_model(recipe), stream).overlap < 0.9


def test_an_untrained_model_is_about_as_good_as_guessing(
    recipe: Recipe, stream: TokenStream, tokenizer: PreTrainedTokenizerFast
) -> None:
    value = fit(tiny_model(recipe), stream, tokenizer)
    assert value.loss == pytest.approx(np.log(recipe.vocab_size), rel=0.2)
    assert value.bits_per_byte > 0
