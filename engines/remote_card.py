"""What a remote server says of its model, and the model card that makes."""

from __future__ import annotations

import hashlib
from http import HTTPStatus

import httpx
from pydantic import BaseModel, ValidationError

from engines.config import RemoteEngineConfig
from engines.errors import EngineDeadError, ModelLoadError
from engines.types import ModelCard, PromptKind

NO_MODEL_LIST = frozenset({404, 405, 501})  # statuses of servers that have no /models, which is fine
_MAX_NUM_CHOICES = 128  # OpenAI's own bound


class ModelEntry(BaseModel):
    """One entry of /models."""

    id: str
    owned_by: str | None = None
    root: str | None = None
    max_model_len: int | None = None  # vLLM


class _ModelList(BaseModel):
    data: list[ModelEntry]


def find_model(status: int, body: str, model: str, where: str) -> ModelEntry | None:
    """The entry of `model` in an answer to GET /models; None if the server keeps no list.

    Raises EngineDeadError where a later try may succeed, ModelLoadError where the operator has to act.
    """
    if status in NO_MODEL_LIST:
        return None
    if status in {408, 429} or status >= 500:
        raise EngineDeadError(f"{where} answered {status}: {body[:200]}")
    if status != HTTPStatus.OK:
        raise ModelLoadError(f"{where} answered {status} when asked for its models: {body[:200]}")
    try:
        entries = _ModelList.model_validate_json(body).data
    except ValidationError as error:
        raise ModelLoadError(f"{where} is no OpenAI-compatible server: its /models makes no sense.") from error
    for entry in entries:
        if entry.id == model:
            return entry
    known = ", ".join(sorted(entry.id for entry in entries)[:10]) or "none"
    raise ModelLoadError(f"{where} does not have the model {model!r}; it has {known}.")


def make_card(config: RemoteEngineConfig, entry: ModelEntry | None) -> ModelCard:
    """The shorter context window counts, of the configured one and the server's."""
    kinds: list[PromptKind] = ["chat", "text", "tokens"] if config.accepts_token_ids else ["chat", "text"]
    told = None if entry is None else entry.max_model_len
    lengths = [length for length in (config.max_model_len, told) if length is not None]
    identity = (config.model_dump(mode="json"), None if entry is None else entry.model_dump(), httpx.__version__)
    return ModelCard(
        model=config.model,
        prompt_kinds=frozenset(kinds),
        fingerprint=hashlib.sha256(repr(identity).encode()).hexdigest(),
        max_model_len=min(lengths, default=None),
        max_num_choices=_MAX_NUM_CHOICES,
        details={"owned_by": entry.owned_by} if entry is not None and entry.owned_by else {},
    )
