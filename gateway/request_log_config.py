"""What an operator may write about the request log."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PromptLogging = Literal["off", "full", "redacted", "hashed"]


class RequestLogConfig(BaseModel):
    """Where requests are written down, how much of them, and for how long."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str = Field(min_length=1, description="made if it is not there; several gateways may share one")
    prompt: PromptLogging = Field(
        default="off", description="redacted: without what looks like personal data or a secret; hashed: a keyed digest"
    )
    subset_key: str | None = Field(
        default=None, min_length=1, description="of a request's `metadata`, the entry that names its domain"
    )
    source: str = Field(default="log", min_length=1, description="the traffic's name; one router is fitted to each")
    max_file_bytes: int = Field(default=16 * 2**20, ge=1, description="a longer file is closed and compressed")
    max_file_age_s: float = Field(default=3600.0, gt=0.0, description="an older file is closed and compressed")
    max_total_bytes: int = Field(default=2**30, ge=1, description="of all files in the folder; the oldest go first")
    max_queued: int = Field(default=4096, ge=1, description="records waiting to be written; more are dropped")

    @model_validator(mode="after")
    def _room_for_two_files(self) -> Self:
        if self.max_total_bytes < 2 * self.max_file_bytes:
            raise ValueError("max_total_bytes must leave room for two files of max_file_bytes")
        return self
