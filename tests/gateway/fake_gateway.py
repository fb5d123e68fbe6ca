"""What `outrider chat` is tested against: a gateway of scripted answers, and the chunks to script them with."""

import json

import httpx

from gateway.chat import Chat


def sse(*payloads: object, done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(payload)}\n\n" for payload in payloads] + ["data: [DONE]\n\n"] * done
    return "".join(lines).encode()


def text(words: str) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": words}}], "usage": None}


def told(*pieces: tuple[str, str]) -> dict[str, object]:
    """A chunk that tells who found which token."""
    provenance = [{"text": text, "source": source} for text, source in pieces]
    choice = {"index": 0, "delta": {"content": "".join(text for text, _ in pieces)}, "provenance": provenance}
    return {"choices": [choice], "usage": None}


def usage(num_accepted: int | None) -> dict[str, object]:
    details = {"accepted_prediction_tokens": num_accepted, "rejected_prediction_tokens": 1}
    return {"choices": [], "usage": {"completion_tokens": 8, "completion_tokens_details": details}}


USAGE = {"choices": [], "usage": {"completion_tokens": 7}}
REFUSAL = {"error": {"message": "Unrecognized request argument: `speculation`.", "param": "speculation"}}


class Gateway:
    """Lists one model and answers with these bodies, one after another; remembers what it was asked."""

    def __init__(self, *bodies: bytes | httpx.Response) -> None:
        self.bodies = list(bodies)
        self.asked: list[dict[str, object]] = []
        self.paths: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "first"}, {"id": "second"}]})
        self.asked.append(json.loads(request.content))
        body = self.bodies.pop(0)
        return body if isinstance(body, httpx.Response) else httpx.Response(200, content=body)

    def chat(self, url: str = "http://gateway", **options: object) -> Chat:
        return Chat(url, transport=httpx.MockTransport(self), **options)
