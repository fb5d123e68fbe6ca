from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from demo.chats import Chat
from demo.corpus import Document
from demo.stream import ROW_TOKENS, TokenStream, WindowOrder, concatenate, pack_chats, pack_documents
from demo.tokenizer import USER, token_id


def test_documents_are_joined_by_the_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [Document("m", "x = 1\n" * 300), Document("n", "y = 2\n" * 300)]
    stream = pack_documents(documents, tokenizer)
    assert len(stream.tokens) % ROW_TOKENS == 0
    text = tokenizer.decode(stream.tokens.astype(np.int64))
    assert "x = 1\n<|endoftext|>y = 2\n" in text


def test_a_row_of_chats_begins_with_one(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = Chat("m", ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there."}))
    stream = pack_chats([chat] * 500, tokenizer)
    assert stream.num_rows >= 2
    assert set(stream.windows(ROW_TOKENS, range(stream.num_rows))[:, 0].tolist()) == {token_id(tokenizer, USER)}


def test_windows_are_aligned(tmp_path: Path) -> None:
    stream = TokenStream(np.arange(2 * ROW_TOKENS, dtype=np.uint16))
    stream.save(tmp_path / "stream.npy")
    loaded = TokenStream.load(tmp_path / "stream.npy")
    assert loaded.windows(4, [1, 3]).tolist() == [[4, 5, 6, 7], [12, 13, 14, 15]]
    assert concatenate([stream, loaded]).num_rows == 4


def test_every_window_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    order = WindowOrder(num_windows=8, batch_size=4, seed=0)
    first = order.batch(0) + order.batch(1)
    second = order.batch(2) + order.batch(3)
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def test_a_batch_depends_on_the_step_alone() -> None:
    walked = WindowOrder(num_windows=5, batch_size=2, seed=0)
    batches = [walked.batch(step) for step in range(10)]
    assert [WindowOrder(5, 2, 0).batch(step) for step in range(10)] == batches
