"""What travels between a caller and an engine: requests in, deltas out. Plain immutable data, picklable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "abort"]
DrafterChoice = Literal["auto", "none", "ngram", "suffix", "model", "prediction"]
PromptKind = Literal["tokens", "text", "chat"]

TARGET = "target"  # who found a token, where no drafter did
IMPOSSIBLE_LOGPROB = -9999.0  # what OpenAI's API shows for a probability of zero; JSON has no -inf


class SamplingParams(BaseModel):
    """How to choose tokens and when to stop. Ranges as in OpenAI's and vLLM's APIs; else ValidationError."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int = Field(ge=1, description="most tokens to emit for one choice")
    temperature: float = Field(default=1.0, ge=0.0, le=100.0, allow_inf_nan=False, description="0 is greedy")
    top_k: int = Field(default=0, ge=0, description="keep the k most likely tokens; 0 keeps all")
    top_p: float = Field(default=1.0, ge=0.0, le=1.0, description="keep the smallest set with this mass; 0 is greedy")
    min_p: float = Field(default=0.0, ge=0.0, le=1.0, description="drop tokens below min_p times the best probability")
    presence_penalty: float = Field(
        default=0.0, ge=-2.0, le=2.0, description="subtracted once from tokens in the output"
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2.0, le=2.0, description="subtracted per occurrence in the output"
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0.0, le=100.0, description="divides positive logits of seen tokens, multiplies negative"
    )
    logit_bias: dict[int, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default_factory=dict, description="token id -> added to its logit; -100 bans, 100 forces"
    )
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64, description="None draws one at admission")
    stop: tuple[str, ...] = Field(default=(), description="strings that end the output; never part of it")
    stop_token_ids: tuple[int, ...] = Field(default=(), description="token ids that end the output, besides EOS")
    ignore_eos: bool = Field(default=False, description="EOS does not end the output")
    min_tokens: int = Field(default=0, ge=0, description="EOS and stop token ids are masked before this many tokens")
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="None: none; k: the emitted token's and the k best of the raw logits"
    )


class SpeculationParams(BaseModel):
    """How one request wants to be drafted for. It changes the speed and nothing else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    drafter: DrafterChoice = Field(default="auto", description="auto: whatever pays; none: plain decoding")
    max_draft_tokens: int | None = Field(default=None, ge=0, description="per step; None: the engine's own bound")
    provenance: bool = Field(default=False, description="tell with each token who found it")


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids of a rendered prompt: the only kind that a paged engine takes."""

    token_ids: tuple[int, ...]
    kind: Literal["tokens"] = "tokens"


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Raw text, for engines that tokenize themselves."""

    text: str
    kind: Literal["text"] = "text"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Chat turns, for engines that render the template themselves."""

    messages: tuple[ChatMessage, ...]
    kind: Literal["chat"] = "chat"


Prompt = TokenPrompt | TextPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request: `n` choices for one prompt.

    `priority`: smaller runs first; equal priorities run first come, first served. `cache_salt` separates the prefix
    caches of tenants; `user` is passed on to remote servers and otherwise unused by engines. `prediction` is text that
    the client expects in the output, in the prompt's own kind: token ids, or text for engines that tokenize themselves.
    `session` names what the request belongs to: of several replicas, the one that served its last request is preferred.
    """

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    n: int = 1
    priority: int = 0
    cache_salt: str = ""
    user: str | None = None
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    prediction: TokenPrompt | TextPrompt | None = None
    session: str | None = None


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One candidate. `token_id` is None where a remote server does not tell; `token_bytes` are its own in the text."""

    token: str
    logprob: float
    token_id: int | None = None
    token_bytes: bytes | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob(TopLogprob):
    """The emitted token with its best alternatives, most likely first."""

    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """Drafted tokens that reached verification, and those of them that are in the output."""

    num_drafted: int = 0
    num_accepted: int = 0

    def __add__(self, other: DraftCounts) -> DraftCounts:
        return DraftCounts(self.num_drafted + other.num_drafted, self.num_accepted + other.num_accepted)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one choice; `prompt_tokens` and `cached_tokens` are the same for all choices of a request.

    `accepted_draft_tokens` + `rejected_draft_tokens` = drafted tokens that reached verification. `drafters` has them by
    drafter, where the engine knows it.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    accepted_draft_tokens: int = 0
    rejected_draft_tokens: int = 0
    drafters: Mapping[str, DraftCounts] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Piece:
    """The text that became certain with one token, and who found that token: "target", or a drafter's name."""

    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one choice since the last delta.

    `token_ids` is empty where a remote server sends text only. `text` may be empty while a character or a possible stop
    string is held back. A choice's first delta has `cached_tokens`, those of the prompt that the engine found computed,
    where the engine knows. `logprobs`, if asked for, has an entry per token id, and so has `provenance`, whose texts
    together are `text` (what was held back until the end belongs to the last token). The last delta of a choice has
    `finish_reason` and `usage`; `stop_reason` is the stop string or stop token id that ended it, if one did.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    provenance: tuple[Piece, ...] | None = None
    cached_tokens: int | None = None


