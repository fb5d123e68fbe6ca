"""From sequences to a ragged batch."""

from array import array

import torch

from engines.batch import BatchItem, build_batch


def test_chunk_decode_and_verify_in_one_batch() -> None:
    chunk = BatchItem(list(range(100, 110)), 3, 7, (), array("i", [5, 2, 9]), num_logit_rows=0)
    decode = BatchItem([1, 2, 3, 4, 5], 4, 5, (), array("i", [7, 1]), num_logit_rows=1)
    verify = BatchItem([6, 7, 8], 2, 3, (91, 92), array("i", [0, 4]), num_logit_rows=3)
    batch = build_batch([chunk, decode, verify], block_size=4, device=torch.device("cpu"))
    assert batch.input_ids.tolist() == [103, 104, 105, 106, 5, 8, 91, 92]
    assert batch.positions.tolist() == [3, 4, 5, 6, 4, 2, 3, 4]
    assert batch.slot_mapping.tolist() == [23, 8, 9, 10, 4, 2, 3, 16]
    assert batch.cu_seqlens_q.tolist() == [0, 4, 5, 8]
    assert batch.kv_lens.tolist() == [7, 5, 5]
    assert batch.block_table.tolist() == [[5, 2], [7, 1], [0, 4]]
    assert batch.logit_rows.tolist() == [4, 5, 6, 7]
    assert (batch.num_seqs, batch.q_lens_cpu, batch.kv_lens_cpu) == (3, (4, 1, 3), (7, 5, 5))


def test_forking_choices_get_copies_of_the_last_row() -> None:
    prompt = BatchItem([1, 2, 3], 0, 3, (), array("i", [0]), num_logit_rows=1, num_copies=2)
    other = BatchItem([4], 0, 1, (), array("i", [1]), num_logit_rows=1)
    batch = build_batch([prompt, other], block_size=4, device=torch.device("cpu"))
    assert batch.logit_rows.tolist() == [2, 2, 2, 3]


def test_blocks_reserved_beyond_the_rows_are_left_out() -> None:
    item = BatchItem([1, 2], 1, 2, (), array("i", [3, 8, 9]), num_logit_rows=1)
    assert build_batch([item], block_size=4, device=torch.device("cpu")).block_table.tolist() == [[3]]
