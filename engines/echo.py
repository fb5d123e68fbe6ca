"""A deterministic fake: the completion is the prompt's tokens, over and over, one per choice and step.

Its next-token distribution is a point mass, which explains what each sampling parameter does here:

- max_tokens, stop, stop_token_ids, ignore_eos, min_tokens, logprobs and n mean what they mean everywhere. A token that
  ends the output is echoed like any other, so an EOS in the prompt ends the completion.
- A masked token (logit_bias -100; a token that ends the output, before min_tokens are out) is passed over: the next one
  in the prompt takes its place.
- logit_bias 100 would force a token that has no mass: UnsupportedParameterError. Smaller biases, temperature, top_k,
  top_p, min_p, the penalties and seed leave a point mass as it is.
- There is no drafter. "auto" and "none" are content with that, so is any max_draft_tokens, and every token's provenance
  is "target"; a named drafter or a prediction is an UnsupportedParameterError.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncGenerator

from engines.admission import Limits, check_request
from engines.byte_tokenizer import byte_tokenizer
from engines.config import EchoEngineConfig
from engines.errors import EngineDeadError, EngineOverloadedError, InvalidRequestError, UnsupportedParameterError
from engines.mailbox import Mailbox
from engines.text_stream import TextStream
from engines.tokenizer import Tokenizer
from engines.types import (
    IMPOSSIBLE_LOGPROB,
    Delta,
    EngineStats,
    FinishReason,
    GenerateRequest,
    ModelCard,
    Piece,
    SamplingParams,
    TokenLogprob,
    TopLogprob,
    Usage,
)


class EchoEngine:
    """The Engine protocol over echoing choices. At most `max_num_seqs` choices run at once, and none wait."""

    def __init__(self, config: EchoEngineConfig) -> None:
        self._config = config
        self._card: ModelCard | None = None
        self._dead: EngineDeadError | None = None
        self._mailboxes: dict[asyncio.Task[None], Mailbox] = {}
        self._num_running = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_finished = 0
        self._num_aborted = 0

    async def start(self) -> ModelCard:
        """See Engine.start. Raises ModelLoadError if the tokenizer's folder cannot be read."""
        if self._dead is not None:
            raise EngineDeadError(self._dead.message) from self._dead
        if self._card is None:
            self._tokenizer = await self._load_tokenizer()
            self._limits = _limits(self._config, len(self._tokenizer))
            self._card = _card(self._config, self._limits)
        return self._card

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[tuple[Delta, ...], None]:
        """See Engine.generate."""
        await self.check_health()
        choices = self._admit(request)
        mailbox = Mailbox(request.n)
        producer = asyncio.create_task(self._produce(choices, mailbox))
        producer.add_done_callback(self._check_produced)
        self._mailboxes[producer] = mailbox
        self._num_running += request.n
        try:
            while not mailbox.is_finished:
                yield await mailbox.get()
        finally:
            producer.cancel()
            self._num_running -= request.n
            self._num_finished += mailbox.is_finished
            self._num_aborted += not mailbox.is_finished
            del self._mailboxes[producer]

    async def stats(self) -> EngineStats:
        """See Engine.stats."""
        return EngineStats(
            num_running=self._num_running,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_finished=self._num_finished,
            num_aborted=self._num_aborted,
        )

    async def check_health(self) -> None:
        """See Engine.check_health."""
        if self._dead is not None:
            raise EngineDeadError(self._dead.message) from self._dead
        if self._card is None:
            raise EngineDeadError("The engine has not been started.")

    async def close(self) -> None:
        """See Engine.close."""
        self._die("The engine was closed.")

    def _die(self, reason: str) -> None:
        """End every stream; later requests are refused with the same words. Only the first reason counts."""
        if self._dead is not None:
            return
        self._dead = EngineDeadError(reason)
        for producer, mailbox in self._mailboxes.items():
            producer.cancel()
            mailbox.fail(self._dead)

    async def _load_tokenizer(self) -> Tokenizer:
        if self._config.model == "echo":
            return byte_tokenizer()
        return await asyncio.to_thread(Tokenizer.load, self._config.model)

    def _admit(self, request: GenerateRequest) -> list[_Choice]:
        prompt = check_request(request, self._limits)
        eos = frozenset[int]() if request.sampling.ignore_eos else self._tokenizer.eos_token_ids
        script = _Script(prompt, eos, request.sampling, request.speculation.provenance)
        if self._num_running + request.n > self._config.max_num_seqs:
            raise EngineOverloadedError(f"All of the engine's {self._config.max_num_seqs} sequences are taken.")
        self._num_prompt_tokens += len(prompt)
        return [_Choice(index, script, self._tokenizer) for index in range(request.n)]

    async def _produce(self, choices: list[_Choice], mailbox: Mailbox) -> None:
        """One token for each choice a step; a step takes `token_delay_s`."""
        while choices:
            await asyncio.sleep(self._config.token_delay_s)
            mailbox.put(tuple(choice.step() for choice in choices))
            self._num_steps += 1
            self._num_generated_tokens += len(choices)
            choices = [choice for choice in choices if not choice.is_finished]

    def _check_produced(self, producer: asyncio.Task[None]) -> None:
        """A producer that broke must not leave its reader waiting."""
        if not producer.cancelled() and (error := producer.exception()) is not None:
            self._die(f"The engine has crashed: {type(error).__name__}: {error}")