def joined(deltas: Iterable[Delta]) -> tuple[Delta, ...]:
    """Consecutive deltas, of any choices, as one delta per choice, by index."""
    by_index: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    return tuple(_join(by_index[index]) for index in sorted(by_index))


def _join(deltas: list[Delta]) -> Delta:
    has_logprobs = any(delta.logprobs is not None for delta in deltas)
    has_provenance = any(delta.provenance is not None for delta in deltas)
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs or ()) if has_logprobs else None,
        provenance=tuple(piece for delta in deltas for piece in delta.provenance or ()) if has_provenance else None,
        cached_tokens=deltas[0].cached_tokens,
    )


@dataclass(frozen=True, slots=True)
class PrefixBlocks:
    """How an engine names what its prefix cache holds: `root_hash(model, salt=cache_salt)`, then block by block."""

    model: str
    block_size: int


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What an engine serves. `fingerprint` is a hash of weights, resolved config and library versions.

    `max_model_len` (tokens) and `vocab_size` are None where a remote server does not tell. `details` are resolved
    settings worth showing to an operator, already strings. `prefix_blocks` is None without a prefix cache of our own.
    """

    model: str
    prompt_kinds: frozenset[PromptKind]
    fingerprint: str
    max_model_len: int | None = None
    vocab_size: int | None = None
    max_num_choices: int = 128
    details: dict[str, str] = field(default_factory=dict)
    prefix_blocks: PrefixBlocks | None = None


@dataclass(frozen=True, slots=True)
class DrafterStats:
    """What became of one drafter's drafts; `accepted_at[j]` counts the drafts whose token j stood.

    Counted at verification: tokens that a stop cut away afterwards are accepted here, and rejected in a Usage.
    """

    num_drafts: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_at: tuple[int, ...] = ()

    def __add__(self, other: DrafterStats) -> DrafterStats:
        return DrafterStats(
            self.num_drafts + other.num_drafts,
            self.num_drafted_tokens + other.num_drafted_tokens,
            self.num_accepted_tokens + other.num_accepted_tokens,
            tuple(map(sum, zip_longest(self.accepted_at, other.accepted_at, fillvalue=0))),
        )


@dataclass(frozen=True, slots=True)
class EngineStats:
    """An immutable snapshot, taken between two steps. Counters count since start; times are in seconds."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_total: int = 0
    num_blocks_used: int = 0
    num_blocks_cached: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    step_time_s: float = 0.0
    # Of the steps in which drafts were looked for: how long they took, and how long the cost model believes that plain
    # decoding would have taken for the tokens they emitted. The second over the first is the gain.
    speculation_time_s: float = 0.0
    speculation_plain_time_s: float = 0.0
    num_speculation_failures: int = 0  # a drafter failed, and speculation has been off since
    drafters: Mapping[str, DrafterStats] = field(default_factory=dict)

    def __add__(self, other: EngineStats) -> EngineStats:
        """The two engines' numbers together."""
        names = [item.name for item in fields(self) if item.name != "drafters"]
        total = {name: getattr(self, name) + getattr(other, name) for name in names}
        drafters = dict(self.drafters)
        for name, stats in other.drafters.items():
            drafters[name] = drafters.get(name, DrafterStats()) + stats
        return EngineStats(**total, drafters=drafters)
