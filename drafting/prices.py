"""What a step's tokens cost, from the learnt costs of the target's and the draft model's forwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from drafting.cost import StepCost
from drafting.draft_length import Market

# Standard deviations by which lengths are chosen optimistically, so that what is doubtful gets tried.
_OPTIMISM = 1.0
# Catching up is paid back over the steps that follow; no more of them are counted on.
_HORIZON_STEPS = 32


@dataclass(frozen=True, slots=True)
class Load:
    """A step without its drafts: tokens in the forward, sequences, and KV tokens they attend to.

    `num_decodes` of the sequences emit a token whatever is drafted.
    """

    num_tokens: int
    num_seqs: int
    num_kv_tokens: int
    num_decodes: int


class Prices:
    """Seconds, as believed now. `verify` is learnt from the target's forwards, `draft` from the draft model's."""

    def __init__(self, verify: StepCost, draft: StepCost) -> None:
        self.verify = verify
        self.draft = draft

    def market(self, load: Load, max_drafts: int) -> Market:
        """What up to `max_drafts` draft tokens cost on top of `load`; `verify` must have seen something."""
        num_tokens = np.concatenate(([load.num_decodes], load.num_tokens + np.arange(max_drafts + 2)))
        decode_s, *step_s = self._predict(num_tokens, load, _OPTIMISM)
        prefill_s = step_s[0] - decode_s
        return Market(load.num_decodes, np.array(step_s) - prefill_s, lambda depth, num: self.draft_s(load, depth, num))

    def draft_s(self, load: Load, depth: int, num_seqs: int) -> float:
        """Seconds of `depth` rounds of the draft model for so many sequences.

        Nothing before it was ever measured, so that it will be.
        """
        if not (depth and num_seqs and self.draft.is_known):
            return 0.0
        share = load.num_kv_tokens * num_seqs // max(1, load.num_seqs)
        return depth * float(self.draft.predict(num_seqs, num_seqs, share))

    def reading_s(self, num_unread: int, num_tokens: int) -> float:
        """Seconds for the draft model to read the unread tokens of a sequence of `num_tokens`, beyond the newest."""
        if num_unread <= 2 or not self.draft.is_known:
            return 0.0
        one_s, all_s = self.draft.predict(np.array([1, num_unread]), 1, num_tokens)
        return float(all_s - one_s)

    def plain_s(self, load: Load, num_emitted: int) -> float:
        """Seconds that plain decoding is believed to need until the step's decoding sequences have emitted as much."""
        if not (self.verify.is_known and load.num_decodes):
            return 0.0
        decode_s, step_s = self._predict(np.array([load.num_decodes, load.num_tokens]), load)
        return float(step_s + decode_s * (num_emitted - load.num_decodes) / load.num_decodes)

    def state(self) -> dict[str, Any]:
        """What was learnt, fit for JSON; None where nothing was."""
        return {
            "verify": self.verify.state() if self.verify.is_known else None,
            "draft": self.draft.state() if self.draft.is_known else None,
        }

    def _predict(self, num_tokens: npt.NDArray[np.int64], load: Load, optimism: float = 0.0) -> npt.NDArray[np.float64]:
        return self.verify.predict(num_tokens, load.num_seqs, load.num_kv_tokens, optimism)


def per_step(seconds: float, num_left: int) -> float:
    """A cost that is paid once, spread over the steps that a sequence with `num_left` tokens to go may profit from."""
    # Half of them, since speculation shortens what is left.
    return seconds / max(1, min(_HORIZON_STEPS, num_left // 2))
