"""Texts as a model wants them: with its chat template, or bare."""

from __future__ import annotations

from typing import Any

from sgl_psa.evaluate.example import Example, Turn

_CONTEXT, _QUESTION = "<<context>>", "<<question>>"


class Prompt:
    """Splits a chat template around the context and the question, so that they stay apart."""

    def __init__(self, tokenizer: Any, chat: bool) -> None:
        """
        Args:
            chat: wrap context and question as one user message; the tokenizer has a template.

        Raises:
            ValueError: the template does not keep a message as it is.
        """
        self.chat = chat
        self._tokenizer = tokenizer
        self._before = self._after = ""
        if not chat:
            return
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": _CONTEXT + _QUESTION}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        if rendered.count(_CONTEXT + _QUESTION) != 1:
            raise ValueError("the chat template changes messages: use --no-chat")
        self._before, self._after = rendered.split(_CONTEXT + _QUESTION)

    def context(self, example: Example) -> str:
        """What is prefilled; special tokens come from the template, or are to be added."""
        return self._before + example.context

    def turn(self, turn: Turn, first: bool = True) -> str:
        """What is fed before an answer.

        Raises:
            ValueError: a later turn in a chat: only the first message has been rendered.
        """
        if self.chat and not first:
            raise ValueError("a chat prompt holds one turn: use --no-chat")
        prefix = turn.prefix.lstrip() if self.chat else turn.prefix
        return ("" if first else "\n") + turn.question + self._after + prefix

    def context_ids(self, example: Example) -> list[int]:
        """Token ids of the context, special tokens included."""
        text = self.context(example)
        return self._tokenizer(text, add_special_tokens=not self.chat, verbose=False).input_ids

    def turn_ids(self, turn: Turn, first: bool = True) -> list[int]:
        """Token ids of a turn, which come after those of the context."""
        return self.encode(self.turn(turn, first))

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return self._tokenizer.decode(ids)
