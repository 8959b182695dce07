"""What a task makes: a context, and questions with what a right answer says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
        question: text after the context, or after the last turn's answer.
        answers: what is expected: the whole answer if ``exact``, else strings that it contains.
        max_tokens: longest answer.
        stop: an answer ends before this text; empty: only at the end-of-text token.
        prefix: beginning of the answer that is given; with a chat template, the assistant's words.
    """

    question: str
    answers: tuple[str, ...]
    max_tokens: int
    exact: bool = False
    stop: str = ""
    prefix: str = ""

    def grade(self, output: str) -> float:
        """Share of what was expected that ``output`` says, 0 to 1; 0 or 1 if ``exact``."""
        if self.stop:
            output = output.split(self.stop)[0]
        if self.exact:
            return float(output.strip() == self.answers[0].strip())
        return sum(answer in output for answer in self.answers) / len(self.answers)


@dataclass(frozen=True)
class Query:
    """Turns answered one after the other on one context."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Example:
    """A context and the queries asked about it, each on its own."""

    context: str
    queries: tuple[Query, ...]


@dataclass(frozen=True)
class TextExample:
    """Ordinary text as token ids; each span (start, stop) is predicted from all before it."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
