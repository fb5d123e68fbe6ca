"""What may be written about the state."""

from typing import Any

import pytest
from pydantic import ValidationError

from gateway.state.config import StateConfig


@pytest.mark.parametrize("url", ["redis://host:6379/0", "rediss://host", "unix:///run/redis.sock"])
def test_addresses_of_a_redis(url: str) -> None:
    assert StateConfig(url=url, password_env="X").url == url


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"url": "http://host"}, "must begin with"),
        ({"url": "redis://:secret@host"}, "must not hold a password"),
        ({"password_env": "X"}, "needs a url"),
        ({"timeout_s": 0}, "greater than 0"),
        ({"namespace": "a b"}, "pattern"),
        ({"unknown": 1}, "not permitted"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        StateConfig(**fields)
