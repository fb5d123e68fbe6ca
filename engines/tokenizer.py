"""Text to token ids and back, over a transformers tokenizer; the way back one token at a time.

Every token is a piece of bytes, whatever the tokenizer's family: byte-level BPE, SentencePiece with byte fallback,
WordPiece. Only the first visible token of a text can read differently (SentencePiece drops its leading space). So
detokenizing is concatenating bytes and cutting them into characters, at a cost per token that does not depend on how
much came before.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError  # transformers lets its template engine's errors pass
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from engines.checkpoint_formats import gguf_arguments, has_own_tokenizer, split_gguf
from engines.errors import InvalidRequestError, ModelLoadError
from engines.types import ChatMessage

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Newer than the oldest transformers that engines run with.
_CAN_SANITIZE = "sanitize_control_tokens" in inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters
_PROBE = "Hello, world! It's a probe: 12 + 34.\n\tnaïve 漢字 🙂 ¿qué?  two spaces"


class Tokenizer:
    """A tokenizer as engines and gateway need it, made by `Tokenizer.load`; `len` is one more than its highest id.

    Raises ModelLoadError if the tokenizer's decoder cannot be reproduced token by token.
    """

    def __init__(self, hf_tokenizer: PreTrainedTokenizerFast, eos_token_ids: Iterable[int] = ()) -> None:
        self._hf = hf_tokenizer
        own_eos = [] if hf_tokenizer.eos_token_id is None else [hf_tokenizer.eos_token_id]
        self.eos_token_ids: frozenset[int] = frozenset([*eos_token_ids, *own_eos])
        # Ids may have gaps, and the highest are often the ones that end a text.
        self._num_ids = max(hf_tokenizer.get_vocab().values(), default=-1) + 1
        added = hf_tokenizer.added_tokens_decoder
        self.special_token_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        # The decoder's own description is the only place that tells how tokens become text.
        decoder = hf_tokenizer.backend_tokenizer.decoder
        kind = decoder.__getstate__().decode() if decoder is not None else ""
        self._is_byte_level = "ByteLevel" in kind
        self.has_byte_fallback = "ByteFallback" in kind
        self._anchor = () if self._is_byte_level else self._find_anchor()
        self._bytes: dict[int, bytes] = {}
        self._check_decoding()
        if self.has_chat_template:
            self._check_template()

    @classmethod
    def load(cls, model: str, revision: str | None = None) -> Tokenizer:
        """The tokenizer of a folder in Hugging Face format, of a hub id or of a GGUF file; raises ModelLoadError.

        One in Hugging Face format that lies beside a local GGUF file is preferred to the file's own.
        """
        folder, gguf_file = split_gguf(model)
        if model.startswith(("/", "./", "../", "~")) and not Path(folder).is_dir():
            raise ModelLoadError(f"Cannot load the tokenizer of {model!r}: there is no such folder.")
        if has_own_tokenizer(folder):
            gguf_file = None
        try:
            hf_tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, **gguf_arguments(gguf_file))
            eos_token_ids = _configured_eos(folder, revision)
        except Exception as error:  # the tokenizers library raises plain Exception
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelLoadError(f"Cannot load the tokenizer of {model!r}: {reason}") from error
        if not isinstance(hf_tokenizer, PreTrainedTokenizerFast):
            raise ModelLoadError(f"Cannot load the tokenizer of {model!r}: it has no tokenizer.json.")
        return cls(hf_tokenizer, eos_token_ids)

    def __len__(self) -> int:
        return self._num_ids

    def vocabulary(self) -> dict[int, str]:
        """The token of each id, as the tokenizer's file has it."""
        return {token_id: token for token, token_id in self._hf.get_vocab().items()}

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of `text`; `add_special_tokens` adds what the model expects around a prompt, such as BOS."""
        return tuple(self._hf.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` read from the start of a text, without special tokens."""
        # Cleaning up would rewrite text that was already streamed (" n't" once the "t" comes).
        text = self._hf.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def apply_chat_template(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Token ids of the conversation, ready for the assistant's answer.

        Raises InvalidRequestError if there is no template, or if it rejects the messages.
        """
        if not self.has_chat_template:
            raise InvalidRequestError("This model has no chat template; use the completions endpoint.", "messages")
        token_ids = self._render([_turn(message) for message in messages])
        nameless = [replace(message, name=None) for message in messages]
        if nameless != list(messages) and self._render([_turn(message) for message in nameless]) == token_ids:
            raise InvalidRequestError("This model's chat template has no place for a message's name.", "messages")
        return token_ids

    def _render(self, conversation: list[dict[str, str]]) -> tuple[int, ...]:
        # What a user types must not read as a turn's beginning or end.
        safe: Any = {"sanitize_control_tokens": True} if _CAN_SANITIZE else {}
        try:
            token_ids = self._hf.apply_chat_template(
                conversation, add_generation_prompt=True, return_dict=False, **safe
            )
        # Templates are programs: besides raise_exception() they stumble over roles and lengths they did not expect.
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise InvalidRequestError(f"The chat template rejects the messages: {error}", "messages") from error
        return tuple(token_ids)

    def _check_template(self) -> None:
        """Raise ModelLoadError for a template that is no template; one that only rejects this conversation is fine."""
        try:
            self._render([{"role": "user", "content": "a"}])
        except InvalidRequestError as error:
            if isinstance(error.__cause__, TemplateSyntaxError):
                raise ModelLoadError(f"The chat template cannot be read: {error.__cause__}") from error

    def token_text(self, token_id: int) -> str:
        """The token as OpenAI's logprobs show it: a special token's name, else its own text, broken bytes replaced."""
        if token_id in self.special_token_ids:
            return str(self._hf.convert_ids_to_tokens(token_id))
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the token adds to a text, possibly part of a character; b"" for special tokens."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self.special_token_ids:
            return b""
        token = self._hf.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):
            return b""  # an id beyond the vocabulary, which padded logits can yield
        if self._is_byte_level:
            values = [_byte_values().get(character) for character in token]
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if self.has_byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return self.decode([*self._anchor, token_id]).removeprefix(self.decode(self._anchor)).encode()

    def _find_anchor(self) -> tuple[int, ...]:
        """A visible token, to put before another and see how that reads in the middle of a text."""
        likely = self.encode("a", add_special_tokens=False)
        for token_id in chain(reversed(likely), range(len(self))):
            alone = self.decode([token_id])
            if alone.strip() and REPLACEMENT not in alone:
                return (token_id,)
        raise ModelLoadError("The tokenizer has no token that can be seen.")

    def _check_decoding(self) -> None:
        token_ids = self.encode(_PROBE)
        stream = IncrementalDetokenizer(self)
        if stream.push(token_ids) + stream.finish() != self.decode(token_ids):
            kind = type(self._hf.backend_tokenizer.decoder).__name__
            raise ModelLoadError(f"The tokenizer's {kind} decoder cannot be reproduced token by token.")


class IncrementalDetokenizer:
    """Turns the tokens of one output into text as they come; never emits part of a character.

    What is pushed and finished, concatenated, equals `Tokenizer.decode` of the output as it reads after the prompt,
    with one exception: where a run of byte-fallback tokens is not UTF-8 throughout, `decode` throws away the run's good
    characters as well. They may have been sent by then, so here only the bad bytes become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._partial = b""
        special = tokenizer.special_token_ids
        self._is_start = all(token_id in special for token_id in reversed(prompt_token_ids))

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these tokens."""
        return self._take(b"".join(self._piece(token_id) for token_id in token_ids), is_end=False)

    def finish(self) -> str:
        """The held-back bytes of an unfinished character as U+FFFD; call once, at the end."""
        return self._take(b"", is_end=True)

    def _piece(self, token_id: int) -> bytes:
        piece = self._tokenizer.token_bytes(token_id)
        if not self._is_start or token_id in self._tokenizer.special_token_ids:
            return piece
        self._is_start = False
        alone = self._tokenizer.decode([token_id])
        return piece if REPLACEMENT in alone else alone.encode()

    def _take(self, data: bytes, is_end: bool) -> str:
        """Decode all whole characters of what is held plus `data`; every bad sequence reads as the tokenizer has it."""
        data, self._partial = self._partial + data, b""
        texts = []
        while data:
            try:
                texts.append(data.decode())
                break
            except UnicodeDecodeError as error:
                texts.append(data[: error.start].decode())
                if error.reason == "unexpected end of data" and not is_end:
                    self._partial = data[error.start :]
                    break
                # Byte level follows Unicode's advice, one mark per broken character; byte fallback marks every byte.
                texts.append(REPLACEMENT * (error.end - error.start if self._tokenizer.has_byte_fallback else 1))
                data = data[error.end :]
        return "".join(texts)


def _turn(message: ChatMessage) -> dict[str, str]:
    named = {} if message.name is None else {"name": message.name}
    return {"role": message.role, "content": message.content} | named


@cache
def _byte_values() -> dict[str, int]:
    """How byte-level BPE writes bytes: as itself what is printable in Latin-1, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _configured_eos(model: str, revision: str | None) -> list[int]:
    """EOS ids of generation_config.json, or where it is missing or silent, of config.json; [] without either."""
    for name in ("generation_config.json", "config.json"):
        path = cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        eos = json.loads(Path(path).read_text("utf-8")).get("eos_token_id") if path else None
        if eos is not None:
            return list(eos) if isinstance(eos, list) else [int(eos)]
    return []
