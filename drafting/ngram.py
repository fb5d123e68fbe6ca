"""Drafts from the sequence itself: what followed the newest tokens when they occurred before, in prompt or output.

Prompt lookup decoding; copying from a reference is LLMA (arXiv 2304.04487). It pays where output repeats input: edits
of given code, quotations, summaries, structured data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from drafting.match import GrowingTokens, continuations, longest_suffix_match
from drafting.protocol import Draft, DraftRequest, Verdict


class NgramDrafter:
    """Follows the longest earlier occurrence of the newest tokens, of at least `min_match` of them.

    Matches of `max_match` tokens and more count as equally long. Of equally long ones the latest `max_voters` vote on
    each token, and the latest of them decides a tie.
    """

    def __init__(self, min_match: int = 2, max_match: int = 32, max_voters: int = 16) -> None:
        if not 1 <= min_match <= max_match or max_voters < 1:
            raise ValueError(f"need 1 <= min_match ({min_match}) <= max_match ({max_match}), max_voters >= 1")
        self._min_match = min_match
        self._max_match = max_match
        self._max_voters = max_voters
        self._texts: dict[int, GrowingTokens] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [self._draft(request) for request in requests]

    def observe(self, verdicts: Sequence[Verdict]) -> None:
        """Nothing to learn: the next `propose` brings the tokens."""

    def forget(self, seq_id: int) -> None:
        self._texts.pop(seq_id, None)

    def _draft(self, request: DraftRequest) -> Draft:
        if request.max_drafts == 0:
            return Draft()
        tokens = self._texts.setdefault(request.seq_id, GrowingTokens())
        tokens.catch_up(request.token_ids)
        text = tokens.view
        match = longest_suffix_match(text[:-1], text[-self._max_match :])
        if match.length < self._min_match:
            return Draft()
        voters = continuations(text, match.ends[-self._max_voters :], request.max_drafts)
        return elect(voters.tolist(), match.length)


def elect(voters: list[list[int]], match_length: int) -> Draft:
    """The draft that most voters agree on, token by token; a voter once outvoted is out.

    `voters` are continuations of equal length, oldest first, at least one: of equally many voices the latest wins.
    """
    token_ids: list[int] = []
    beliefs: list[float] = []
    for place in range(len(voters[0])):
        votes = Counter(voter[place] for voter in reversed(voters))
        token_id, agreeing = votes.most_common(1)[0]
        token_ids.append(token_id)
        beliefs.append(belief(match_length + place, agreeing, len(voters)))
        if agreeing < len(voters):
            voters = [voter for voter in voters if voter[place] == token_id]
    return Draft(tuple(token_ids), tuple(beliefs))


def belief(match_length: int, agreeing: int, voters: int) -> float:
    """How sure a lookup is, in (0, 1): grows with the length of the match and with the share that agree."""
    return match_length / (match_length + 1) * agreeing / voters
