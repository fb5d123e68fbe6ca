"""Requests of OpenAI's API as this gateway understands them. Every field has its effect or is refused by name.

Fields that can have no effect here are still declared, with the values that ask for nothing (`only(...)`), so that a
client which spells out OpenAI's defaults is served and any other value is answered with 400 and the field's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from engines.types import DrafterChoice, SamplingParams, SpeculationParams
from gateway.errors import BadRequestError, UnknownModelError
from gateway.refusals import explained, out_of_range, shortened

RequestT = TypeVar("RequestT", bound=BaseModel)
JsonValue = object
_MAX_MODEL_NAME = 128  # gateway.config's limit, so that no model has a longer one


def only(*neutral: JsonValue) -> BeforeValidator:
    """A field that may be absent, null or ask for nothing, and otherwise is refused."""

    def check(value: JsonValue) -> JsonValue:
        # `1 == True` in Python, not in JSON.
        if value is not None and not any(value == item and type(value) is type(item) for item in neutral):
            raise ValueError("not supported by this gateway")
        return value

    return BeforeValidator(check)


def _not_empty(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


def _model_name(value: str) -> str:
    if len(value) > _MAX_MODEL_NAME:
        raise UnknownModelError(shortened(value))
    return value


# Far above any vocabulary and any context, far below what would fill an error message.
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# One mistake is told, so a list of a million is not searched for the others.
FAIL_FAST = Field(fail_fast=True)
TokenIds = Annotated[tuple[TokenId, ...], FAIL_FAST]
Count = Annotated[int, Field(lt=2**31)]
TokenLimit = Annotated[int, Field(ge=1, lt=2**31)]
ModelName = Annotated[str, AfterValidator(_model_name)]
Stop = Annotated[str, AfterValidator(_not_empty)]
Refused = Annotated[JsonValue, only()]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class TextPart(_Model):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Refused = None


class Message(_Model):
    """One turn. Parts are joined by newlines. Tools are not supported, and so neither are their calls and answers."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[tuple[TextPart, ...], Field(min_length=1, fail_fast=True)]
    name: str | None = Field(default=None, description="handed to the chat template")
    tool_calls: Annotated[JsonValue, only([])] = None
    tool_call_id: Refused = None
    function_call: Refused = None
    refusal: Refused = None
    audio: Refused = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class Prediction(_Model):
    """Output that the client expects, as a hint. Its parts are one text in pieces: nothing is put between them."""

    type: Literal["content"]
    content: str | Annotated[tuple[TextPart, ...], FAIL_FAST]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Speculation(_Model):
    """SpeculationParams as JSON."""

    drafter: DrafterChoice | None = Field(default=None, description="auto: whatever pays; none: plain decoding")
    max_draft_tokens: Count | None = Field(default=None, ge=0, description="per step; the engine's own bound holds too")
    provenance: bool | None = Field(default=None, description="tell with each token who found it")


class StreamOptions(_Model):
    include_usage: bool | None = None
    include_obfuscation: Annotated[JsonValue, only(False)] = None


