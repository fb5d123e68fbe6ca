"""Conversations are found by what was said."""

from gateway.auto.conversations import Conversation, Conversations, turn_keys
from router_models.prompt import Prompt, Turn


def _said(*texts: str, system: str = "") -> Prompt:
    """User and assistant in turns."""
    roles = ("user", "assistant")
    turns = [Turn(roles[i % 2], text) for i, text in enumerate(texts)]  # type: ignore[arg-type]
    return Prompt((*([Turn("system", system)] if system else []), *turns))


def _store(max_conversations: int = 10, ttl_s: float = 100.0) -> tuple[Conversations, list[float]]:
    now = [0.0]
    return Conversations(max_conversations, ttl_s, lambda: now[0]), now


def test_the_next_turn_finds_the_last_one() -> None:
    store, _ = _store()
    first = turn_keys("t", _said("hi"))
    assert store.find(first) is None
    store.keep(first[-1], Conversation("small"))
    second = turn_keys("t", _said("hi", "hello", "and now?"))
    assert store.find(second) == Conversation("small")
    store.keep(second[-1], Conversation("large", turns_below=1))
    third = turn_keys("t", _said("hi", "hello", "and now?", "yes", "more"))
    assert store.find(third) == Conversation("large", 1)


def test_a_request_that_is_sent_again_does_not_find_itself() -> None:
    store, _ = _store()
    keys = turn_keys("t", _said("hi"))
    store.keep(keys[-1], Conversation("small"))
    assert store.find(keys) is None


def test_others_are_not_found() -> None:
    store, _ = _store()
    store.keep(turn_keys("t", _said("hi"))[-1], Conversation("small"))
    for tenant, prompt in (
        ("other", _said("hi", "a", "b")),
        ("t", _said("ho", "a", "b")),
        ("t", _said("hi", "a", "b", system="be brief")),
    ):
        assert store.find(turn_keys(tenant, prompt)) is None


def test_digests_tell_where_a_message_ends() -> None:
    assert turn_keys("t", _said("ab", "c", "d")) != turn_keys("t", _said("a", "bc", "d"))
    assert len(turn_keys("t", _said("a", "b", "c"))) == 2


def test_warm_tokens_are_noted_for_turns_that_are_known() -> None:
    store, _ = _store()
    keys = turn_keys("t", _said("hi"))
    store.warmed(keys[-1], 50)
    store.keep(keys[-1], Conversation("small"))
    store.warmed(keys[-1], 70)
    assert store.find([*keys, b"next"]) == Conversation("small", 0, 70)


def test_the_oldest_and_the_cold_are_forgotten() -> None:
    store, now = _store(max_conversations=2, ttl_s=10.0)
    for key in (b"a", b"b", b"c"):
        store.keep(key, Conversation("small"))
    assert store.find([b"a", b""]) is None
    assert store.find([b"b", b""]) is not None
    now[0] = 10.5
    assert store.find([b"b", b""]) is None
