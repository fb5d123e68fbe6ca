import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_models.text import (
    NUM_COLUMNS,
    WORD_BITS,
    count,
    count_all,
    inverse_document_frequency,
    weigh,
    weigh_one,
)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_any_text_counts_into_ascending_columns(text: str) -> None:
    columns, values = count(text)
    assert (np.diff(columns) > 0).all()
    assert len(columns) == 0 or (columns[0] >= 0 and columns[-1] < NUM_COLUMNS)
    assert (values >= 1).all()


def test_case_and_spacing_do_not_change_words() -> None:
    assert (count("Two  WORDS")[0] == count("two words")[0]).all()


def test_repetition_counts_by_its_logarithm() -> None:
    columns, values = count("echo " * 8)
    words = values[columns < 1 << WORD_BITS]
    assert words.max() == pytest.approx(1 + np.log(8))


def test_order_of_words_is_seen_in_pairs() -> None:
    assert set(count("dog bites man")[0]) != set(count("man bites dog")[0])


def test_rare_n_grams_weigh_nothing_and_common_ones_little() -> None:
    counts = count_all(["the cat", "the dog", "the dog"])
    idf = inverse_document_frequency(counts)
    everywhere, twice, once = (
        idf[next(iter(set(count(word)[0]) - set(count("x")[0])))] for word in ("the", "dog", "cat")
    )
    assert once == 0
    assert 0 < everywhere < twice


def test_one_text_is_weighed_as_many_are() -> None:
    texts = ["alpha beta gamma", "beta gamma delta", "gamma delta alpha beta"]
    counts = count_all(texts)
    idf = inverse_document_frequency(counts)
    rows = weigh(counts, idf)
    for i, text in enumerate(texts):
        columns, values = count(text)
        np.testing.assert_allclose(rows[i, columns].toarray()[0], weigh_one(columns, values, idf), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(rows.multiply(rows).sum(axis=1)).ravel(), 2.0, rtol=1e-5)


def test_unknown_words_leave_an_empty_row() -> None:
    idf = inverse_document_frequency(count_all(["aaa", "aaa"]))
    columns, values = count("zzz yyy")
    assert not weigh_one(columns, values, idf).any()
