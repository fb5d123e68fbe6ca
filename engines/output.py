"""From sampled tokens to what the caller reads: where the output ends, its text, its log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from engines.sampler import SampledToken, TokenLogprobIds
from engines.sequence import Sequence
from engines.tokenizer import Tokenizer
from engines.types import IMPOSSIBLE_LOGPROB, Delta, FinishReason, TokenLogprob, TopLogprob, Usage


def absorb(sequence: Sequence, sampled: SequenceOf[SampledToken], tokenizer: Tokenizer) -> tuple[list[int], Delta]:
    """The tokens of `sampled` that become part of the output, and the news they make.

    Cuts at the first of: a stop id, a stop string, max_tokens. What lies beyond is neither kept, billed nor shown.
    Modifies `sequence.text` only; the tokens are not yet part of `sequence.token_ids`.
    """
    room = sequence.request.sampling.max_tokens - sequence.num_output_tokens
    kept = [token.token_id for token in sampled[:room]]
    finish: FinishReason | None = "length" if len(kept) == room else None
    stop_reason: str | int | None = None
    stop_at = next((i for i, token_id in enumerate(kept) if token_id in sequence.stop_ids), None)
    if stop_at is not None:
        kept, finish = kept[: stop_at + 1], "stop"
        stop_reason = kept[-1] if kept[-1] in sequence.request.sampling.stop_token_ids else None
    # The stop id itself has no text.
    update = sequence.text.push(kept if stop_at is None else kept[:-1])
    text = update.text
    if update.stop is not None:
        kept, finish, stop_reason = kept[: update.num_tokens], "stop", update.stop
    elif finish is not None:
        text += sequence.text.finish()
    return kept, Delta(
        index=sequence.index,
        text=text,
        token_ids=tuple(kept),
        logprobs=_logprobs(sequence, sampled[: len(kept)], tokenizer),
        finish_reason=finish,
        stop_reason=stop_reason,
        usage=_usage(sequence, len(kept)) if finish else None,
    )


def _usage(sequence: Sequence, num_new: int) -> Usage:
    return Usage(
        prompt_tokens=sequence.num_prompt_tokens,
        completion_tokens=sequence.num_output_tokens + num_new,
        cached_tokens=sequence.num_cached_tokens,
        accepted_draft_tokens=sequence.num_accepted_drafts,
        rejected_draft_tokens=sequence.num_rejected_drafts,
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
