"""OpenAI's wire format, outwards: a request as a body.

Where the format is silent or servers differ:

- Parameters are sent only where they differ from our default, so that a server that knows few accepts what it can. A
  server with defaults of its own (vLLM takes them from a model's generation_config) applies those instead.
- Drafting is the server's own affair: it cannot be told which drafter to use or how far, nor does it tell which tokens
  were drafted, so a request that asks for any of that is refused. A prediction is OpenAI's field of chats alone.
- top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids, priority and cache_salt are not OpenAI's;
  they go out as vLLM names them, and a server that does not know one says so.
"""

from __future__ import annotations

from typing import assert_never

from engines.errors import UnsupportedParameterError
from engines.types import ChatPrompt, GenerateRequest, SamplingParams, SpeculationParams, TextPrompt, TokenPrompt

_SAME_NAMED = frozenset(
    {
        *("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop"),
        *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids"),
    }
)


def request_body(request: GenerateRequest, model: str, accepts_token_ids: bool) -> tuple[str, dict[str, object]]:
    """Path below the base URL, and body. Raises UnsupportedParameterError for what the server cannot be asked."""
    path, prompt = _prompt(request, accepts_token_ids)
    _check_speculation(request.speculation)
    body: dict[str, object] = {"model": model, **prompt, "stream": True, "stream_options": {"include_usage": True}}
    body |= _sampling(request.sampling, is_chat=isinstance(request.prompt, ChatPrompt)) | _prediction(request)
    optional = {"n": (request.n, 1), "priority": (request.priority, 0)}
    body |= {name: value for name, (value, default) in optional.items() if value != default}
    if request.cache_salt:
        body["cache_salt"] = request.cache_salt
    if request.user is not None:
        body["user"] = request.user
    if request.session is not None:
        body["prompt_cache_key"] = request.session
    return path, body


def _prompt(request: GenerateRequest, accepts_token_ids: bool) -> tuple[str, dict[str, object]]:
    match request.prompt:
        case ChatPrompt(messages=messages):
            return "chat/completions", {
                "messages": [
                    {"role": message.role, "content": message.content}
                    | ({} if message.name is None else {"name": message.name})
                    for message in messages
                ]
            }
        case TextPrompt(text=text):
            return "completions", {"prompt": text}
        case TokenPrompt(token_ids=token_ids):
            if not accepts_token_ids:
                raise UnsupportedParameterError("This remote server takes text, not token ids.", "prompt")
            return "completions", {"prompt": list(token_ids)}
        case _:
            assert_never(request.prompt)


def _check_speculation(speculation: SpeculationParams) -> None:
    plain = SpeculationParams()
    for name in SpeculationParams.model_fields:
        if getattr(speculation, name) != getattr(plain, name):
            param = f"speculation.{name}"
            raise UnsupportedParameterError(f"A remote server drafts as it likes: {param} cannot be set.", param)


def _prediction(request: GenerateRequest) -> dict[str, object]:
    match request.prediction:
        case None:
            return {}
        case TextPrompt(text=text) if isinstance(request.prompt, ChatPrompt):
            return {"prediction": {"type": "content", "content": text}}
        case _:
            raise UnsupportedParameterError("A remote server takes a prediction as text, of a chat.", "prediction")


def _sampling(sampling: SamplingParams, is_chat: bool) -> dict[str, object]:
    body: dict[str, object] = {"max_tokens": sampling.max_tokens}
    # JSON mode makes lists of the tuples.
    body |= sampling.model_dump(mode="json", include=set(_SAME_NAMED), exclude_defaults=True)
    if sampling.logit_bias:
        body["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
    if sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": sampling.logprobs} if is_chat else {"logprobs": sampling.logprobs}
    return body
