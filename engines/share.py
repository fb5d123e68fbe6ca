"""One sequence's share of a step: the rows it brings to the batch, and the rows it wants sampled."""

from __future__ import annotations

from dataclasses import dataclass

from drafting.speculator import Chosen
from engines.batch import BatchItem
from engines.sampler import SampleRow
from engines.scheduler import Scheduled
from engines.sequence import Sequence
from engines.types import TARGET


@dataclass(slots=True)
class Share:
    """A scheduled sequence with its drafts and the choices that fork from it in this step."""

    item: Scheduled
    chosen: Chosen | None
    forks: list[Sequence]

    @property
    def drafts(self) -> tuple[int, ...]:
        """The drafted tokens to verify."""
        return self.chosen.draft.token_ids if self.chosen else ()

    @property
    def source(self) -> str:
        """The drafter whose drafts these are; "target" without any."""
        return self.chosen.source if self.chosen else TARGET

    @property
    def num_tokens(self) -> int:
        """Its tokens in the forward."""
        return self.item.num_tokens + len(self.drafts)

    @property
    def num_rows(self) -> int:
        """Logits rows of its own: the newest known token's and each draft's."""
        return 1 + len(self.drafts) if self.item.reaches_end else 0

    def batch_item(self) -> BatchItem:
        sequence, start = self.item.sequence, self.item.sequence.num_computed_tokens
        return BatchItem(
            token_ids=sequence.token_ids,
            start=start,
            stop=start + self.item.num_tokens,
            drafts=self.drafts,
            block_table=sequence.block_table,
            num_logit_rows=self.num_rows,
            num_copies=len(self.forks),
        )

    def sample_rows(self) -> list[SampleRow]:
        rows = [sample_row(self.item.sequence, self.drafts[:i]) for i in range(self.num_rows)]
        return rows + [sample_row(fork, ()) for fork in self.forks]


def sample_row(sequence: Sequence, draft_prefix: tuple[int, ...]) -> SampleRow:
    """The row that samples the token after the sequence's own and `draft_prefix`."""
    return SampleRow(
        params=sequence.request.sampling,
        seed=sequence.seed,
        position=sequence.num_tokens + len(draft_prefix),
        num_output=sequence.num_output_tokens + len(draft_prefix),
        history=sequence.history,
        draft_prefix=draft_prefix,
        suppressed=sequence.suppressed,
    )
