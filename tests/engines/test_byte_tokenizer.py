from __future__ import annotations

import pytest

from engines.byte_tokenizer import EOS_TOKEN_ID, byte_tokenizer
from engines.types import ChatMessage


@pytest.mark.parametrize("text", ["plain", " leading and  double spaces\n\t", "naïve 漢字 🙂", "it's 12 + 34 'n"])
def test_a_token_is_a_byte(text: str) -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(text) == tuple(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_every_byte_has_its_own_value_as_id() -> None:
    tokenizer = byte_tokenizer()
    assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes((i,)) for i in range(256)]


def test_end_of_text_is_the_last_id_and_has_no_text() -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == EOS_TOKEN_ID + 1
    assert tokenizer.eos_token_ids == {EOS_TOKEN_ID}
    assert tokenizer.decode([104, 105, EOS_TOKEN_ID]) == "hi"


def test_chat_is_one_line_per_message() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer.apply_chat_template([ChatMessage("system", "Be brief."), ChatMessage("user", "Hi")])
    assert bytes(tokens) == b"system: Be brief.\nuser: Hi\nassistant: "
