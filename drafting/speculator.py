"""Speculation for a batch: ask the drafters, buy what pays, learn from what came of it.

    plan     every lookup is asked, since that costs nothing; lengths are ordered     (before blocks are reserved)
    draft    the model drafts where it was ordered to; what is verified is chosen     (blocks are reserved)
    observe  every draft at hand, bought or not, is compared with what was emitted    (after the step)

Judging what was not bought as well keeps the estimates free of selection: a drafter that is off is still known. For the
model, which costs something, a small share of the time is kept for drafts that are made to be judged only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from drafting.acceptance import Acceptance
from drafting.draft_length import LengthPolicy, Market, Option, Order, survivals
from drafting.draft_model import DraftModel
from drafting.pace import Pace
from drafting.prices import Load, Prices, per_step
from drafting.protocol import Draft, Drafter, DraftRequest, Source, Verdict

# The share of time spent on single drafts of an idle model, and how much of it may be saved up.
_PROBE_SHARE = 0.005
_MAX_CREDIT_S = 5.0
_NEARLY_READ_TOKENS = 64
# A step verifies at most so many times the drafts that any earlier one did: what was never measured is believed cheap,
# and a large batch would pay for that with one step as long as ten.
_MAX_GROWTH = 2


@dataclass(frozen=True, slots=True)
class Chosen:
    """A draft to be verified, and who made it."""

    source: Source
    draft: Draft


@dataclass(slots=True)
class _Case:
    """A sequence in the step under way, every draft made for it, and how far each is believed to survive."""

    request: DraftRequest
    at_hand: dict[Source, Draft] = field(default_factory=dict)
    survivals: dict[Source, tuple[float, ...]] = field(default_factory=dict)
    order: Order = field(default_factory=Order)

    def best(self, max_tokens: int) -> Source:
        """Who made the draft whose first `max_tokens` tokens bring most; there is one."""
        return max(self.at_hand, key=lambda source: sum(self.survivals[source][:max_tokens]))


class Speculator:
    """Combines drafters under one length policy. One thread calls, in the order plan, draft, observe.

    `lookups` are the drafters that cost nothing, by source; they and `policy` may be replaced between two steps.
    `acceptance` has an entry for each of them, and for the model's drafts. `time_s` is what the steps took in which
    drafts were looked for, all told, and `plain_time_s` what plain decoding is believed to need for what they emitted.
    """

    def __init__(
        self,
        policy: LengthPolicy,
        lookups: dict[Source, Drafter],
        model: DraftModel | None,
        acceptance: Mapping[Source, Acceptance],
        prices: Prices,
    ) -> None:
        self.policy = policy
        self.lookups = lookups
        self._model = model
        self._acceptance = acceptance
        self._prices = prices
        self._cases: dict[int, _Case] = {}
        self._load = Load(0, 0, 0, 0)
        self._market: Market | None = None
        self._credit_s = 0.0
        self._judging_s = 0.0
        self._num_verified = 0  # drafts, at most in one step
        self._pace = Pace(is_experienced=prices.verify.is_known)
        self.time_s = 0.0
        self.plain_time_s = 0.0
        self._num_probes = 0
        self._probed: int | None = None

    @property
    def sources(self) -> frozenset[Source]:
        """The drafters there are."""
        return frozenset(self._acceptance)

    @property
    def num_tracked(self) -> int:
        """Entries kept here for sequences, zero once all have ended."""
        return len(self._cases) + len(self._pace)

    def plan(self, requests: Sequence[DraftRequest], load: Load) -> list[int]:
        """How many drafts to reserve room for, for each request in order; at most its `max_drafts`."""
        self._load = load
        awake = list(requests)
        if self.policy.explores:  # a fixed length never rests, nor does it use up the rests of an adaptive one
            self._pace.begin_step(load.num_decodes, frozenset(request.source for request in requests))
            awake = [request for request in requests if not self._pace.rests(request.seq_id)]
        self._cases = {request.seq_id: _Case(request) for request in awake}
        if awake:
            self._order(list(self._cases.values()))
        cases = [self._cases.get(request.seq_id) for request in requests]
        return [case.order.num_drafts if case else 0 for case in cases]

    def draft(self, granted: Mapping[int, int]) -> dict[int, Chosen]:
        """Drafts to verify by sequence, of at most the granted lengths; sequences without one are left out.

        `granted` has how many tokens' room after their own the sequences of the plan have got, where any: above 0.
        """
        self._ask_model(granted)
        drafted = {seq_id: self._cases[seq_id] for seq_id in granted if self._cases[seq_id].at_hand}
        if not (drafted and self._market):
            return {}
        sources = [case.best(granted[seq_id]) for seq_id, case in drafted.items()]
        offers = [
            case.survivals[source][: granted[seq_id]]
            for (seq_id, case), source in zip(drafted.items(), sources, strict=True)
        ]
        lengths = self.policy.keep(offers, self._market)
        return {
            seq_id: Chosen(source, case.at_hand[source].first(length))
            for (seq_id, case), source, length in zip(drafted.items(), sources, lengths, strict=True)
            if length
        }

    def observe(self, verdicts: Sequence[Verdict], num_tokens: int, verify_s: float, drafting_s: float = 0.0) -> None:
        """Learn from a step: what it emitted, and how long it took.

        Its forward of `num_tokens` took `verify_s` seconds, `plan` and `draft` took `drafting_s`.
        """
        load = self._load
        if self._cases:
            self._judge_step(verdicts, num_tokens, verify_s, drafting_s + verify_s + self._judging_s)
        if num_tokens:
            self._prices.verify.observe(num_tokens, load.num_seqs, load.num_kv_tokens, verify_s)
        self._num_verified = max(self._num_verified, num_tokens - load.num_tokens)
        if self._cases:
            self._pace.end_step(was_plain=num_tokens == load.num_tokens)
        self._credit_s = min(self._credit_s + _PROBE_SHARE * verify_s, _MAX_CREDIT_S)
        for drafter in self.lookups.values():
            drafter.observe(verdicts)
        started = time.perf_counter()  # what is above takes as long where nobody is looked at
        for verdict in verdicts:
            case = self._cases.get(verdict.seq_id)
            if case is not None:
                self._judge(case, verdict)
        self._cases.clear()
        self._market = None
        self._judging_s = time.perf_counter() - started

    def forget(self, seq_id: int) -> None:
        """Drop all state of a sequence that has ended."""
        self._cases.pop(seq_id, None)
        self._pace.forget(seq_id)
        for drafter in self.lookups.values():
            drafter.forget(seq_id)
        if self._model is not None:
            self._model.forget(seq_id)
        for acceptance in self._acceptance.values():
            acceptance.forget(seq_id)

    def state(self) -> dict[str, Any]:
        """What was learnt, fit for JSON: costs, and acceptance by source."""
        return {
            "prices": self._prices.state(),
            "acceptance": {source: acceptance.state() for source, acceptance in self._acceptance.items()},
        }

    def _order(self, cases: Sequence[_Case]) -> None:
        self._look_up(cases)
        options = [self._option(case) for case in cases]
        is_plain_due = self.policy.explores and self._pace.is_plain_due
        # Lookups find nothing in most steps: then there is nothing to be priced either.
        if (
            any(option.found or option.model for option in options)
            and self._prices.verify.is_known
            and not is_plain_due
        ):
            most = max(self._load.num_decodes, _MAX_GROWTH * self._num_verified)
            self._market = self._prices.market(self._load, min(most, sum(case.request.max_drafts for case in cases)))
            orders = self.policy.order(options, self._market)
            for case, option, order in zip(cases, options, orders, strict=True):
                case.order = order
                if option.found or option.model:  # lookups that find nothing now may find something next
                    self._pace.note(case.request.seq_id, bought=order.num_drafts > 0)
        self._order_probe(cases)

    def _look_up(self, cases: Sequence[_Case]) -> None:
        for source, drafter in self.lookups.items():
            asked = [case for case in cases if case.request.source in (None, source)]
            for case, draft in zip(asked, drafter.propose([case.request for case in asked]), strict=True):
                if draft.token_ids:
                    self._take(case, source, draft.first(case.request.max_drafts))

    def _option(self, case: _Case) -> Option:
        seq_id = case.request.seq_id
        best = max(case.survivals.values(), key=sum, default=())
        if self._model is None or case.request.source not in (None, "model"):
            return Option(best)
        rates = self._acceptance["model"].expected(seq_id, self._model.room(case.request))
        reading_s = per_step(self._reading_s(case.request), case.request.num_left)
        return Option(best, survivals(rates), reading_s)

    def _reading_s(self, request: DraftRequest) -> float:
        """What the model's catching up with a sequence costs, in this step and in those that follow."""
        assert self._model is not None
        return self._prices.reading_s(self._model.num_unread(request), len(request.token_ids))

    def _take(self, case: _Case, source: Source, draft: Draft) -> None:
        case.at_hand[source] = draft
        case.survivals[source] = survivals(self._acceptance[source].rates(case.request.seq_id, draft.beliefs))

    def _order_probe(self, cases: Sequence[_Case]) -> None:
        """Where the model is off, have it make a single draft for one sequence, as often as the saved time allows."""
        self._probed = None
        if self._model is None or not self.policy.explores or any(case.order.by_model for case in cases):
            return
        case = self._to_probe(cases)
        if case is None:
            return
        num_unread = min(self._model.num_unread(case.request), self._model.max_reading_tokens)
        cost_s = self._prices.draft_s(self._load, 1, 1)
        cost_s += self._prices.reading_s(num_unread, len(case.request.token_ids))
        if cost_s > self._credit_s:
            return
        self._credit_s -= cost_s
        self._num_probes += 1
        self._probed = case.request.seq_id
        case.order = replace(case.order, num_drafts=max(1, case.order.num_drafts))

    def _to_probe(self, cases: Sequence[_Case]) -> _Case | None:
        """One of those that the model has read nearly all of, in turn; or else the one that lacks the least of it."""
        assert self._model is not None
        eligible = [
            (self._model.num_unread(case.request), case)
            for case in cases
            if case.request.source in (None, "model") and self._model.room(case.request)
        ]
        near = [case for num_unread, case in eligible if num_unread <= _NEARLY_READ_TOKENS]
        if near:
            return near[self._num_probes % len(near)]
        return min(eligible, key=lambda pair: pair[0], default=(0, None))[1]

    def _ask_model(self, granted: Mapping[int, int]) -> None:
        if self._model is None:
            return
        asked, second_price = [], 0.0
        for seq_id, count in granted.items():
            case = self._cases[seq_id]
            is_probe = seq_id == self._probed
            if case.order.by_model or is_probe:
                asked.append(replace(case.request, max_drafts=1 if is_probe else count))
                second_price = case.order.second_price
        if asked:
            drafts = self._model.propose(asked, self._token_prices(second_price), second_price)
            for request, draft in zip(asked, drafts, strict=True):
                if draft.token_ids:
                    self._take(self._cases[request.seq_id], "model", draft)

    def _token_prices(self, second_price: float) -> list[float]:
        """What verifying each further token is worth, in emitted tokens, beyond those that lookups are to have."""
        if self._market is None:
            return [0.0]
        num_found = sum(case.order.num_drafts for case in self._cases.values() if not case.order.by_model)
        step_s = self._market.verify_s[min(num_found, len(self._market.verify_s) - 2) :]
        return [second_price * float(further) for further in np.diff(step_s)]

    def _judge_step(self, verdicts: Sequence[Verdict], num_tokens: int, verify_s: float, spent_s: float) -> None:
        """Compare what a step took, all told, with what plain decoding needs for what it emitted."""
        if num_tokens == self._load.num_tokens:
            plain_s = verify_s  # nothing was verified: what looking cost is known, and no estimate
        else:
            num_emitted = sum(verdict.num_new for verdict in verdicts if verdict.was_decoding)
            plain_s = self._prices.plain_s(self._load, num_emitted)
        if self.policy.explores:  # a fixed length says nothing of what an adaptive one would bring
            self._pace.judge(plain_s, spent_s)
        self.plain_time_s += plain_s
        self.time_s += spent_s

    def _judge(self, case: _Case, verdict: Verdict) -> None:
        """Compare every draft at hand with what was emitted, as far as that goes."""
        emitted = verdict.token_ids[len(verdict.token_ids) - verdict.num_new :]
        for source, acceptance in self._acceptance.items():
            draft = case.at_hand.get(source, Draft())
            num_judged = min(len(draft.token_ids), len(emitted))
            agrees = (a == b for a, b in zip(draft.token_ids, emitted, strict=False))
            num_right = next((i for i, is_right in enumerate(agrees) if not is_right), num_judged)
            acceptance.observe(case.request.seq_id, draft.beliefs, num_right, num_judged)
