from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import InvalidRequestError
from engines.text_stream import TextStream, TextUpdate
from tests.engines.test_tokenizer import build

LETTERS = st.text("ab \N{ROCKET}é", max_size=20)


def _cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """`text` before the first complete stop string, and that string."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def _chunks(data: st.DataObject, token_ids: Sequence[int]) -> list[Sequence[int]]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(token_ids)), max_size=5)))
    return [token_ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(token_ids)], strict=True)]


@pytest.mark.parametrize("family", ["byte_level", "sentencepiece"])
@given(pieces=st.lists(LETTERS, max_size=4), stops=st.lists(LETTERS.filter(bool), max_size=3), data=st.data())
def test_the_text_ends_before_the_first_stop_string(
    family: str, pieces: list[str], stops: list[str], data: st.DataObject
) -> None:
    tokenizer = build(family)
    # Encoded in pieces, so that the same text comes in many tokenisations.
    token_ids = [token_id for piece in pieces for token_id in tokenizer.encode(piece, add_special_tokens=False)]
    expected, stop = _cut(tokenizer.decode(token_ids), stops)
    stream = TextStream(tokenizer, tuple(stops))
    texts, num_tokens, found = [], 0, None
    for chunk in _chunks(data, token_ids):
        update = stream.push(chunk)
        texts.append(update.text)
        num_tokens += update.num_tokens
        found = update.stop
        if found is not None:
            break
        assert update.num_tokens == len(chunk)
        assert expected.startswith("".join(texts))
    texts.append(stream.finish())
    assert ("".join(texts), found) == (expected, stop)
    if found is not None:
        assert _cut(tokenizer.decode(token_ids[:num_tokens]), stops)[1] == found, "enough tokens to complete it"
        assert _cut(tokenizer.decode(token_ids[: num_tokens - 1]), stops)[1] is None, "and not one more"


def _push(stop: tuple[str, ...], *texts: str) -> tuple[list[TextUpdate], str]:
    tokenizer = build("byte_level")
    stream = TextStream(tokenizer, stop)
    updates = [stream.push(tokenizer.encode(text)) for text in texts]
    return updates, stream.finish()


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    updates, rest = _push(("</end>",), "a<", "/en", "x<", "/")
    assert [update.text for update in updates] == ["a", "", "</enx", ""]
    assert rest == "</"


def test_a_stop_string_across_pushes() -> None:
    updates, rest = _push(("\n\n",), "one\n", "two\n", "\nthree")
    assert [update.text for update in updates] == ["one", "\ntwo", ""]
    assert updates[-1].stop == "\n\n"
    assert updates[-1].num_tokens == 1
    assert rest == ""


def test_the_first_to_be_complete_wins() -> None:
    assert _push(("abcd", "bc"), "xabcd")[0][-1].stop == "bc"
    assert _push(("c", "abc"), "xabcd")[0][-1] == TextUpdate("x", 4, "abc")


def test_nothing_is_held_without_stop_strings() -> None:
    tokenizer = build("byte_level")
    stream = TextStream(tokenizer, ())
    token_ids = tokenizer.encode("the lazy dog")
    assert stream.push(token_ids) == TextUpdate("the lazy dog", len(token_ids))
    assert stream.finish() == ""


def test_finish_gives_back_an_unfinished_character() -> None:
    tokenizer = build("byte_level")
    stream = TextStream(tokenizer, ("ab",))
    assert stream.push([*tokenizer.encode("xa"), tokenizer.encode("\N{ROCKET}")[0]]).text == "x"
    assert stream.finish() == "a\N{REPLACEMENT CHARACTER}"


def test_the_prompt_decides_about_the_first_space() -> None:
    tokenizer = build("sentencepiece")
    stream = TextStream(tokenizer, (" dog",), tokenizer.encode("the"))
    update = stream.push(tokenizer.encode("the dog"))
    assert (update.text, update.stop) == (" the", " dog")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        TextStream(build("byte_level"), ("a", ""))
    assert caught.value.param == "stop"
