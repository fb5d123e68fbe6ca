"""From sampled tokens to what the caller reads, in two steps: `take` is quick and decides what is computed next, `tell`
makes text, log-probabilities and usage, and may run while the next step does.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from engines.drawn import SampledToken, TokenLogprobIds
from engines.sequence import Sequence
from engines.tokenizer import Tokenizer
from engines.types import (
    IMPOSSIBLE_LOGPROB,
    TARGET,
    Delta,
    DraftCounts,
    FinishReason,
    Piece,
    TokenLogprob,
    TopLogprob,
    Usage,
)


@dataclass(frozen=True, slots=True)
class Taken:
    """The tokens that a step brought a sequence, up to the first stop id or max_tokens. Their text is not made yet.

    The first `num_accepted` of the step's samples were drafted by `source`; fewer may have been kept. `finish` is why
    the output ends here, as far as ids can tell.
    """

    sequence: Sequence
    sampled: SequenceOf[SampledToken]
    source: str = TARGET
    num_accepted: int = 0
    finish: FinishReason | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.sampled]

    @property
    def is_first(self) -> bool:
        """Whether nothing was taken before; asked once they are part of the sequence."""
        return self.sequence.num_output_tokens == len(self.sampled)


def take(sequence: Sequence, sampled: SequenceOf[SampledToken], source: str = TARGET, num_accepted: int = 0) -> Taken:
    """Cut `sampled` where stop ids or max_tokens end the output. The tokens are not yet part of `sequence`."""
    room = sequence.request.sampling.max_tokens - sequence.num_output_tokens
    kept = sampled[:room]
    stop_at = next((i for i, token in enumerate(kept) if token.token_id in sequence.stop_ids), None)
    if stop_at is not None:
        return Taken(sequence, kept[: stop_at + 1], source, num_accepted, "stop")
    return Taken(sequence, kept, source, num_accepted, "length" if len(kept) == room else None)


def tell(taken: Taken, tokenizer: Tokenizer) -> Delta:
    """The news that `taken` makes, cut at the first stop string: what lies beyond is neither billed nor shown.

    Modifies `sequence.text` only. `taken` has to be the newest part of its sequence's tokens.
    """
    sequence, finish = taken.sequence, taken.finish
    token_ids = taken.token_ids
    # The stop id itself has no text.
    texts, stop = _push(sequence, token_ids[:-1] if finish == "stop" else token_ids)
    kept, stop_reason = token_ids, _stop_id(taken)
    if stop is not None:
        kept, finish, stop_reason = token_ids[: len(texts)], "stop", stop
    elif finish is not None:
        texts.append(sequence.text.finish())
    return Delta(
        index=sequence.index,
        text="".join(texts),
        token_ids=tuple(kept),
        provenance=_pieces(sequence, texts, len(kept), taken.source, taken.num_accepted),
        logprobs=_logprobs(sequence, taken.sampled[: len(kept)], tokenizer),
        finish_reason=finish,
        stop_reason=stop_reason,
        usage=_usage(taken, len(kept)) if finish else None,
        cached_tokens=sequence.num_cached_tokens if taken.is_first else None,
    )


def _stop_id(taken: Taken) -> str | int | None:
    """The stop id that the caller has asked for, where one ends the tokens."""
    last = taken.sampled[-1].token_id
    is_asked = taken.finish == "stop" and last in taken.sequence.request.sampling.stop_token_ids
    return last if is_asked else None


def _push(sequence: Sequence, token_ids: SequenceOf[int]) -> tuple[list[str], str | None]:
    """The text that became certain with each token, up to the stop string that ended it, if one did."""
    texts = []
    for token_id in token_ids:
        update = sequence.text.push((token_id,))
        texts.append(update.text)
        if update.stop is not None:
            return texts, update.stop
    return texts, None


def _pieces(
    sequence: Sequence, texts: SequenceOf[str], num_tokens: int, source: str, num_accepted: int
) -> tuple[Piece, ...] | None:
    """Who found each token, with its text; what was held back until the end goes to the last token."""
    if not sequence.request.speculation.provenance:
        return None
    own = [*texts[: num_tokens - 1], "".join(texts[num_tokens - 1 :])]
    own += [""] * (num_tokens - len(own))
    return tuple(Piece(text, source if i < num_accepted else TARGET) for i, text in enumerate(own))


def _usage(taken: Taken, num_kept: int) -> Usage:
    sequence, drafters = taken.sequence, dict(taken.sequence.drafts)
    if taken.num_accepted > num_kept:
        # A right draft beyond the end is in no output: to the client it counts as rejected.
        drafters[taken.source] += DraftCounts(0, num_kept - taken.num_accepted)
    num_accepted = sum(counts.num_accepted for counts in drafters.values())
    return Usage(
        prompt_tokens=sequence.num_prompt_tokens,
        completion_tokens=sequence.num_output_tokens - (len(taken.sampled) - num_kept),
        cached_tokens=sequence.num_cached_tokens,
        accepted_draft_tokens=num_accepted,
        rejected_draft_tokens=sum(counts.num_drafted for counts in drafters.values()) - num_accepted,
        drafters=drafters,
    )


def _logprobs(
    sequence: Sequence, sampled: SequenceOf[SampledToken], tokenizer: Tokenizer
) -> tuple[TokenLogprob, ...] | None:
    if sequence.request.sampling.logprobs is None:
        return None
    return tuple(_logprob(token.token_id, token.logprob, tokenizer) for token in sampled)


def _logprob(token_id: int, ids: TokenLogprobIds | None, tokenizer: Tokenizer) -> TokenLogprob:
    assert ids is not None, "the sampler was asked for log-probabilities"

    def described(candidate: int, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=tokenizer.token_text(candidate),
            logprob=logprob if logprob > IMPOSSIBLE_LOGPROB else IMPOSSIBLE_LOGPROB,
            token_id=candidate,
            token_bytes=tokenizer.token_bytes(candidate),
        )

    own = described(token_id, ids.logprob)
    top = tuple(described(i, logprob) for i, logprob in zip(ids.top_ids, ids.top_logprobs, strict=True))
    return TokenLogprob(own.token, own.logprob, own.token_id, own.token_bytes, top)
