"""A sequence: one choice of one request, from admission to its last token."""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field

from engines.block_hash import BlockHash
from engines.logits import TokenHistory
from engines.text_stream import TextStream
from engines.types import DraftCounts, GenerateRequest


class Status(enum.Enum):
    WAITING = "waiting"  # never admitted, or preempted: holds no blocks
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """`num_computed_tokens` chases `len(token_ids)`; the difference is the work to do (vLLM v1's one rule).

    `block_table` covers at least the computed tokens. `num_pending_forks` choices wait for this one's prompt to be
    computed and then share its blocks. `order` is the scheduling key: smaller runs first.

    The draft model's memory lies in the same blocks: it has read the first `num_drafted_tokens` known tokens, and after
    them `draft_tail`, guesses of its own that may or may not have become known tokens since.
    """

    seq_id: int
    request: GenerateRequest
    index: int  # of the choice
    seed: int
    order: tuple[float, int]
    token_ids: list[int]
    num_prompt_tokens: int
    root: BlockHash
    text: TextStream
    history: TokenHistory | None  # None where no penalty asks for it
    suppressed: tuple[int, ...]  # ids masked until min_tokens are out
    stop_ids: frozenset[int]  # ids that end the output: EOS unless ignored, and stop_token_ids
    num_pending_forks: int = 0
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    num_preemptions: int = 0
    drafts: dict[str, DraftCounts] = field(default_factory=dict)  # what was verified, by drafter
    block_table: array[int] = field(default_factory=lambda: array("i"))
    block_hashes: list[BlockHash] = field(default_factory=list)
    num_published_blocks: int = 0  # leading blocks whose hash the pool was told
    num_drafted_tokens: int = 0
    draft_tail: tuple[int, ...] = ()
    num_drafted_blocks: int = 0  # leading blocks that the pool was told the draft model has read

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """All but the newest token are computed: one forward yields the next."""
        return self.num_uncomputed_tokens == 1 and self.num_output_tokens > 0
