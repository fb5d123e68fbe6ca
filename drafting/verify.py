"""Verification of drafts by the target's own samples.

The target is sampled at every drafted position in one forward: row j samples the token that follows the first j drafts.
A draft is right if it equals that sample, and only then is the next row conditioned on what was really emitted. With
greedy rows this is the exact match of speculative decoding (arXiv 2211.17192, 2302.01318) at temperature 0. With
sampled rows it is its coupled form (Gumbel coupling, arXiv 2408.07978): drafter and target look up the same noise, so
that their samples agree often, and what is emitted is the target's sample either way. Hence the law, and with a fixed
seed the text, is the target's own whatever the drafter proposed, however many, and for whatever reason drafts were
trimmed.
"""

from __future__ import annotations

from collections.abc import Sequence


def accepted_prefix(draft_token_ids: Sequence[int], sampled_token_ids: Sequence[int]) -> int:
    """How many leading drafts equal the target's samples, 0 to num_draft_tokens.

    `sampled_token_ids` has num_draft_tokens + 1 entries: entry j was sampled given the first j drafts. The tokens to
    emit are `sampled_token_ids[: accepted + 1]`: the accepted drafts, then the recovered token after a rejection or,
    when all were accepted, the bonus token. Raises ValueError if the lengths do not fit.
    """
    expected = len(draft_token_ids) + 1
    if len(sampled_token_ids) != expected:
        raise ValueError(f"{expected - 1} drafts need {expected} samples, not {len(sampled_token_ids)}")
    for accepted, (draft, sample) in enumerate(zip(draft_token_ids, sampled_token_ids, strict=False)):
        if draft != sample:
            return accepted
    return len(draft_token_ids)
