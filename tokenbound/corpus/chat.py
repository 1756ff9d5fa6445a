"""Chat templates: a conversation to one text, and where in it the assistant's words are.

An answer is found by writing the conversation twice, once with a mark in place of the message. What stands before and
behind the mark is the template's, so nothing else than the message itself can be scored as an answer, whatever the
template does and whatever the messages spell. Special tokens that end the turn belong to the answer where the template
writes them directly behind the message: the model must predict them to stop. They end the turn, and do not begin the
next one, if they are there where the conversation ends with the message, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from tokenbound.corpus.answers import Answered, Conversation
from tokenbound.corpus.tokenizers import find_file, read_json
from tokenbound.errors import InputError

MARK = "\U0010fffdanswer\U0010fffd"
"""Stands in place of a message; no text holds it."""

DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%A": "Friday"}
"""For templates that write a date: the one that Llama's fall back to, so that a text is the same every day."""

NOW = "".join(
    [
        "{% macro strftime_now(format) %}{{ format",
        *(f"|replace('{code}','{words}')" for code, words in DATE.items()),
        " }}{% endmacro %}",
    ]
)
"""Stands before a template and hides transformers' function of this name, which would write today's date."""

ROLE = "assistant"
"""Whose messages are answers."""

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Texts of a tokenizer's settings that a template may use."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with the special tokens that it may write."""

    template: str
    special: tuple[tuple[str, str], ...] = ()
    """Names and texts, as the tokenizer's settings have them."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all that decides a text."""
        tree = {"template": NOW + self.template, "special": dict(self.special)}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation, as transformers writes it.

        >>> ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}").render(
        ...     [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        ... )
        '<user>Hi<assistant>Hello'

        Raises:
            InputError: the template refuses it.
        """
        from transformers.utils.chat_template_utils import render_jinja_template  # only conversations need it

        known: dict[str, Any] = dict(self.special)
        try:
            found: Any = render_jinja_template([list(map(dict, messages))], chat_template=NOW + self.template, **known)
        except Exception as error:
            # Templates are programs: besides Jinja's own errors they raise whatever their operations do.
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"the chat template refuses the conversation: {reason}; correct the row") from None
        return str(found[0][0])

    def answered(self, conversation: Conversation, special_texts: Sequence[str]) -> Answered:
        """The text of a conversation with the places of the assistant's words.

        Args:
            conversation: its messages.
            special_texts: how the tokenizer's special tokens are spelled.

        Raises:
            InputError: the template refuses the conversation, or changes a message of the assistant so that its place
                is not certain.
        """
        messages = conversation.messages
        text = self.render(messages)
        if MARK in text:
            raise InputError(f"a message holds {MARK!r}, which no message may; correct the row")
        found = list[tuple[int, int]]()
        for number, message in enumerate(messages):
            content = message.get("content", "")
            if message["role"] == ROLE and content.strip():
                marked = [*messages[:number], {**message, "content": MARK}, *messages[number + 1 :]]
                start, stop = _place(text, self.render(marked), content, number + 1)
                alone = self.render(marked[: number + 1]).partition(MARK)[2]
                found.append((start, stop + len(_turn_end(text[stop:], alone, special_texts))))
        if any(stop > start for (_, stop), (start, _) in pairwise(found)):
            raise InputError("the chat template writes the assistant's messages in another order; use another template")
        return Answered(text, tuple(found))


def _place(text: str, marked: str, content: str, number: int) -> tuple[int, int]:
    """First character and end of a message in a text, by the same text with a mark in its place."""
    head, found, tail = marked.partition(MARK)
    start, stop = len(head), len(text) - len(tail)
    once = bool(found) and MARK not in tail
    same = text.startswith(head) and text.endswith(tail) and start < stop
    if not (once and same and text[start:stop] in content):
        raise InputError(
            f"the chat template does not write message {number} as it is, so where the answer stands is not certain; "
            "correct the template, or give each answer as a row with `prompt_field` and `completion_field`"
        )
    return start, stop


def _turn_end(behind: str, alone: str, special_texts: Sequence[str]) -> str:
    """The special tokens with which both texts begin.

    >>> _turn_end("</s><user>Hi", "</s>", ("<user>", "</s>")), _turn_end("<user>Hi", "", ("<user>", "</s>"))
    ('</s>', '')
    """
    longest_first = sorted(special_texts, key=len, reverse=True)
    for token in longest_first:
        if token and behind.startswith(token) and alone.startswith(token):
            return token + _turn_end(behind[len(token) :], alone[len(token) :], special_texts)
    return ""


@lru_cache(maxsize=4)
def load_chat_template(spec: str) -> ChatTemplate:
    """The chat template of a tokenizer: `chat_template.jinja`, or the default one in its `tokenizer_config.json`.

    Args:
        spec: `what.corpus.tokenizer`, a directory or hub id.

    Raises:
        InputError: it has none.
    """
    settings_path, template_path = find_file(spec, "tokenizer_config.json"), find_file(spec, "chat_template.jinja")
    settings = {} if settings_path is None else read_json(settings_path)
    template = settings.get("chat_template") if template_path is None else template_path.read_text(encoding="utf-8")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise InputError(
            f"tokenizer {spec!r} has no chat template; write `chat_template` into its tokenizer_config.json, or give "
            "`corpus.prompt_field` and `corpus.completion_field` in place of `messages_field`"
        )
    texts = {name: _content(settings.get(name)) for name in SPECIAL}
    return ChatTemplate(template, tuple((name, text) for name, text in texts.items() if text is not None))


def _content(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
