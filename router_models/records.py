"""The request log: what a gateway writes about each request, and what is known later about its answer.

One JSON document a line; an outcome that comes later is a line of its own and names its request. Unknown keys are
refused, so that a log of another version is not read as something it is not; requests of version 1 are read as of 2.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Text = Annotated[str, Field(min_length=1)]

_ALWAYS_SO_IN_VERSION_1 = (("num_tools", 0), ("response_format", "text"))


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class LoggedTurn(_Record):
    """One message of a conversation, as far as the log may keep it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    text: str


class LoggedPrompt(_Record):
    """The conversation. `redacted` keeps the text with personal data taken out, `hashed` a digest and no text."""

    kind: Literal["full", "redacted", "hashed"]
    turns: tuple[LoggedTurn, ...] = ()
    sha256: str | None = Field(default=None, description="of the conversation, to find repeated ones")


class LoggedCandidate(_Record):
    """A model that could have answered, and why it was not taken if it was not."""

    model: Text
    prob_right: Share | None = Field(default=None, description="calibrated; None where the artifact has no ability")
    cost_usd: float = Field(ge=0.0, description="expected, of this request")
    refused: str | None = Field(default=None, description="why it could not be chosen; None if it could")
    warm_tokens: int = Field(default=0, ge=0, description="of the prompt that this conversation left in its cache")


class LoggedDecision(_Record):
    """The choice, with what a replay under another policy needs."""

    policy: Text
    artifact: str | None = Field(description="version of the artifact; None where the default model served")
    feature_version: int | None
    candidates: tuple[LoggedCandidate, ...]
    choice: Text
    propensity: float = Field(gt=0.0, le=1.0, description="with which probability the policy chooses as it did")
    explored: bool = False
    mechanism: Text = Field(description="model, abstained, explored, held, floor, fallback, ...")
    score: float | None = Field(default=None, description="need of the strong model")
    novelty: Share | None = None
    abstains: bool = Field(default=False, description="the artifact did not trust itself, or there was none")
    threshold: float | None = Field(default=None, description="None where the goal has none or it was infinite")
    quality: Share = Field(default=0.5, description="the request's dial")
    preferred: str | None = Field(default=None, description="what the policy takes where it does not explore")
    current: str | None = Field(default=None, description="the model that the conversation had")
    turns_below: int = Field(
        default=0, ge=0, description="turns in a row that had wanted a lesser one, before this one"
    )


class LoggedDrafter(_Record):
    """Tokens that one drafter found and the target verified, and those of them that it accepted."""

    num_drafted: int = Field(ge=0)
    num_accepted: int = Field(ge=0)


class LoggedUse(_Record):
    """What the request took."""

    model: Text = Field(description="that answered; not the choice where a fallback was needed")
    input_tokens: int = Field(ge=0)
    output_tokens: int = Field(ge=0)
    ttft_s: float | None = Field(default=None, ge=0.0)
    tpot_s: float | None = Field(default=None, ge=0.0)
    cost_usd: float = Field(default=0.0, ge=0.0)
    finish_reason: str | None = None
    num_drafted: int = Field(default=0, ge=0)
    num_accepted: int = Field(default=0, ge=0)
    drafters: dict[str, LoggedDrafter] = Field(
        default_factory=dict, description="the same by drafter, of all that drafted; empty where the engine cannot tell"
    )

    @property
    def acceptance(self) -> float | None:
        """How well the drafter foresaw the model: a weak label of how easy the prompt was. None without drafts."""
        return self.num_accepted / self.num_drafted if self.num_drafted else None


class RequestRecord(_Record):
    """One request."""

    kind: Literal["request"] = "request"
    version: Literal[2] = 2
    request_id: Text
    time: float = Field(description="seconds since the epoch")
    tenant: str | None = Field(default=None, description="a keyed digest of the tenant, never its name")
    source: str = Field(default="log", description="the traffic it belongs to; one router is fitted to each")
    subset: str = Field(default="", description="a domain, where one is known; reports have a row for each")
    prompt: LoggedPrompt | None = None
    features: dict[str, float] | None = Field(
        default=None, description="structure by name, as the decision read it: learnt from where the text is not kept"
    )
    max_tokens: int | None = Field(default=None, ge=1)
    decision: LoggedDecision | None = None
    shadow: LoggedDecision | None = Field(default=None, description="of a second artifact that only looks on")
    use: LoggedUse | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_version_1(cls, fields: object) -> object:
        """Without what only version 1 had: the drafter that was configured, and two settings that never varied."""
        if not isinstance(fields, dict) or fields.get("version") != 1:
            return fields
        found = {name: value for name, value in fields.items() if (name, value) not in _ALWAYS_SO_IN_VERSION_1}
        if isinstance(use := found.get("use"), dict):
            found["use"] = {name: value for name, value in use.items() if name != "drafter"}
        return found | {"version": 2}


class OutcomeRecord(_Record):
    """How good one model's answer to a request was. `model` None means the model that answered."""

    kind: Literal["outcome"] = "outcome"
    version: Literal[1] = 1
    request_id: Text
    time: float
    label: Literal["correctness", "judge", "feedback", "re_ask"]
    score: Share = Field(description="0 wrong, 1 right; a re-ask is a 0")
    model: str | None = None
    tenant: str | None = Field(default=None, description="keyed digest of who said so; None where an operator did")


class PreferenceRecord(_Record):
    """Which of two answers to a request was preferred; both are needed for a tie to mean something."""

    kind: Literal["preference"] = "preference"
    version: Literal[1] = 1
    request_id: Text
    time: float
    first: Text
    second: Text
    preferred: Literal["first", "second", "tie"]

    @property
    def scores(self) -> dict[str, float]:
        """Results that say the same: a tie leaves no gap, whoever wins has all of it."""
        first, second = {"first": (1.0, 0.0), "second": (0.0, 1.0), "tie": (1.0, 1.0)}[self.preferred]
        return {self.first: first, self.second: second}


Record = Annotated[RequestRecord | OutcomeRecord | PreferenceRecord, Field(discriminator="kind")]
