"""A request as the router sees it, and how long it is."""

from __future__ import annotations

from gateway.errors import BadRequestError
from gateway.openai import ChatCompletionRequest, CompletionRequest
from router_models.prompt import Prompt, Turn

GenerationRequest = ChatCompletionRequest | CompletionRequest

# What templates put around a conversation and around each message, generously: role names, dates, a default system
# message.
_TEMPLATE_TOKENS = 256
_MESSAGE_TOKENS = 16
_BYTES_PER_TOKEN = 4


def turns_of(request: GenerationRequest) -> tuple[Turn, ...] | None:
    """The conversation; every raw prompt is a user's turn. None for prompts that are token ids."""
    if isinstance(request, ChatCompletionRequest):
        return tuple(Turn(message.role, message.text) for message in request.messages)
    texts = [prompt for prompt in request.prompts() if isinstance(prompt, str)]
    return tuple(Turn("user", text) for text in texts) or None


def router_prompt(request: GenerationRequest) -> Prompt:
    """What the router decides about. Raises BadRequestError for token ids: they belong to one model's tokenizer."""
    turns = turns_of(request)
    if turns is None:
        raise BadRequestError("`prompt` must be text for an automatic choice of the model.", param="prompt")
    return Prompt(turns, request.wanted_tokens())


def most_tokens(prompt: Prompt) -> int:
    """More than any tokenizer makes of it: none has more tokens than bytes."""
    num_bytes = sum(len(turn.text.encode(errors="replace")) for turn in prompt.turns)
    return num_bytes + _MESSAGE_TOKENS * len(prompt.turns) + _TEMPLATE_TOKENS


def usual_tokens(prompt: Prompt) -> int:
    """About as many tokens as it will have: what its cost is expected to be."""
    return 1 + sum(len(turn.text) for turn in prompt.turns) // _BYTES_PER_TOKEN
