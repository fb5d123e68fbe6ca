"""Conversations about the standard library, built from its documented names."""

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from demo.definitions import Definition
from demo.small_talk import SMALL_TALK, SYSTEM_PROMPTS

Message = dict[str, str]

DOES_WHAT = (
    "What does {name} do?",
    "what does {name} do",
    "What does the {kind} {name} do?",
    "What is {name}?",
    "what is {name} for?",
    "What is {name} used for?",
    "Tell me what {name} does.",
    "In one sentence, what does {name} do?",
    "What is the purpose of {name}?",
    "Can you tell me what `{name}` does?",
    "What does `{name}` do in Python?",
    "Summarize {name}.",
    "Describe {name} briefly.",
)
EXPLAIN = (
    "Explain {name}.",
    "Explain {name}",
    "explain the {kind} {name}",
    "Please explain `{name}`.",
    "Can you explain {name} to me?",
    "How does {name} work?",
    "How do I use {name}?",
    "Describe {name} in detail.",
    "Give me the documentation of {name}.",
    "Show the docs for {name}.",
)
SIGNATURE = (
    "What is the signature of {name}?",
    "signature of {name}",
    "Show me the signature of {name}.",
    "Which arguments does {name} take?",
    "What are the parameters of {name}?",
    "How do I call {name}?",
)
SOURCE = (
    "Show the source of {name}.",
    "Show me the source code of {name}.",
    "source of {name}",
    "How is {name} implemented?",
    "Print the code of {name}.",
)
THEN_SIGNATURE = ("What is its signature?", "And its signature?", "Which arguments does it take?", "How do I call it?")
THEN_SOURCE = ("Show me the source.", "How is it implemented?", "And the code?", "Show its source code, please.")
THEN_MORE = ("Explain it in detail.", "Tell me more.", "Can you say more about it?")
THANKS = (("Thanks!", "You are welcome."), ("thank you", "You are welcome."), ("Great, thanks.", "Happy to help."))
TOPIC = (
    "Explain {name} in Python.",
    "Tell me about {name} in Python.",
    "What does the language reference say on {name}?",
)

LONGEST_SUMMARY_CHARS = 400
LONGEST_EXPLANATION_CHARS = 900


@dataclass(frozen=True, slots=True)
class Chat:
    """One conversation and the top-level module it is about (the unit of the held-out split)."""

    package: str
    messages: tuple[Message, ...]


def paragraphs(doc: str, max_chars: int) -> str:
    """Leading whole paragraphs of a docstring up to `max_chars`; the first is cut at a sentence if it is longer."""
    parts = [part.rstrip() for part in re.split(r"\n\s*\n", doc.strip())]
    chosen = parts[0]
    if len(chosen) > max_chars:
        sentence_end = chosen.rfind(". ", 0, max_chars)
        return chosen[: sentence_end + 1] if sentence_end > 0 else chosen[:max_chars].rsplit(None, 1)[0] + " ..."
    for part in parts[1:]:
        if len(chosen) + len(part) > max_chars:
            break
        chosen += "\n\n" + part
    return chosen


def summary(definition: Definition) -> str:
    """First paragraph of the documentation, on one line."""
    return " ".join(paragraphs(definition.doc.strip().split("\n\n")[0], LONGEST_SUMMARY_CHARS).split())


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _turn(question: str, answer: str) -> tuple[Message, Message]:
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


class ChatWriter:
    """Turns definitions into conversations; every choice of words comes from the seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def about(self, definition: Definition) -> Iterator[Chat]:
        """One to four conversations about a name."""
        rng = self._random
        short = summary(definition)
        long = paragraphs(definition.doc, LONGEST_EXPLANATION_CHARS)
        call = _code(definition.name + definition.signature) if definition.signature else None
        source = _code(definition.source) if definition.source else None

        first: tuple[Message, ...] = _turn(self._ask(DOES_WHAT, definition), short)
        follow_ups: list[tuple[tuple[str, ...], str]] = [(THEN_MORE, long)] if len(long) > len(short) + 80 else []
        follow_ups += [(THEN_SIGNATURE, call)] if call else []
        follow_ups += [(THEN_SOURCE, source)] if source else []
        if follow_ups and rng.random() < 0.4:
            questions, answer = rng.choice(follow_ups)
            first += _turn(rng.choice(questions), answer)
        if rng.random() < 0.05:
            first += _turn(*rng.choice(THANKS))
        yield self._chat(definition.package, first)
        if rng.random() < 0.6:
            yield self._chat(definition.package, _turn(self._ask(EXPLAIN, definition), long))
        if call and rng.random() < 0.4:
            yield self._chat(definition.package, _turn(self._ask(SIGNATURE, definition), call))
        if source and rng.random() < 0.5:
            yield self._chat(definition.package, _turn(self._ask(SOURCE, definition), source))

    def about_topics(self, topics: Mapping[str, str]) -> Iterator[Chat]:
        """One conversation about each topic of the language reference."""
        for name, text in sorted(topics.items()):
            body = text.partition("\n\n")[2] or text
            question = self._random.choice(TOPIC).format(name=name.replace("-", " "))
            yield self._chat(f"topic-{name}", _turn(question, paragraphs(body, LONGEST_EXPLANATION_CHARS)))

    def small_talk(self, repeats: int) -> Iterator[Chat]:
        """Greetings and questions about the model itself, each wording `repeats` times."""
        for _ in range(repeats):
            for questions, answers in SMALL_TALK:
                for question in questions:
                    yield self._chat("small-talk", _turn(question, self._random.choice(answers)))

    def _ask(self, phrasings: tuple[str, ...], definition: Definition) -> str:
        return self._random.choice(phrasings).format(name=definition.name, kind=definition.kind)

    def _chat(self, package: str, turns: tuple[Message, ...]) -> Chat:
        if self._random.random() < 0.25:
            turns = ({"role": "system", "content": self._random.choice(SYSTEM_PROMPTS)}, *turns)
        return Chat(package, turns)


def write_chats(definitions: Iterable[Definition], topics: Mapping[str, str], seed: int) -> list[Chat]:
    """All conversations about the names and topics, with small talk, in a seeded order."""
    writer = ChatWriter(seed)
    chats = [chat for definition in definitions for chat in writer.about(definition)]
    chats += writer.about_topics(topics)
    chats += writer.small_talk(repeats=max(1, len(chats) // 2000))
    random.Random(seed).shuffle(chats)
    return chats
