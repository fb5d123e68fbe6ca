"""Drafts from earlier outputs of the same tenant: what followed the newest tokens there (SuffixDecoding, 2411.04975).

The paper keeps suffix trees of all outputs. Here a fixed table maps the hash of the last n tokens, for a few n, to the
place in an output that they lead to; the tokens found there are compared, so a hash is never trusted, and a match that
no longer exists, or is another tenant's, is no match. A draft is built token by token, each from the longest context
that is known, so it may begin in one output and go on in another.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from drafting.protocol import Draft, DraftRequest, Verdict

_CONTEXT_SIZES = (2, 4, 8, 16)
_MAX_MATCH = 32
_MAX_VOTES = 15
_OFFSET_BITS = 24
_OFFSET_MASK = (1 << _OFFSET_BITS) - 1
# What an output costs beyond its tokens, as tokens: many short outputs must not outgrow the bound.
_OUTPUT_OVERHEAD_TOKENS = 64


class SuffixDrafter:
    """Learns from the outputs it observes, and drafts for each tenant from that tenant's own; None is no tenant.

    `max_history_tokens` bounds what is remembered over all tenants together, at up to 48 bytes each (the table is
    allocated at once); the outputs that served least recently go first. Prompts are not indexed, but for the few
    tokens that lead up to an output. Raises ValueError if the bound is outside 1,024 to 16,777,216.
    """

    def __init__(self, max_history_tokens: int = 200_000) -> None:
        self._history = OutputHistory(max_history_tokens)
        self._running: dict[int, _Running] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [self._draft(request) for request in requests]

    def observe(self, verdicts: Sequence[Verdict]) -> None:
        """Index the tokens that are new since a sequence's last verdict; a sequence first seen now: `num_new` of them.

        To be called before the sequence is forgotten.
        """
        for verdict in verdicts:
            self._record(verdict)

    def forget(self, seq_id: int) -> None:
        """Drop the sequence's state; its output stays in its tenant's history."""
        self._running.pop(seq_id, None)

    def _draft(self, request: DraftRequest) -> Draft:
        if request.tenant is None:
            return Draft()
        context = list(request.token_ids[-_MAX_MATCH:])
        token_ids: list[int] = []
        beliefs: list[float] = []
        while len(token_ids) < request.max_drafts:
            guess = self._history.next_token(request.tenant, context)
            if guess is None:
                break
            context.append(guess.token_id)
            token_ids.append(guess.token_id)
            beliefs.append(guess.belief)
        return Draft(tuple(token_ids), tuple(beliefs))

    def _record(self, verdict: Verdict) -> None:
        if verdict.tenant is None:
            return
        known = self._running.get(verdict.seq_id)
        running = _Running(len(verdict.token_ids) - verdict.num_new) if known is None else known
        start = running.num_recorded
        new = verdict.token_ids[start:]
        if len(new) == 0:
            return
        lead_in = verdict.token_ids[max(0, start - _CONTEXT_SIZES[-1]) : start]
        running.output = self._history.record(running.output, verdict.tenant, lead_in, new)
        running.num_recorded = len(verdict.token_ids)
        self._running[verdict.seq_id] = running


@dataclass(slots=True)
class _Running:
    num_recorded: int  # tokens of the sequence
    output: int = 0  # its number; 0: none yet


@dataclass(frozen=True, slots=True)
class Guess:
    """The token that followed a context, and how sure that makes us, in (0, 1)."""

    token_id: int
    belief: float


@dataclass(slots=True)
class _Output:
    tenant: str
    tokens: array[int] = field(default_factory=lambda: array("i"))

    def leads_to(self, end: int, context: tuple[int, ...]) -> bool:
        """Whether the tokens before `end` are those of `context`."""
        return end >= len(context) and tuple(self.tokens[end - len(context) : end]) == context


class OutputHistory:
    """Outputs of all tenants within one bound, and the table of what followed which context in them.

    The table is a two-way set-associative cache: a slot holds a place (output number and offset, 0: empty) and how
    often what follows there was confirmed; a new context takes the one of its two slots whose output was dropped, or
    else the older one.
    """

    def __init__(self, max_tokens: int) -> None:
        if not 1024 <= max_tokens <= 1 << _OFFSET_BITS:
            raise ValueError(f"a history holds 1024 to {1 << _OFFSET_BITS} tokens, not {max_tokens}")
        self._max_tokens = max_tokens
        self._max_output_tokens = max_tokens // 4
        self._outputs: OrderedDict[int, _Output] = OrderedDict()  # least recently used first
        self._numbers = count(1)
        self._num_tokens = 0
        self._num_sets = len(_CONTEXT_SIZES) * max_tokens // 2
        self._places = array("q", bytes(8 * 2 * self._num_sets))
        self._votes = bytearray(2 * self._num_sets)

    def __len__(self) -> int:
        """Tokens held, overhead included: at most `max_tokens`."""
        return self._num_tokens

    def record(self, number: int, tenant: str, lead_in: Sequence[int], token_ids: Sequence[int]) -> int:
        """Append `token_ids` to output `number` and index them; the number of the output that further ones belong to.

        That is a new one, begun with the context `lead_in`, if `number` is unknown (or was dropped), and again a new
        one whenever it gets long. What served least recently is dropped for it.
        """
        if number in self._outputs:
            self._outputs.move_to_end(number)
        else:
            number = self._begin(tenant, lead_in)
        for token_id in token_ids:
            if len(self._outputs[number].tokens) >= self._max_output_tokens:
                number = self._begin(tenant, self._outputs[number].tokens[-_CONTEXT_SIZES[-1] :])
            self._append(number, token_id)
        return number

    def next_token(self, tenant: str, context: Sequence[int]) -> Guess | None:
        """What most lately or most often followed the longest known end of `context`; None if nothing did."""
        for size in reversed(_CONTEXT_SIZES):
            if len(context) < size:
                continue
            slot, known = self._slot(tenant, tuple(context[-size:]))
            if known:
                place = self._places[slot]
                number, offset = place >> _OFFSET_BITS, place & _OFFSET_MASK
                self._outputs.move_to_end(number)
                tokens = self._outputs[number].tokens
                length = _match_length(tokens, offset, context, size)
                return Guess(tokens[offset], belief(length, self._votes[slot]))
        return None

    def _begin(self, tenant: str, lead_in: Sequence[int]) -> int:
        number = next(self._numbers)
        output = self._outputs[number] = _Output(tenant)
        output.tokens.extend(lead_in)
        self._grow(len(output.tokens) + _OUTPUT_OVERHEAD_TOKENS)
        return number

    def _grow(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens
        while self._num_tokens > self._max_tokens:
            _, output = self._outputs.popitem(last=False)
            self._num_tokens -= len(output.tokens) + _OUTPUT_OVERHEAD_TOKENS

    def _append(self, number: int, token_id: int) -> None:
        """Add a token to an output, and let each context before it vote for it."""
        output = self._outputs[number]
        before = tuple(output.tokens[-_CONTEXT_SIZES[-1] :])
        place = number << _OFFSET_BITS | len(output.tokens)
        output.tokens.append(token_id)
        self._grow(1)
        for size in _CONTEXT_SIZES:
            if size > len(before):
                break
            self._vote(output.tenant, before[-size:], place, token_id)

    def _vote(self, tenant: str, context: tuple[int, ...], place: int, token_id: int) -> None:
        slot, known = self._slot(tenant, context)
        votes = self._votes[slot] if known else 0
        if known and self._token_at(self._places[slot]) != token_id:
            # As in a branch predictor: one exception does not unseat what was often seen, a second one may.
            votes = self._votes[slot] = votes // 2
            if votes > 0:
                return
        self._places[slot] = place
        self._votes[slot] = min(votes + 1, _MAX_VOTES)

    def _slot(self, tenant: str, context: tuple[int, ...]) -> tuple[int, bool]:
        """The slot that holds a place of this tenant's after just this context, or else (False) the one to give to it.

        Python salts the hash of a string: what the table forgets differs from process to process, never what is true.
        """
        first = hash((tenant, context)) % self._num_sets * 2
        places = self._places
        vacant = first if places[first] <= places[first + 1] else first + 1
        for slot in (first, first + 1):
            output = self._outputs.get(places[slot] >> _OFFSET_BITS)
            if output is None:
                vacant = slot
            elif output.tenant == tenant:
                end = places[slot] & _OFFSET_MASK
                # The last token alone tells most others apart, without a copy.
                if output.tokens[end - 1] == context[-1] and output.leads_to(end, context):
                    return slot, True
        return vacant, False

    def _token_at(self, place: int) -> int:
        return self._outputs[place >> _OFFSET_BITS].tokens[place & _OFFSET_MASK]


def _match_length(tokens: Sequence[int], offset: int, context: Sequence[int], known: int) -> int:
    """How many tokens before `offset` equal the end of `context`, from the `known` ones up to _MAX_MATCH."""
    limit = min(offset, len(context), _MAX_MATCH)
    while known < limit and tokens[offset - known - 1] == context[-known - 1]:
        known += 1
    return known


def belief(match_length: int, votes: int) -> float:
    """How sure a lookup is, in (0, 1): grows with the length, 2 or more, of the match and with the votes, 1 or more.

    One form for all: on code, 0.3 (2 tokens, seen once) to 0.98 (32 tokens, seen often) were about the shares accepted.
    """
    evidence = (match_length - 1) * (votes + 1)
    return evidence / (evidence + 4)
