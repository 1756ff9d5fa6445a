"""Keys of `what.corpus` that several sources share; a source's own keys stand in its file."""

from __future__ import annotations

import codecs
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tokenbound.corpus.row_text import RowField, RowMessages, RowText
from tokenbound.limits import MAX_DOCUMENT_BYTES


class Fields(BaseModel):
    """Some keys of `what.corpus`; each has a docstring, and a default where it may be left out."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class PathFields(Fields):
    """Where the files are."""

    paths: tuple[str, ...] = ()
    """Files, directories or globs, in the order given: local, `s3://`, `gs://`, or of a repository on the Hugging Face
    hub, such as `hf://datasets/org/name@revision/data/*.parquet`. A file that two entries name is refused. For `hf`:
    the data files of `name`."""

    @field_validator("paths")
    @classmethod
    def _utf8_paths(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            if not is_utf8(path):
                raise ValueError(f"{path!r} is not UTF-8; name its directory, or a glob that matches the file")
        return paths


class ExcludeFields(Fields):
    """Which files are left out; applies to every source whose files `paths` names."""

    exclude: tuple[str, ...] = ()
    """Globs of files and folders to leave out of the directories and globs in `paths`, such as `drafts` or
    `2024/*.jsonl`. One with a slash is compared with the path below the directory or glob, one without with every name
    in it. The certificate counts what was left out."""

    @field_validator("exclude")
    @classmethod
    def _below_a_place(cls, exclude: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in exclude:
            if not pattern.strip("/") or pattern.startswith(("/", "./", "../", "~")) or "://" in pattern:
                raise ValueError(f"{pattern!r} is not a path below an entry of `paths`; write `drafts` or `2024/*.txt`")
        return exclude


class ColumnFields(Fields):
    """Which column holds the text."""

    text_field: str = "text"
    """Name of the field or column that holds the text of a row; `a.b` is the field `b` inside `a`. A list of texts is
    one document, its items on lines of their own."""


class RowFields(ColumnFields):
    """Which fields of a row make its document, and what becomes of rows without one."""

    missing: Literal["refuse", "skip"] = "refuse"
    """Rows in which `text_field`, or a field named in its place, is null or absent. `refuse`: the corpus is refused.
    `skip`: they are left out, and the certificate says how many."""
    prompt_field: str | None = None
    """Name of the field with the prompt that a document begins with, in place of `text_field`; its answer is in
    `completion_field`. The two texts are tokenised as one; a row is refused where a token lies across the border, as it
    mostly does where the prompt ends with a space that should begin the completion."""
    completion_field: str | None = None
    """Name of the field with the answer to `prompt_field`. An end-of-document id (`add_eos`) belongs to the answer."""
    targets: Literal["all", "answers"] = "all"
    """Which tokens are scored and make up m: `all`, or those of `answers`, given the prompts."""

    @property
    def row_fields(self) -> tuple[RowField, ...]:
        """The fields of a row that `row_document` makes a document of."""
        asked = {"prompt_field": self.prompt_field, "completion_field": self.completion_field}
        given = {key: name for key, name in asked.items() if name is not None} or {"text_field": self.text_field}
        return tuple(RowText(name, self.missing, key) for key, name in given.items())


class MessageFields(RowFields):
    """The same for rows that may hold conversations."""

    messages_field: str | None = None
    """Name of the field with a conversation, in place of `text_field`: a list of messages with `role` and `content`.
    The tokenizer's chat template makes one text of it, so `add_bos` and `add_eos` must be false. The answers are what
    messages with the role `assistant` hold as `content`, each with the special token that ends its turn."""

    @property
    def row_fields(self) -> tuple[RowField, ...]:
        """The fields of a row that `row_document` makes a document of."""
        if self.messages_field is None:
            return super().row_fields
        return (RowMessages(self.messages_field, self.missing, "messages_field"),)


class EncodingFields(Fields):
    """How bytes become text."""

    encoding: str = "utf-8"
    """Encoding of `text`, `jsonl` and `csv` files, and of `python-stdlib` under a Hugging Face tokenizer: a text codec
    of Python, such as `latin-1`, `cp1252` or `utf-16`. `utf-8` keeps a byte order mark that begins a `text` file as
    part of the document; `utf-8-sig` removes it."""
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


class TableFields(Fields):
    """How the cells of a table of text are separated."""

    delimiter: str | None = None
    """Character between the cells of `csv` files. Null: a tab in files named `.tsv` or `.tab`, else a comma."""
    quoting: Literal["double", "none"] = "double"
    """Of `csv` files. `double`: a cell in double quotes may hold delimiters, line ends and doubled quotes. `none`:
    quotes are text like any other."""

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, delimiter: str | None) -> str | None:
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n\0'):
            raise ValueError(f"{delimiter!r} must be one character, and no quote or line end; such as ';'")
        return delimiter


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
    """Bytes of the largest document, for `jsonl` of the longest line, for `csv` characters of the longest row; a corpus
    with a larger one is refused. A small compressed file can hold a document that fills the memory."""


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


class VocabFields(Fields):
    """Of sources that hold ids: which ids there are."""

    vocab_size: int | None = Field(default=None, ge=2)
    """For `tokens`, `megatron` and `datatrove`: how many ids the tokenizer that made them can emit (V_tok)."""


class WidthFields(Fields):
    """How ids are stored in files that do not say so."""

    dtype: Literal["uint16", "uint32"] | None = None
    """Id type of flat `.bin` token files, and of `.ds` files whose metadata do not name it."""


class StoredIdFields(WidthFields, VocabFields):
    """Of flat files of ids: which ids there are, how they are stored, and where documents end."""

    eos_id: int | None = Field(default=None, ge=0)
    """End-of-document id inside `tokens` files; documents end after it. Null: each file is one document."""


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


ONLY_WHERE_SET = frozenset(
    {*ExcludeFields.model_fields, *TableFields.model_fields}
    | (MessageFields.model_fields.keys() - ColumnFields.model_fields.keys())
)
"""Keys that later versions added: at their default they are in no stored config, digest or certificate, which all stay
what they were before."""


def is_utf8(text: str) -> bool:
    """Whether a text can be written into a config; names of files need not be UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
