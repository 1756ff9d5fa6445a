"""Chat templates: a conversation to one text, and where in it the assistant's words are.

An answer is found by writing the conversation twice, once with a mark in place of the message. What stands before and
behind the mark is the template's, so nothing else than the message itself can be scored as an answer, whatever the
template does and whatever the messages spell. The special token that ends the turn belongs to the answer where the
template writes one directly behind the message: the model must predict it to stop.
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

DATE = "26 Jul 2024"
"""For templates that write a date: the one that Llama's fall back to, so that a text is the same every day."""

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
        tree = {"template": self.template, "special": dict(self.special), "date": DATE}
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

        # `strftime_now` hides transformers' own, which would write today's date.
        known: dict[str, Any] = {**dict(self.special), "date_string": DATE, "strftime_now": ""}
        try:
            found: Any = render_jinja_template([list(map(dict, messages))], chat_template=self.template, **known)
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
                found.append((start, _behind_special(text, stop, special_texts)))
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


def _behind_special(text: str, stop: int, special_texts: Sequence[str]) -> int:
    """Behind the special token that begins here; here where none does."""
    return stop + max((len(token) for token in special_texts if token and text.startswith(token, stop)), default=0)


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
