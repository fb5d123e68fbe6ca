"""Tokenizers made in the test, small enough to read."""

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from engines.tokenizer import Tokenizer


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """Token i reads "w<i>"; tokens are separated by one space."""
    backend = Backend(models.WordPiece({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def character_tokenizer() -> PreTrainedTokenizerFast:
    """96 tokens: a newline and the printable characters of ASCII."""
    vocabulary = {character: i for i, character in enumerate(["\n", *map(chr, range(32, 127))])}
    backend = Backend(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)
