"""A decision as JSON: every replica considered, its expected seconds, and why it was or was not the choice."""

from __future__ import annotations

from gateway.answers import JsonObject
from gateway.routing.replica_choice import Candidate, Expectation, ReplicaDecision
from gateway.routing.replica_router import Explained


def explanation(explained: Explained | None, prompt_tokens: int) -> JsonObject:
    """Sections of a receipt: times in seconds, warmth in tokens of this prompt; None where something is unknown.

    `state` is "shared", "local" (Redis did not answer in time: this gateway's own knowledge), or "blind" where no
    replica was known yet and Serve chose by queue length.
    """
    if explained is None:
        return {"state": "blind", "prompt_tokens": prompt_tokens, "chosen": None, "reason": "none", "candidates": []}
    decision = explained.decision
    return {
        "state": explained.view.source,
        "prompt_tokens": prompt_tokens,
        "chosen": decision.replica,
        "reason": decision.reason,
        "cached_tokens_expected": _expected(decision),
        "session_was_at": explained.view.pinned,
        "candidates": [
            _candidate(candidate, expectation, expectation.replica == decision.replica)
            for candidate, expectation in zip(explained.candidates, decision.expectations, strict=True)
        ],
    }


def _expected(decision: ReplicaDecision) -> int:
    return 0 if decision.replica is None else decision.expectation(decision.replica).warm_tokens


def _candidate(candidate: Candidate, expectation: Expectation, is_chosen: bool) -> JsonObject:
    return {
        "replica": candidate.replica,
        "chosen": is_chosen,
        "set_aside": expectation.set_aside,
        "expected_s": round(expectation.expected_s, 6),
        "score": round(expectation.score, 6),
        "parts": {
            "wait_s": round(expectation.wait_s, 6),
            "prefill_s": round(expectation.prefill_s, 6),
            "decode_s": round(expectation.decode_s, 6),
            "pressure_s": round(expectation.pressure_s, 6),
            "copied_s": round(expectation.copied_s, 6),
            "ahead_s": round(expectation.ahead_s, 6),
        },
        "warm_tokens": expectation.warm_tokens,
        "new_tokens": expectation.new_tokens,
        "confirmed_tokens": candidate.confirmed_tokens,
        "queued_tokens": candidate.queued_tokens,
        "in_flight": candidate.in_flight,
        "kv_use": candidate.kv_use,
        "prefill_tokens_per_s": candidate.prefill_rate,
        "trust": round(candidate.trust, 4),
        "draining": candidate.draining,
    }
