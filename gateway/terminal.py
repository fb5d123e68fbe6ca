"""`outrider chat` on the terminal: read, show, colour what was drafted."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from gateway.chat import Chat
from gateway.chat_answer import Answer, ChatError, Span

# By drafter; what the target found itself has the terminal's own colour.
_STYLES = {"prediction": "magenta", "ngram": "cyan", "suffix": "yellow", "model": "green"}
_OTHER_STYLE = "blue"  # a drafter of a gateway newer than this command


class Terminal:
    """One conversation on one console."""

    def __init__(self, chat: Chat, console: Console) -> None:
        self._chat = chat
        self._console = console
        self._has_legend = False

    def run(self, system: str | None = None) -> None:
        """Read questions and print answers until the end of input."""
        if system is not None:
            self._chat.messages.append({"role": "system", "content": system})
        self._console.print(f"Talking to {self._chat.model}. Ctrl-C stops an answer, Ctrl-D ends.", style="dim")
        while True:
            try:
                question = self._console.input("[bold cyan]> [/]").strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            if question:
                self._turn(question)

    def _turn(self, question: str) -> None:
        answer, was_asking = Answer(), self._chat.asks_provenance
        sources: set[str] = set()
        try:
            for span in self._chat.ask(question, answer):
                self._show(span)
                sources |= {span.source} if span.source is not None else set()
        except ChatError as error:
            self._console.print(error.message, style="red", markup=False)
            return
        self._console.print(f"\n({answer.summary()})", style="dim", markup=False)
        if was_asking and not self._chat.asks_provenance:
            self._console.print("(This server does not tell which tokens were drafted.)", style="dim")
        if sources - {"target"} and not self._has_legend:
            self._has_legend = True
            self._console.print(_legend(sources - {"target"}))

    def _show(self, span: Span) -> None:
        style = _style(span.source) if span.is_drafted else None
        self._console.print(span.text, end="", markup=False, highlight=False, style=style)


def _legend(sources: set[str]) -> Text:
    """All drafters there are, since later answers may show others than the first."""
    names = [*_STYLES, *sorted(sources - set(_STYLES))]
    parts = [part for name in names for part in (" ", (name, _style(name)))]
    return Text.assemble("(drafted by:", *parts, ")", style="dim")


def _style(source: str | None) -> str:
    return _STYLES.get(source or "", _OTHER_STYLE)
