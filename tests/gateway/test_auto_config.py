"""What an operator may write under `auto`, and how mistakes are told."""

import pytest
from pydantic import ValidationError

from gateway.auto_config import AutoCandidate, AutoConfig
from tests.gateway.auto_world import auto_fields, candidate, settings
from tests.gateway.fakes import config

_CHEAP, _DEAR = candidate("weak", 1.0), candidate("strong", 10.0)


def _mistake(**fields: object) -> str:
    with pytest.raises(ValidationError) as caught:
        AutoConfig.model_validate({"candidates": [_CHEAP, _DEAR]} | fields)
    return str(caught.value)


def test_the_last_candidate_is_the_strongest_and_names_its_ability() -> None:
    auto = AutoConfig.model_validate({"candidates": [_CHEAP, candidate("strong", 10.0, "org/Strong")]})
    assert auto.strongest.ability_name == "org/Strong"
    assert auto.candidates[0].ability_name == "weak"
    assert auto.candidate("weak") == auto.candidates[0]
    assert auto.candidate("other") is None


def test_a_cost_is_of_tokens_in_and_out() -> None:
    assert AutoCandidate.model_validate(_DEAR).cost_usd(1000, 100) == pytest.approx(0.014)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"candidates": [_CHEAP]}, "at least 2 items"),
        ({"candidates": [_CHEAP, _CHEAP]}, "weak is named by more than one"),
        ({"candidates": [candidate("a", 1, "same"), candidate("b", 2, "same")]}, "same is named by more than one"),
        ({"candidates": [_DEAR, _CHEAP]}, "weak is not dearer than strong"),
        ({"candidates": [_CHEAP, candidate("strong", 1.0)]}, "strong is not dearer than weak"),
        ({"policy": {"floors": {"bank": "gpt"}}}, "the floor gpt is not one of the candidates"),
        ({"policy": {"floor": "gpt"}}, "the floor gpt is not one of the candidates"),
        ({"policy": {"goal": {"kind": "bound", "max_quality_loss": 0.1}}}, "needs calibration"),
        ({"calibration": "logs"}, "no effect on a goal of kind share"),
        ({"policy": {"exploration": 0.9}}, "less than or equal to 0.5"),
        ({"polcy": {}}, "Extra inputs"),
    ],
)
def test_mistakes_are_named(fields: dict[str, object], words: str) -> None:
    assert words in _mistake(**fields)


@pytest.mark.parametrize(
    ("models", "fields", "words"),
    [
        (("echo", "weak"), auto_fields("default"), "auto.candidates has strong, but the models are echo, weak"),
        (("auto", "weak", "strong"), auto_fields("default"), "no model may be named auto"),
        (("weak", "strong"), auto_fields("default", shadow="default"), "there is no request_log"),
    ],
)
def test_auto_fits_the_fleet(models: tuple[str, ...], fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(*models, auto=fields)


def test_a_request_log_needs_room_for_two_files() -> None:
    with pytest.raises(ValidationError, match="two files"):
        settings(auto_fields("default"), request_log={"folder": "x", "max_file_bytes": 10, "max_total_bytes": 19})
