"""The engines' error tree.

    EngineError
    |-- InvalidRequestError          the request can never be served as written; names the parameter
    |   |-- ContextLengthError       prompt plus completion exceed the context window
    |   `-- KVCapacityError          the sequence can never fit the KV cache
    |-- UnsupportedParameterError    this engine cannot honour a parameter that others can (an InvalidRequestError)
    |-- EngineOverloadedError        the bounded queue is full; carries a retry hint
    |-- EngineDeadError              the engine or its peer is gone; the request may be retried elsewhere
    |-- EngineTimeoutError           a peer did not answer in time
    |-- RemoteServerError            a peer answered with an error of its own
    |-- EvaluationError              an evaluation set or its scorer cannot be used
    `-- ModelLoadError               the engine cannot start with this model
        |-- UnsupportedModelError    the architecture fails the parity probe or is known not to work
        |-- MemoryBudgetError        weights or the smallest useful KV cache do not fit the budget
        `-- VocabularyMismatchError  the draft model does not mean by its token ids what the target means

Every error survives pickling with its fields, since it may cross a process border.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of all engine errors. `message` is fit to be shown to the caller."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[object, ...]:
        # Exception's own __reduce__ replays self.args, which loses the fields of subclasses.
        return _rebuild, (type(self), self.message, dict(self.__dict__))


def _rebuild(cls: type[EngineError], message: str, fields: dict[str, object]) -> EngineError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(fields)
    return error


class InvalidRequestError(EngineError):
    """The request can never be served as written. `param` names the offending parameter, where one does."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """Prompt plus completion exceed the context window (all counts in tokens)."""

    def __init__(self, prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the prompt, {max_tokens} in the completion). "
            "Please reduce the length of the prompt or of the completion.",
            param="messages",
        )
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.max_model_len = max_model_len


class KVCapacityError(InvalidRequestError):
    """The sequence needs more KV blocks than the whole cache has, even with nobody else in it."""

    def __init__(self, needed_blocks: int, total_blocks: int, block_size: int) -> None:
        super().__init__(
            f"The request can need up to {needed_blocks} KV blocks of {block_size} tokens, "
            f"but the whole cache has {total_blocks}. Lower max_tokens, n or the length of the prompt.",
            param="max_tokens",
        )
        self.needed_blocks = needed_blocks
        self.total_blocks = total_blocks
        self.block_size = block_size


class UnsupportedParameterError(InvalidRequestError):
    """This engine cannot honour `param`, though other engines can."""


class EngineOverloadedError(EngineError):
    """The engine's bounded queue is full. `retry_after_s` is a hint in seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDeadError(EngineError):
    """The engine has stopped, crashed, or cannot be reached."""


class EngineTimeoutError(EngineError):
    """A peer did not answer within its time limit."""


class RemoteServerError(EngineError):
    """A peer answered with an error: its HTTP `status` and its message."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class EvaluationError(EngineError):
    """An evaluation set or its scorer cannot be used; the message names the line."""


class ModelLoadError(EngineError):
    """The engine cannot start with this model; the message is one readable line."""


class UnsupportedModelError(ModelLoadError):
    """The architecture is refused: its paged output differs from its own eager output, or it cannot be paged."""


class VocabularyMismatchError(ModelLoadError):
    """The draft model does not mean by its token ids what the target means."""


class MemoryBudgetError(ModelLoadError):
    """Weights or the smallest useful KV cache do not fit the memory budget."""