class _Script:
    """The tokens that all choices of a request will emit.

    Raises UnsupportedParameterError for a forced token, InvalidRequestError if the masks leave no token of the prompt.
    """

    def __init__(
        self, prompt: tuple[int, ...], eos: frozenset[int], sampling: SamplingParams, tells_provenance: bool
    ) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.tells_provenance = tells_provenance
        self.stop_ids = eos | frozenset(sampling.stop_token_ids)
        self._banned = frozenset(token_id for token_id, bias in sampling.logit_bias.items() if bias == -100)
        self._check()

    def masked(self, num_tokens: int) -> frozenset[int]:
        """Token ids that may not follow `num_tokens` emitted ones."""
        return self._banned | self.stop_ids if num_tokens < self.sampling.min_tokens else self._banned

    def _check(self) -> None:
        if any(bias == 100 for bias in self.sampling.logit_bias.values()):
            raise UnsupportedParameterError("An echo cannot be forced to another token.", "logit_bias")
        if self._banned.issuperset(self.prompt):
            raise InvalidRequestError("logit_bias bans every token of the prompt: nothing to echo.", "logit_bias")
        if self.masked(0).issuperset(self.prompt):
            raise InvalidRequestError("min_tokens rules out every token of the prompt: nothing to echo.", "min_tokens")


class _Choice:
    """One choice: a cursor in the prompt, and the text so far."""

    def __init__(self, index: int, script: _Script, tokenizer: Tokenizer) -> None:
        self.is_finished = False
        self._index = index
        self._script = script
        self._tokenizer = tokenizer
        self._tokens = itertools.cycle(script.prompt)
        self._text = TextStream(tokenizer, script.sampling.stop, script.prompt)
        self._num_tokens = 0

    def step(self) -> Delta:
        """Emit the next token."""
        masked = self._script.masked(self._num_tokens)
        token_id = next(token_id for token_id in self._tokens if token_id not in masked)
        self._num_tokens += 1
        text, finish, stop_reason = self._absorb(token_id)
        self.is_finished = finish is not None
        return Delta(
            index=self._index,
            text=text,
            token_ids=(token_id,),
            logprobs=self._logprobs(token_id),
            provenance=(Piece(text, "target"),) if self._script.tells_provenance else None,
            finish_reason=finish,
            stop_reason=stop_reason,
            usage=Usage(len(self._script.prompt), self._num_tokens) if finish else None,
        )

    def _absorb(self, token_id: int) -> tuple[str, FinishReason | None, str | int | None]:
        sampling = self._script.sampling
        if token_id in self._script.stop_ids:  # it has no text
            return self._text.finish(), "stop", token_id if token_id in sampling.stop_token_ids else None
        update = self._text.push([token_id])
        if update.stop is not None:
            return update.text, "stop", update.stop
        if self._num_tokens == sampling.max_tokens:
            return update.text + self._text.finish(), "length", None
        return update.text, None, None

    def _logprobs(self, token_id: int) -> tuple[TokenLogprob, ...] | None:
        """The emitted token is certain; the alternatives, impossible, are the ids that follow it."""
        num_top = self._script.sampling.logprobs
        if num_top is None:
            return None
        ids = [(token_id + i) % len(self._tokenizer) for i in range(min(num_top, len(self._tokenizer)))]
        top = tuple(self._candidate(i, 0.0 if i == token_id else IMPOSSIBLE_LOGPROB) for i in ids)
        own = self._candidate(token_id, 0.0)
        return (TokenLogprob(own.token, own.logprob, own.token_id, own.token_bytes, top),)

    def _candidate(self, token_id: int, logprob: float) -> TopLogprob:
        token_bytes = self._tokenizer.token_bytes(token_id)
        return TopLogprob(self._tokenizer.token_text(token_id), logprob, token_id, token_bytes)


def _limits(config: EchoEngineConfig, vocab_size: int) -> Limits:
    # No KV cache: as many blocks of one token as the context window has never refuse what the window takes.
    return Limits(
        max_model_len=config.max_model_len,
        vocab_size=vocab_size,
        num_blocks=config.max_model_len,
        block_size=1,
        max_num_seqs=config.max_num_seqs,
    )


def _card(config: EchoEngineConfig, limits: Limits) -> ModelCard:
    return ModelCard(
        model=config.model,
        prompt_kinds=frozenset({"tokens"}),
        fingerprint=hashlib.sha256(repr((config.model_dump(mode="json"), limits.vocab_size)).encode()).hexdigest(),
        max_model_len=limits.max_model_len,
        vocab_size=limits.vocab_size,
        max_num_choices=limits.max_num_seqs,
    )
