"""The draft model as drafting.draft_model wants it: reads into the sequences' own blocks, guesses as the target would.

Its keys and values lie in tensors of its own under the target's block table, so that prefix hits, copies and freeing
serve both. Positions of verified tokens may lie in blocks that other sequences share: what is written there is what
they would write. Guesses go to blocks that are the sequence's own, since the step has made those positions writable.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from drafting.draft_model import Guess, Reading
from engines.batch import BatchItem, build_batch
from engines.kv_cache import KVCacheManager
from engines.model_runner import Runner
from engines.native import sampling as native
from engines.sampler import Sampler
from engines.sequence import Sequence
from engines.share import sample_row


class DraftReader:
    """The Reader protocol over a draft model's runner. `max_position` is the longest sequence it can read, in tokens.

    `vocab_size` is the target's: what the draft model has beyond is never guessed.
    """

    def __init__(self, runner: Runner, *, max_position: int, vocab_size: int, device: torch.device) -> None:
        self.max_position = max_position
        self._runner = runner
        self._device = device
        self._sampler = Sampler(vocab_size=vocab_size)
        self._kv: KVCacheManager | None = None
        self._sequences: Mapping[int, Sequence] = {}

    def attach(self, kv: KVCacheManager, sequences: Mapping[int, Sequence]) -> None:
        """Use these block tables. `sequences` is the caller's own view of the running sequences, by id."""
        self._kv = kv
        self._sequences = sequences

    def copy_blocks(self, copies: SequenceOf[tuple[int, int]]) -> None:
        """See Runner.copy_blocks."""
        self._runner.copy_blocks(copies)

    def num_read(self, seq_id: int) -> int:
        """See Reader. Never all tokens: the newest is read again, since its logits are needed."""
        assert self._kv is not None
        sequence = self._sequences[seq_id]
        return min(self._kv.drafted(sequence), sequence.num_tokens - 1)

    @torch.inference_mode()
    def read(self, readings: SequenceOf[Reading]) -> list[Guess | None]:
        """See Reader."""
        assert self._kv is not None
        items = [_batch_item(self._sequences[reading.seq_id], reading) for reading in readings]
        logits = self._runner.forward(build_batch(items, self._kv.block_size, self._device))
        for reading in readings:
            self._kv.note_drafted(self._sequences[reading.seq_id], reading.stop, reading.drafts)
        wanted = [reading for reading in readings if reading.guesses]
        guesses = iter(self._guess(logits, wanted))
        return [next(guesses) if reading.guesses else None for reading in readings]

    def _guess(self, logits: Tensor, readings: SequenceOf[Reading]) -> list[Guess]:
        """What the target would say if these were its logits [num_readings, vocab]."""
        if not readings:
            return []
        rows = [sample_row(self._sequences[reading.seq_id], reading.drafts) for reading in readings]
        chosen = self._sampler.choose(logits, rows)
        # A model that overflows says NaN: no belief, and nothing to stop the engine for.
        beliefs = _probabilities(logits, chosen).nan_to_num()
        token_ids, probabilities = torch.stack((chosen.double(), beliefs.double())).cpu().tolist()  # one read for both
        return [Guess(int(token_id), belief) for token_id, belief in zip(token_ids, probabilities, strict=True)]


def _probabilities(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Softmax of logits [num_rows, vocab] at `token_ids` [num_rows]; float32 [num_rows]."""
    if native.takes(logits):
        return native.probabilities(logits, token_ids)
    return logits.float().softmax(-1).gather(1, token_ids[:, None])[:, 0]


def _batch_item(sequence: Sequence, reading: Reading) -> BatchItem:
    known = sequence.num_tokens
    stop = max(reading.start, min(reading.stop, known))
    return BatchItem(
        token_ids=sequence.token_ids,
        start=reading.start,
        stop=stop,
        drafts=reading.drafts[stop - known : reading.stop - known] if reading.stop > known else (),
        block_table=sequence.block_table,
        num_logit_rows=int(reading.guesses),
    )
