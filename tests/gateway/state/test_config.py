"""What may be written about the state."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.state.config import StateConfig


@pytest.mark.parametrize(
    "url",
    [
        "redis://host:6379/0",
        "rediss://host",
        "unix:///run/redis.sock",
        "redis://user@host",
        "unix://user@/run/redis.sock?db=1",
    ],
)
def test_addresses_of_a_redis(url: str) -> None:
    assert StateConfig(url=url, password_env="X").url == url


def test_the_authorities_of_a_server_with_tls() -> None:
    assert StateConfig(url="rediss://user@host", ca_file="ca.pem").ca_file == Path("ca.pem")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"url": "http://host"}, "must begin with"),
        ({"url": "redis://:secret@host"}, "must not hold a password"),
        ({"url": "redis://user:secret@host"}, "must not hold a password"),
        ({"url": "redis://host?password=secret"}, "option password"),
        ({"url": "rediss://host?db=1&ssl_cert_reqs=none"}, "option ssl_cert_reqs"),
        ({"url": "redis://host?protocol"}, "option protocol"),
        ({"password_env": "X"}, "needs a url"),
        ({"ca_file": "ca.pem"}, "rediss://"),
        ({"url": "redis://host", "ca_file": "ca.pem"}, "rediss://"),
        ({"timeout_s": 0}, "greater than 0"),
        ({"max_predicted_ttl_s": 121}, "less than or equal to 120"),
        ({"namespace": "a b"}, "pattern"),
        ({"unknown": 1}, "not permitted"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        StateConfig(**fields)
