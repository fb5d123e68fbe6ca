"""From messages or text to what an engine takes: token ids wherever it accepts them, else text or turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from engines.config import EchoEngineConfig, EngineConfig, RemoteEngineConfig
from engines.types import ChatMessage, ChatPrompt, ModelCard, Prompt, PromptKind, TextPrompt, TokenPrompt
from gateway.errors import BadRequestError
from gateway.openai import Message

if TYPE_CHECKING:
    from engines.tokenizer import Tokenizer

T = TypeVar("T")

# Encoding runs at some megabytes a second: beyond this it would hold up everybody else's streams.
_LONG_PROMPT_CHARS = 16_384
# Of whole texts, not of single tokens: prose has about 4, deeply indented code 10.
_MAX_CHARS_PER_TOKEN = 16


class PromptBuilder:
    """Builds prompts for one model. Without a tokenizer, the engine must take text or turns."""

    def __init__(self, kinds: frozenset[PromptKind], tokenizer: Tokenizer | None = None) -> None:
        self._kinds = kinds
        self._tokenizer = tokenizer if "tokens" in kinds else None

    async def chat(self, messages: Sequence[Message]) -> Prompt:
        """The conversation as a prompt. Raises BadRequestError, or InvalidRequestError if the template objects."""
        # Templates know only the older name of the developer's role.
        turns = tuple(
            ChatMessage("system" if message.role == "developer" else message.role, message.text, message.name)
            for message in messages
        )
        if self._tokenizer is not None:
            tokenizer = self._tokenizer
            size = sum(len(turn.content) for turn in turns)
            return TokenPrompt(tuple(await _aside(size, lambda: tokenizer.apply_chat_template(turns))))
        if "chat" not in self._kinds:
            raise BadRequestError("This model takes no chat messages; use /v1/completions.", param="messages")
        return ChatPrompt(turns)

    async def text(self, prompt: str | tuple[int, ...]) -> Prompt:
        """A raw prompt. Raises BadRequestError if it is empty or of a kind that the engine does not take."""
        if not isinstance(prompt, str):
            return self._token_prompt(prompt)
        if self._tokenizer is not None:
            tokenizer = self._tokenizer
            return self._token_prompt(tuple(await _aside(len(prompt), lambda: tokenizer.encode(prompt))))
        if "text" not in self._kinds:
            raise BadRequestError("This model takes no raw text; use /v1/chat/completions.", param="prompt")
        return TextPrompt(prompt)

    async def prediction(self, text: str, max_model_len: int | None) -> TokenPrompt | TextPrompt | None:
        """What the output is expected to be, in the prompts' kind; None for an empty text.

        A hint, so what lies beyond the context window of `max_model_len` tokens is cut off rather than refused, and
        special tokens are left out. (Spelling them out, by `split_special_tokens`, would switch the tokenizer under the
        other threads that use it.)
        """
        cut = text if max_model_len is None else text[: max_model_len * _MAX_CHARS_PER_TOKEN]
        if self._tokenizer is None:
            return TextPrompt(cut) if cut else None
        tokenizer = self._tokenizer
        token_ids = await _aside(len(cut), lambda: tokenizer.encode(cut, add_special_tokens=False))
        plain = tuple(token_id for token_id in token_ids if token_id not in tokenizer.special_token_ids)
        return TokenPrompt(plain[:max_model_len]) if plain else None

    def text_of(self, prompt: Prompt) -> str:
        """The prompt as text, for `echo`. Raises BadRequestError where only the engine could tell."""
        if isinstance(prompt, TextPrompt):
            return prompt.text
        if isinstance(prompt, TokenPrompt) and self._tokenizer is not None:
            return self._tokenizer.decode(prompt.token_ids)
        raise BadRequestError("`echo` is not supported for this prompt and model.", param="echo")

    def _token_prompt(self, token_ids: tuple[int, ...]) -> TokenPrompt:
        if "tokens" not in self._kinds:
            raise BadRequestError("This model takes no token ids as a prompt.", param="prompt")
        if not token_ids:
            raise BadRequestError("`prompt` must not be empty.", param="prompt")
        return TokenPrompt(token_ids)


def make_prompt_builder(engine: EngineConfig, card: ModelCard) -> PromptBuilder:
    """The prompt builder of a model whose engine has started. Reads files. Raises ModelLoadError."""
    if isinstance(engine, RemoteEngineConfig):
        return PromptBuilder(card.prompt_kinds)
    # transformers takes seconds to import, and a gateway to remote servers does without.
    from engines.byte_tokenizer import byte_tokenizer
    from engines.loading import resolve_source
    from engines.tokenizer import Tokenizer

    if isinstance(engine, EchoEngineConfig):
        tokenizer = byte_tokenizer() if engine.model == "echo" else Tokenizer.load(resolve_source(engine.model))
    else:
        tokenizer = Tokenizer.load(resolve_source(engine.model), engine.revision)
    return PromptBuilder(card.prompt_kinds, tokenizer)


async def _aside(num_chars: int, work: Callable[[], T]) -> T:
    """`work` in a thread if it is long; tokenizers release the interpreter lock while they work."""
    return await asyncio.to_thread(work) if num_chars > _LONG_PROMPT_CHARS else work()
