"""The tokenizer of no model: one token per byte of UTF-8 and one for the end of text."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BackendTokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from engines.tokenizer import Tokenizer

EOS_TOKEN_ID = 256
EOS_TOKEN = "<|endoftext|>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes, 256 is the end of text. Its chat template writes one line per message."""
    # A byte-level BPE without merges; it writes every byte as one printable character.
    vocab = {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
    backend = BackendTokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(EOS_TOKEN, special=True, normalized=False)])
    hf_tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS_TOKEN)  # type: ignore[no-untyped-call]
    hf_tokenizer.chat_template = CHAT_TEMPLATE
    return Tokenizer(hf_tokenizer)
