from demo.chats import Chat, ChatWriter, paragraphs, summary, write_chats
from demo.definitions import Definition

DEFINITION = Definition(
    name="alpha.count",
    kind="function",
    package="alpha",
    doc="Return how many\nitems there are.\n\n" + "A longer explanation. " * 10,
    signature="(items)",
    source="def count(items):\n    return len(items)",
)


def answers(chats: list[Chat]) -> set[str]:
    return {message["content"] for chat in chats for message in chat.messages if message["role"] == "assistant"}


def test_chats_are_seeded() -> None:
    assert write_chats([DEFINITION], {}, seed=1) == write_chats([DEFINITION], {}, seed=1)


def test_answers_are_documentation_signature_or_source() -> None:
    writer = ChatWriter(seed=0)
    chats = [chat for _ in range(50) for chat in writer.about(DEFINITION)]
    assert answers(chats) >= {
        "Return how many items there are.",
        "```python\nalpha.count(items)\n```",
        "```python\ndef count(items):\n    return len(items)\n```",
    }
    assert {chat.package for chat in chats} == {"alpha"}


def test_turns_alternate_and_end_with_the_assistant() -> None:
    writer = ChatWriter(seed=0)
    for _ in range(50):
        for chat in writer.about(DEFINITION):
            roles = [message["role"] for message in chat.messages if message["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_topics_and_small_talk_have_their_own_packages() -> None:
    chats = write_chats([], {"while": "The while statement\n\nRepeats."}, seed=0)
    assert {chat.package for chat in chats} == {"topic-while", "small-talk"}
    assert "Repeats." in answers(chats)


def test_a_summary_is_one_line() -> None:
    assert summary(DEFINITION) == "Return how many items there are."


def test_paragraphs_stay_whole_until_one_alone_is_too_long() -> None:
    assert paragraphs("One.\n\nTwo.\n\nThree.", max_chars=9) == "One.\n\nTwo."
    assert paragraphs("First. " + "word " * 50, max_chars=40) == "First."
