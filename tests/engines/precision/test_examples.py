from __future__ import annotations

import json

import pytest

from engines.errors import EvaluationError
from engines.precision.data import Row, _row
from engines.precision.examples import Example, encode
from engines.tokenizer import Tokenizer
from tests.engines.quantized_checkpoints import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer(["a", "b"]))


def row(**fields: object) -> Row:
    return _row(7, json.dumps(fields))


def encoded(tokenizer: Tokenizer, max_model_len: int = 100, **fields: object) -> Example:
    (example,) = encode([row(**fields)], tokenizer, max_model_len)
    return example


def test_a_text_is_scored_but_for_its_first_token(tokenizer: Tokenizer) -> None:
    example = encoded(tokenizer, text="xyz")
    assert example.token_ids == tokenizer.encode("xyz")
    assert (example.num_scored, example.prompt) == (2, None)


def test_a_reference_is_scored_after_its_prompt(tokenizer: Tokenizer) -> None:
    example = encoded(tokenizer, prompt="xa", reference="by")
    assert example.prompt == tokenizer.encode("xa")
    assert example.token_ids == tokenizer.encode("xa") + tokenizer.encode("by"), "no merge across the border"
    assert len(example.token_ids) == len(tokenizer.encode("xaby")) + 1
    assert example.num_scored == 2


def test_a_prompt_alone_is_only_answered(tokenizer: Tokenizer) -> None:
    example = encoded(tokenizer, prompt="xyz", answer="q")
    assert (example.num_scored, example.prompt) == (0, tokenizer.encode("xyz"))


def test_messages_go_through_the_chat_template(tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]
    example = encoded(tokenizer, messages=turns, reference="z")
    assert example.prompt == tokenizer.encode("xy")


def test_what_does_not_fit_is_refused_by_line(tokenizer: Tokenizer) -> None:
    for fields, longest in (({"text": "xyzx"}, 4), ({"prompt": "xy", "reference": "zx"}, 4), ({"prompt": "xyzx"}, 5)):
        encoded(tokenizer, longest, **fields)
        with pytest.raises(EvaluationError, match="Line 7 has 4 tokens, and the engine holds 3"):
            encoded(tokenizer, longest - 1, **fields)


def test_what_the_template_rejects_is_refused_by_line() -> None:
    hf_tokenizer = tiny_tokenizer(["a", "b"])
    hf_tokenizer.chat_template = "{{ raise_exception('only systems') }}"
    with pytest.raises(EvaluationError, match=r"Line 7: .*only systems"):
        encoded(Tokenizer(hf_tokenizer), messages=[{"role": "user", "content": "x"}])


def test_a_prompt_without_tokens_is_refused() -> None:
    hf_tokenizer = tiny_tokenizer(["a", "b"])
    hf_tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(EvaluationError, match="Line 7: the prompt has no tokens"):
        encoded(Tokenizer(hf_tokenizer), messages=[{"role": "user", "content": "x"}])
