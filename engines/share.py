"""One sequence's share of a step: the rows it brings to the batch, and the rows it wants sampled."""

from __future__ import annotations

from dataclasses import dataclass

from engines.batch import BatchItem
from engines.sampler import SampleRow
from engines.scheduler import Scheduled
from engines.sequence import Sequence


@dataclass(slots=True)
class Share:
    """A scheduled sequence with its drafts and the choices that fork from it in this step."""

    item: Scheduled
    drafts: tuple[int, ...]
    forks: list[Sequence]

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
        rows = [_sample_row(self.item.sequence, self.drafts[:i]) for i in range(self.num_rows)]
        return rows + [_sample_row(fork, ()) for fork in self.forks]


def _sample_row(sequence: Sequence, draft_prefix: tuple[int, ...]) -> SampleRow:
    return SampleRow(
        params=sequence.request.sampling,
        seed=sequence.seed,
        position=sequence.num_tokens + len(draft_prefix),
        num_output=sequence.num_output_tokens + len(draft_prefix),
        history=sequence.history,
        draft_prefix=draft_prefix,
        suppressed=sequence.suppressed,
    )
