"""Keys of `what.corpus` that several sources share; a source's own keys stand in its file."""

from __future__ import annotations

import codecs
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tokenbound.limits import MAX_DOCUMENT_BYTES


class Fields(BaseModel):
    """Some keys of `what.corpus`; each has a docstring, and a default where it may be left out."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class PathFields(Fields):
    """Where the files are."""

    paths: tuple[str, ...] = ()
    """Files, directories or globs, in the order given; a file that two entries name is refused. For `hf`: the data
    files of `name`."""

    @field_validator("paths")
    @classmethod
    def _utf8_paths(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            if not is_utf8(path):
                raise ValueError(f"{path!r} is not UTF-8; name its directory, or a glob that matches the file")
        return paths


class ColumnFields(Fields):
    """Which column holds the text."""

    text_field: str = "text"
    """Name of the text column of `jsonl`, `parquet` and `hf` sources."""


class AnswerFields(ColumnFields):
    """Which columns hold a prompt and its answer, or a conversation, and whether the answers alone are scored."""

    prompt_field: str | None = None
    """Name of the column with the prompt that a document begins with, in place of `text_field`; its answer is in
    `completion_field`. The two texts are tokenised as one; a row is refused where a token lies across the border, as it
    mostly does where the prompt ends with a space that should begin the completion."""
    completion_field: str | None = None
    """Name of the column with the answer to `prompt_field`. An end-of-document id (`add_eos`) belongs to the answer."""
    messages_field: str | None = None
    """Name of the column with a conversation, in place of `text_field`: a list of messages with `role` and `content`.
    The tokenizer's chat template makes one text of it, so `add_bos` and `add_eos` must be false. The answers are what
    messages with the role `assistant` hold as `content`, each with the special token that ends its turn."""
    targets: Literal["all", "answers"] = "all"
    """Which tokens are scored and make up m: `all`, or those of `answers`, given the prompts."""

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that hold text."""
        if self.messages_field is not None:
            return ()
        asked = (self.prompt_field, self.completion_field)
        return tuple(name for name in asked if name is not None) or (self.text_field,)

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return self.text_columns if self.messages_field is None else (self.messages_field,)


ANSWER_KEYS = AnswerFields.model_fields.keys() - ColumnFields.model_fields.keys()
"""Keys that are given only where documents have answers."""


class EncodingFields(Fields):
    """How bytes become text."""

    encoding: str = "utf-8"
    """Encoding of `text` and `jsonl` files, and of `python-stdlib` under a Hugging Face tokenizer: a text codec of
    Python, such as `latin-1`, `cp1252` or `utf-16`. `utf-8` keeps a byte order mark that begins a `text` file as part
    of the document; `utf-8-sig` removes it."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are invalid in `encoding`. `strict`: the file is refused. `replace`: each becomes U+FFFD, and the
    certificate says in how many documents."""

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, encoding: str) -> str:
        """The codec's own name, so that two spellings of one codec are one config."""
        try:
            "a".encode(encoding)
            return codecs.lookup(encoding).name
        except (LookupError, UnicodeError, ValueError):
            raise ValueError(f"{encoding!r} is not a text encoding of Python; give one such as `latin-1`") from None


class SpecialTokenFields(Fields):
    """What becomes of text that spells a special token; applies to every source of text."""

    special_tokens: Literal["text", "parse", "refuse"] = "text"
    """Text in a document that spells a special token of a Hugging Face tokenizer, such as `<|endoftext|>`. `text`: it
    is tokenised like any other text. `parse`: it becomes the special id. `refuse`: the document is refused."""


class PartFields(Fields):
    """Which documents of a corpus; applies to every source of text."""

    part: dict[str, float | str] | None = None
    """Only the documents whose hash lies in a range of [0, 1): `{from: 0.0, to: 0.5, salt: ""}`. Hashed is the text
    alone, so equal documents are in the same part; parts of one salt whose ranges do not overlap share none. Null: all
    documents."""

    @field_validator("part")
    @classmethod
    def _a_range(cls, part: dict[str, float | str] | None) -> dict[str, float | str] | None:
        """The range with all its keys, so that two spellings of one part are one config."""
        if part is None:
            return None
        if unknown := part.keys() - {"from", "to", "salt"}:
            raise ValueError(f"unknown key {min(unknown)!r}; a part has `from`, `to` and `salt`")
        start, stop, salt = part.get("from", 0.0), part.get("to", 1.0), part.get("salt", "")
        if not (isinstance(start, float) and isinstance(stop, float) and 0 <= start < stop <= 1):
            raise ValueError(f"`from` {start!r} and `to` {stop!r} must be numbers with 0 <= from < to <= 1")
        if not (isinstance(salt, str) and is_utf8(salt)):
            raise ValueError(f"`salt` {salt!r} must be text")
        return {"from": start, "to": stop, "salt": salt}


class LimitFields(Fields):
    """How much is taken; applies to every source of text, and changes no id of a corpus that it lets pass."""

    max_document_bytes: int = Field(default=MAX_DOCUMENT_BYTES, ge=1)
    """Bytes of the largest document, for `jsonl` of the longest line; a corpus with a larger one is refused. A small
    compressed file can hold a document that fills the memory."""


class TokenizerFields(Fields):
    """How documents become ids, whatever the source."""

    tokenizer: str | None = None
    """`bytes`, or directory or hub id (`org/name`, or `org/name@revision`) of a Hugging Face fast tokenizer, or a GGUF
    file that holds one (on the hub: `org/name#model.gguf`). Not used by `tokens`."""
    tokenizer_is: Literal["given", "counted"]
    """`given`: declared chosen independently of this corpus. `counted`: its bytes are in the artifact."""
    add_bos: bool
    """Put the beginning-of-sequence id before every document."""
    add_eos: bool
    """Put the end-of-document id after every document."""


class StoredIdFields(Fields):
    """Of sources that hold ids: which ids there are."""

    dtype: Literal["uint16", "uint32"] | None = None
    """Id type of flat `.bin` token files."""
    eos_id: int | None = Field(default=None, ge=0)
    """End-of-document id inside `tokens` files; documents end after it. Null: each file is one document."""
    vocab_size: int | None = Field(default=None, ge=2)
    """For `tokens`: how many ids the tokenizer that made them can emit (V_tok)."""


class DatasetFields(Fields):
    """Which rows of which Hugging Face dataset."""

    name: str | None = None
    """For `hf`: dataset name, or builder such as `json`, or a directory."""
    subset: str | None = None
    """For `hf`: the dataset's configuration name."""
    split: str = "train"
    """For `hf`: the split, or a slice such as `train[:1000]` or `train[:10%]+test`."""
    revision: str | None = None
    """For `hf`: the commit or tag to pin."""


EVERYWHERE = frozenset({*PathFields.model_fields, *TokenizerFields.model_fields})
"""Keys that every source may be given. Names and digests of the files, the tokenizer's digest and its ids are in the
corpus digest instead of them."""


def is_utf8(text: str) -> bool:
    """Whether a text can be written into a config; names of files need not be UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
