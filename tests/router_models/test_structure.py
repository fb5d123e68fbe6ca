import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_models.prompt import Prompt, Turn
from router_models.structure import FEATURE_NAMES, structure, vectors

_CHOICE = """Which of the following is NOT a prime number greater than 10?
A. 11
B. 12 dollars
C. All of the above
Answer:"""


def _of(text: str) -> dict[str, float]:
    return structure(Prompt.from_text(text))


def test_names_are_distinct_and_in_one_order() -> None:
    assert len(set(FEATURE_NAMES)) == len(FEATURE_NAMES) <= 120
    assert tuple(structure(Prompt.from_text("anything"))) == FEATURE_NAMES


def test_options_are_counted_and_told_from_the_stem() -> None:
    found = _of(_CHOICE)
    assert found["options"] == 3
    assert found["numeric_option_share"] == pytest.approx(2 / 3)
    assert found["stem_asks"] == 1.0
    assert found["ends_in_answer"] == 1.0
    assert found["has_all_of_these"] == 1.0
    assert found["words_negation"] > 0
    assert _of("no options")["options"] == 0


def test_code_and_mathematics_are_seen() -> None:
    code = _of("Fix this:\n```python\ndef f(x):\n    return x\n```")
    assert code["code_block"] == 1.0
    assert code["code_words"] > 0.5
    assert code["indented_share"] > 0
    formula = _of(r"Find $\frac{1}{2} + \sqrt{3}$ where x = 2 and y = 31415.")
    assert formula["latex"] > 0.6
    assert formula["longest_number"] == 5
    assert formula["words_solve"] > 0


def test_the_conversation_and_the_limits_count() -> None:
    turns = (Turn("user", "sort this list"), Turn("assistant", "done"), Turn("user", "no, that's wrong"))
    found = structure(Prompt(turns, max_tokens=100, num_tools=2, response_format="json"))
    assert found["is_correction"] == 1.0
    assert found["user_turns"] == pytest.approx(np.log(2))
    assert found["log_max_tokens"] == pytest.approx(np.log(101))
    assert found["tools"] > 1
    assert found["wants_json"] == 1.0
    assert found["log_assistant_chars"] > 0
    assert structure(Prompt(turns[:1]))["is_correction"] == 0.0


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300))
def test_any_text_has_finite_features(text: str) -> None:
    assert np.isfinite(vectors([Prompt.from_text(text)])).all()


def test_other_scripts_are_seen() -> None:
    assert _of("Привет, как дела?")["non_ascii_share"] > 0.5
    assert _of("hello")["non_ascii_share"] == 0.0


def test_no_prompts_are_no_rows() -> None:
    assert vectors([]).shape == (0, len(FEATURE_NAMES))


@given(st.text())
def test_characters_are_counted_as_unicode_has_them(text: str) -> None:
    found = _of(text)
    assert found["digit_share"] == pytest.approx(sum(map(str.isdigit, text)) / max(len(text), 1))
    assert found["upper_share"] == pytest.approx(sum(map(str.isupper, text)) / max(len(text), 1))


@given(st.text(st.characters(max_codepoint=127)))
def test_and_so_are_those_of_ascii(text: str) -> None:
    found = _of(text)
    assert found["digit_share"] == pytest.approx(sum(map(str.isdigit, text)) / max(len(text), 1))
    assert found["upper_share"] == pytest.approx(sum(map(str.isupper, text)) / max(len(text), 1))
