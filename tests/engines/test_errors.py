"""Errors cross process borders whole."""

import pickle

import pytest

from engines import errors


@pytest.mark.parametrize(
    "error",
    [
        errors.EngineError("m"),
        errors.InvalidRequestError("m", "n"),
        errors.ContextLengthError(10, 20, 25),
        errors.KVCapacityError(9, 8, 16),
        errors.UnsupportedParameterError("m", "prompt"),
        errors.EngineOverloadedError("m", retry_after_s=2.5),
        errors.EngineDeadError("m"),
        errors.RemoteServerError("m", 418),
        errors.EvaluationError("m"),
        errors.UnsupportedModelError("m"),
    ],
)
def test_pickling_keeps_type_message_and_fields(error: errors.EngineError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error) == error.message
    assert vars(copy) == vars(error)


def test_every_error_of_the_tree_is_drawn_in_it() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.EngineError)]
    assert len(kinds) > 10
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds)


def test_context_length_error_says_both_numbers() -> None:
    assert "25 tokens" in str(errors.ContextLengthError(10, 20, 25))
    assert "30 tokens (10 in the prompt, 20 in the completion)" in str(errors.ContextLengthError(10, 20, 25))