class _GenerationRequest(_Model):
    """What chat and text completions have in common, our extensions last."""

    prompt_field: ClassVar[str]

    model: ModelName
    frequency_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = None
    max_tokens: TokenLimit | None = None
    n: int | None = Field(default=None, ge=1)
    presence_penalty: float | None = None
    seed: int | None = None
    stop: Stop | Annotated[tuple[Stop, ...], FAIL_FAST] | None = Field(default=None)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = None
    user: str | None = Field(default=None, max_length=512)

    top_k: int | None = Field(default=None, description="0 or -1 keeps all")
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    priority: int | None = Field(default=None, ge=-1000, le=1000, description="smaller runs first")
    cache_salt: str | None = Field(default=None, max_length=512, description="separates prefix caches")
    prompt_cache_key: str | None = Field(
        default=None, min_length=1, max_length=512, description="OpenAI's: requests with the same one share a replica"
    )
    prediction: Prediction | None = Field(default=None, description="OpenAI's, though of chats alone there")
    speculation: Speculation | None = None
    receipt: bool | None = Field(default=None, description="put into the answer what was decided, and why")
    quality: float | None = Field(
        default=None, ge=0.0, le=1.0, description='for `model` "auto": 0 cheapest, 1 best, 0.5 as the operator set it'
    )

    @model_validator(mode="after")
    def _check_stream_options(self) -> _GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` is allowed only when `stream` is true")
        return self

    @model_validator(mode="after")
    def _check_speculation(self) -> _GenerationRequest:
        if self.speculation is not None and self.speculation.drafter == "prediction" and not self.predicted_text:
            raise ValueError('`speculation.drafter` is "prediction", but there is no `prediction`, or an empty one')
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def end_user(self) -> str | None:
        return self.user

    @property
    def predicted_text(self) -> str:
        """Empty: no prediction."""
        return "" if self.prediction is None else self.prediction.text

    def drafting(self) -> SpeculationParams:
        """How to be drafted for, defaults filled in."""
        asked = {} if self.speculation is None else self.speculation.model_dump(exclude_none=True)
        return SpeculationParams.model_validate(asked)

    def wanted_tokens(self) -> int | None:
        """The completion's limit as asked for; None: whatever the context leaves."""
        return self.max_tokens

    def wanted_logprobs(self) -> int | None:
        """None: none; k: the emitted token's and the k best."""
        raise NotImplementedError

    def renamed(self) -> Mapping[str, str]:
        """Our name of a sampling parameter -> this request's, where they differ."""
        return {}

    def sampling(self, max_tokens: int) -> SamplingParams:
        """The sampling parameters with this limit. Raises BadRequestError naming a parameter out of its range."""
        asked: dict[str, object] = {
            "max_tokens": max_tokens,
            "logprobs": self.wanted_logprobs(),
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop,
            "top_k": 0 if self.top_k == -1 else self.top_k,
        }
        asked |= {name: getattr(self, name) for name in _SAME_NAME}
        try:
            return SamplingParams.model_validate({name: value for name, value in asked.items() if value is not None})
        except ValidationError as error:
            raise out_of_range(error, self.renamed()) from error


_SAME_NAME = frozenset(SamplingParams.model_fields) - {"max_tokens", "logprobs", "stop", "top_k"}


class ChatCompletionRequest(_GenerationRequest):
    """POST /v1/chat/completions."""

    prompt_field: ClassVar[str] = "messages"

    messages: tuple[Message, ...] = Field(min_length=1, fail_fast=True)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: TokenLimit | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=16, description="returned and logged")
    safety_identifier: str | None = Field(default=None, max_length=512, description="the newer name of `user`")
    service_tier: Literal["auto", "default"] | None = None

    audio: Refused = None
    function_call: Annotated[JsonValue, only("none")] = None
    functions: Annotated[JsonValue, only([])] = None
    modalities: Annotated[JsonValue, only(["text"])] = None
    moderation: Refused = None
    parallel_tool_calls: Annotated[JsonValue, only(True)] = None
    prompt_cache_options: Refused = None
    prompt_cache_retention: Annotated[JsonValue, only("in_memory")] = None
    reasoning_effort: Annotated[JsonValue, only("none")] = None
    response_format: Annotated[JsonValue, only({"type": "text"})] = None
    store: Annotated[JsonValue, only(False)] = None
    tool_choice: Annotated[JsonValue, only("none")] = None
    tools: Annotated[JsonValue, only([])] = None
    verbosity: Annotated[JsonValue, only("medium")] = None
    web_search_options: Refused = None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` is allowed only when `logprobs` is true")
        _same_or_absent("max_completion_tokens", self.max_completion_tokens, "max_tokens", self.max_tokens)
        _same_or_absent("safety_identifier", self.safety_identifier, "user", self.user)
        return self

    @property
    def end_user(self) -> str | None:
        return self.safety_identifier if self.user is None else self.user

    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def renamed(self) -> Mapping[str, str]:
        return {"logprobs": "top_logprobs"}


class CompletionRequest(_GenerationRequest):
    """POST /v1/completions."""

    prompt_field: ClassVar[str] = "prompt"

    prompt: str | Annotated[tuple[str, ...], FAIL_FAST] | TokenIds | Annotated[tuple[TokenIds, ...], FAIL_FAST]
    best_of: int | None = Field(default=None, ge=1, description="no more than `n`: nothing is drawn to be thrown away")
    echo: bool | None = None
    logprobs: int | None = None
    suffix: Annotated[JsonValue, only("")] = None

    @model_validator(mode="after")
    def _check_pairs(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise ValueError("`best_of` other than `n` is not supported by this gateway")
        if self.echo and self.logprobs is not None:
            raise ValueError("`echo` together with `logprobs` is not supported: prompts are not scored")
        return self

    def wanted_tokens(self) -> int:
        # OpenAI's documented default of this endpoint; chat has none.
        return 16 if self.max_tokens is None else self.max_tokens

    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """The prompts one by one. Raises BadRequestError if there is none or one is an empty list of tokens."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if not self.prompt:
            raise BadRequestError("`prompt` must not be empty.", param="prompt")
        if isinstance(self.prompt[0], int):
            return (self.prompt,)
        return self.prompt


def parse(request_class: type[RequestT], body: bytes) -> RequestT:
    """The body as a request. Raises BadRequestError naming the first offending field."""
    try:
        return request_class.model_validate_json(body)
    except ValidationError as error:
        raise explained(error, body) from error


def _same_or_absent(newer: str, new: object, older: str, old: object) -> None:
    if new is not None and old is not None and new != old:
        raise ValueError(f"`{newer}` and `{older}` mean the same but differ")
