"""Requests as the router sees them."""

import pytest

from gateway.auto.prompt import most_tokens, router_prompt, turns_of, usual_tokens
from gateway.errors import BadRequestError
from gateway.openai import ChatCompletionRequest, CompletionRequest
from router_models.prompt import Prompt, Turn


def _chat(*messages: tuple[str, object], **fields: object) -> ChatCompletionRequest:
    told = tuple({"role": role, "content": content} for role, content in messages)
    return ChatCompletionRequest.model_validate({"model": "auto", "messages": told} | fields)


def test_the_whole_conversation_is_the_request() -> None:
    parts = ({"type": "text", "text": "a"}, {"type": "text", "text": "b"})
    request = _chat(("developer", "be brief"), ("user", parts), ("assistant", "c"), ("user", "d"), max_tokens=7)
    prompt = router_prompt(request)
    assert prompt.turns == (
        Turn("developer", "be brief"), Turn("user", "a\nb"), Turn("assistant", "c"), Turn("user", "d")
    )  # fmt: skip
    assert prompt.max_tokens == 7


def test_raw_prompts_are_the_users() -> None:
    request = CompletionRequest.model_validate({"model": "auto", "prompt": ("a", "b")})
    assert turns_of(request) == (Turn("user", "a"), Turn("user", "b"))


@pytest.mark.parametrize("prompt", [(1, 2), ((1,), (2,))])
def test_token_ids_are_refused_by_name(prompt: object) -> None:
    request = CompletionRequest.model_validate({"model": "auto", "prompt": prompt})
    with pytest.raises(BadRequestError) as refused:
        router_prompt(request)
    assert refused.value.param == "prompt"


def test_no_tokenizer_makes_more_tokens_than_bytes() -> None:
    prompt = Prompt.from_text("größer" * 100)
    assert most_tokens(prompt) >= 800
    assert 100 < usual_tokens(prompt) < 800
