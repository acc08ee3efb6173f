"""Conversations through a tokenizer's chat template, with a mask of what the assistant said."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mapconv.data.rows import UnusableRowError
from mapconv.errors import DataError

#: A template that takes longer for one conversation is broken, or a stranger's joke: real ones take milliseconds.
LONGEST_RENDERING = 10.0
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A tokenizer's chat template.

    A template with ``{% generation %}`` says itself which tokens are the assistant's. For any other, a turn is what the
    template adds to the conversation before it, opened by its own prompt for a generation: that prompt is not the
    assistant's, and all behind it is, the mark that ends the turn included.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Raises DataError where the tokenizer has no template, or is not one of the fast ones."""
        self._tokenizer = tokenizer
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(f"the tokenizer of {tokenizer.name_or_path} has no chat template ({error}).") from None
        if not tokenizer.is_fast:
            raise DataError(f"the tokenizer of {tokenizer.name_or_path} has no tokenizer.json, which chats need.")
        self._marks_generation = bool(_GENERATION.search(template))

    def tokens(self, chat: dict[str, Any]) -> list[int]:
        """The whole conversation.

        Raises:
            UnusableRowError: the template refuses it.
        """
        text = self._render(chat)
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def tokens_and_mask(self, chat: dict[str, Any]) -> tuple[list[int], list[bool]]:
        """The whole conversation, and which tokens the assistant said.

        Raises:
            UnusableRowError: the template refuses it, or rewrites earlier turns when later ones follow.
        """
        if self._marks_generation:
            encoded = self._apply(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
        text = self._render(chat)
        spans = self._assistant_spans(chat, text)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        # A token that begins inside a turn is of that turn; one character cannot be two tokens' beginning.
        mask = [
            any(start <= begin < stop for start, stop in spans) and begin < end
            for begin, end in encoded["offset_mapping"]
        ]
        return encoded["input_ids"], mask

    def _assistant_spans(self, chat: dict[str, Any], text: str) -> list[tuple[int, int]]:
        """Ranges of characters of ``text`` that the assistant's turns take."""
        spans, messages = [], chat["conversation"]
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            until = self._render(chat | {"conversation": messages[: turn + 1]})
            before = self._opening(chat, messages[:turn], until)
            if not (text.startswith(until) and until.startswith(before)):
                raise UnusableRowError(
                    "the chat template rewrites earlier turns when later ones follow, and has no {% generation %} "
                    "block that identifies the assistant's tokens"
                )
            spans.append((len(before), len(until)))
        return spans

    def _opening(self, chat: dict[str, Any], earlier: list[Any], until: str) -> str:
        """The text up to where the assistant begins to speak; ``until`` is the text up to where it ends."""
        if earlier:
            return self._render(chat | {"conversation": earlier}, add_generation_prompt=True)
        # Templates do not render an empty conversation alike, so the prompt is looked up in a conversation of one turn.
        user = chat | {"conversation": [{"role": "user", "content": "?"}]}
        prompt = self._render(user, add_generation_prompt=True).removeprefix(self._render(user))
        return until[: until.find(prompt) + len(prompt)] if prompt in until else ""

    def _render(self, chat: dict[str, Any], **settings: Any) -> str:
        return self._apply(chat, tokenize=False, **settings)

    def _apply(self, chat: dict[str, Any], **settings: Any) -> Any:
        try:
            with _time_limit(f"the chat template of {self._tokenizer.name_or_path}", LONGEST_RENDERING):
                return self._tokenizer.apply_chat_template(**chat, **settings)
        except _TooLongError as reason:
            raise DataError(str(reason)) from None
        except Exception as error:  # a template is a program, and raises what it likes
            line = (str(error).strip().splitlines() or [""])[0][:200]
            raise UnusableRowError(f"the chat template refuses it ({type(error).__name__}: {line})") from None


class _TooLongError(BaseException):
    """No Exception, which the libraries in between may take for one of their own."""


@contextmanager
def _time_limit(what: str, seconds: float) -> Iterator[None]:
    """End a block that runs for too long; only the main thread, in which commands read data, can be interrupted."""

    def stop(number: int, frame: object) -> None:
        raise _TooLongError(
            f"{what} takes more than {seconds:g} seconds for one conversation: give a model with another template."
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
