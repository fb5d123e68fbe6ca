"""What a request must satisfy before it may queue. Pure checks; the numbers are in the messages."""

from __future__ import annotations

from dataclasses import dataclass

from engines.errors import ContextLengthError, InvalidRequestError, KVCapacityError, UnsupportedParameterError
from engines.types import GenerateRequest, TokenPrompt

# Bounded, since a priority is worth waiting time: at most so many levels can be put before an ordinary request.
MAX_PRIORITY = 1000


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine can hold: tokens, blocks, sequences. `drafters` are those that it has."""

    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    drafters: frozenset[str] = frozenset()


def check_request(request: GenerateRequest, limits: Limits) -> tuple[int, ...]:
    """The prompt's token ids, if the request can be served.

    Raises InvalidRequestError (or its subclasses ContextLengthError, KVCapacityError, UnsupportedParameterError),
    naming the parameter.
    """
    if not isinstance(request.prompt, TokenPrompt):
        raise UnsupportedParameterError(f"This engine takes token ids, not a {request.prompt.kind} prompt.", "prompt")
    token_ids = request.prompt.token_ids
    if not token_ids:
        raise InvalidRequestError("The prompt is empty; at least one token is needed.", "prompt")
    if not 1 <= request.n <= limits.max_num_seqs:
        raise InvalidRequestError(f"n is {request.n}; it must be between 1 and {limits.max_num_seqs}.", "n")
    if abs(request.priority) > MAX_PRIORITY:
        raise InvalidRequestError(f"priority must be between -{MAX_PRIORITY} and {MAX_PRIORITY}.", "priority")
    sampling = request.sampling
    _check_vocabulary("prompt", token_ids, limits.vocab_size)
    _check_vocabulary("logit_bias", sampling.logit_bias, limits.vocab_size)
    _check_vocabulary("stop_token_ids", sampling.stop_token_ids, limits.vocab_size)
    _check_speculation(request, limits)
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequestError(
            f"min_tokens ({sampling.min_tokens}) is above max_tokens ({sampling.max_tokens}).", "min_tokens"
        )
    if any(not stop for stop in sampling.stop):
        raise InvalidRequestError("A stop string is empty.", "stop")
    num_tokens = len(token_ids) + sampling.max_tokens
    if num_tokens > limits.max_model_len:
        raise ContextLengthError(len(token_ids), sampling.max_tokens, limits.max_model_len)
    needed = -(-num_tokens // limits.block_size)
    if needed > limits.num_blocks:
        raise KVCapacityError(needed, limits.num_blocks, limits.block_size)
    return token_ids


def _check_speculation(request: GenerateRequest, limits: Limits) -> None:
    drafter = request.speculation.drafter
    if drafter not in {"auto", "none"} | limits.drafters:
        known = ", ".join(sorted(limits.drafters)) or "none"
        raise UnsupportedParameterError(
            f"This model has no drafter {drafter!r}; it has: {known}.", "speculation.drafter"
        )
    if request.prediction is None:
        if drafter == "prediction":
            raise InvalidRequestError("The drafter 'prediction' needs a prediction.", "prediction")
        return
    if not isinstance(request.prediction, TokenPrompt):
        raise UnsupportedParameterError("This engine takes token ids as a prediction, not text.", "prediction")
    if "prediction" not in limits.drafters:
        raise UnsupportedParameterError("This model's configuration makes no use of predictions.", "prediction")
    _check_vocabulary("prediction", request.prediction.token_ids, limits.vocab_size)


def _check_vocabulary(param: str, token_ids: tuple[int, ...] | dict[int, float], vocab_size: int) -> None:
    # The extremes alone: prompts are long, and this runs between two steps as well.
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{param} has token id {token_id}; the vocabulary has ids 0 to {vocab_size - 1}.", param
            )
