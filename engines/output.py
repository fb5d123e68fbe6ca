"""From sampled tokens to what the caller reads: where the output ends, its text, its log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from engines.sampler import SampledToken, TokenLogprobIds
from engines.sequence import Sequence
from engines.tokenizer import Tokenizer
from engines.types import (
    IMPOSSIBLE_LOGPROB,
    TARGET,
    Delta,
    FinishReason,
    Piece,
    TokenLogprob,
    TopLogprob,
    Usage,
)


def absorb(
    sequence: Sequence,
    sampled: SequenceOf[SampledToken],
    tokenizer: Tokenizer,
    source: str = TARGET,
    num_accepted: int = 0,
) -> tuple[list[int], Delta]:
    """The tokens of `sampled` that become part of the output, and the news they make.

    The first `num_accepted` were drafted by `source`. Cuts at the first of: a stop id, a stop string, max_tokens. What
    lies beyond is neither kept, billed nor shown. Modifies `sequence.text` only; the tokens are not yet part of
    `sequence.token_ids`.
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
    texts, stop = _push(sequence, kept if stop_at is None else kept[:-1])
    if stop is not None:
        kept, finish, stop_reason = kept[: len(texts)], "stop", stop
    elif finish is not None:
        texts.append(sequence.text.finish())
    return kept, Delta(
        index=sequence.index,
        text="".join(texts),
        token_ids=tuple(kept),
        provenance=_pieces(sequence, texts, len(kept), source, num_accepted),
        logprobs=_logprobs(sequence, sampled[: len(kept)], tokenizer),
        finish_reason=finish,
        stop_reason=stop_reason,
        usage=_usage(sequence, len(kept), max(0, num_accepted - len(kept))) if finish else None,
    )


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


def _usage(sequence: Sequence, num_new: int, num_cut_drafts: int) -> Usage:
    # A right draft beyond the end is in no output: to the client it counts as rejected.
    return Usage(
        prompt_tokens=sequence.num_prompt_tokens,
        completion_tokens=sequence.num_output_tokens + num_new,
        cached_tokens=sequence.num_cached_tokens,
        accepted_draft_tokens=sequence.num_accepted_drafts - num_cut_drafts,
        rejected_draft_tokens=sequence.num_rejected_drafts + num_cut_drafts,
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
