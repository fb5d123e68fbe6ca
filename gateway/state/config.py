"""What an operator may write about the shared state."""

from __future__ import annotations

from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

_SCHEMES = ("redis://", "rediss://", "unix://")


class StateConfig(BaseModel):
    """Where the shared state lives, and how long its entries do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = Field(
        default=None,
        description="redis://, rediss:// or unix:// address, with a user (redis://user@host) where Redis has several; "
        "none: a server is started on this machine",
    )
    password_env: str | None = Field(default=None, description="environment variable that holds the password")
    ca_file: Path | None = Field(
        default=None,
        description="PEM file with the authorities that the certificate of a rediss:// server must come from; none: "
        "the system's",
    )
    namespace: str = Field(default="outrider", pattern=r"^[A-Za-z0-9._-]+$", description="prefix of every key")
    timeout_s: float = Field(default=0.005, gt=0, description="a slower answer counts as none")
    retry_s: float = Field(default=0.1, gt=0, description="pause after a failure; doubles up to max_retry_s")
    max_retry_s: float = Field(default=2.0, gt=0)
    replica_lease_s: float = Field(default=10.0, gt=0, description="a replica silent for longer holds nothing")
    load_lease_s: float = Field(default=10.0, gt=0, description="a gateway silent for longer has nothing in flight")
    block_ttl_s: float = Field(default=3600.0, gt=0, description="longest life of a claim that is not repeated")
    predicted_ttl_s: float = Field(
        default=5.0, gt=0, description="life of a prediction beyond the expected first token"
    )
    max_predicted_ttl_s: float = Field(
        default=60.0, gt=0, le=120, description="at most the time that a slot rests before another replica gets it"
    )
    session_ttl_s: float = Field(default=600.0, gt=0, description="a session keeps its replica for so long after use")
    recent_half_life_s: float = Field(default=120.0, gt=0, description="memory of the work that replicas were given")
    heat_s: float = Field(default=10.0, gt=0, description="memory of how often a prefix was asked for")
    report_ttl_s: float = Field(default=10.0, gt=0, description="an engine's older report is unknown")
    embedded_memory_mb: int = Field(default=256, ge=16, description="bound of the embedded server's memory")

    @model_validator(mode="after")
    def _an_address_and_what_belongs_to_it(self) -> Self:
        if self.ca_file is not None and not (self.url or "").startswith("rediss://"):
            raise ValueError("ca_file needs a url that begins with rediss://")
        if self.url is not None:
            _check_url(self.url)
        elif self.password_env is not None:
            raise ValueError("password_env needs a url: the embedded server listens on a private socket")
        return self


def _check_url(url: str) -> None:
    if not url.startswith(_SCHEMES):
        raise ValueError(f"url must begin with {', '.join(_SCHEMES)}")
    parts = urlsplit(url)
    if parts.password is not None:
        raise ValueError("url must not hold a password: name its environment variable in password_env")
    # redis-py would let options of the url win over all that is set here, and take a password from them.
    if others := parse_qs(parts.query, keep_blank_values=True).keys() - {"db"}:
        raise ValueError(f"url has the option {min(others)}, and none is known but db")
