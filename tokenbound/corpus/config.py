"""What a user says of a corpus: the keys of `what.corpus`, as the source that is named takes them."""

from __future__ import annotations

import json
from typing import Self

from pydantic import (
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from tokenbound.corpus.sources import SOURCES, FileSource, IdSource, Source, sources_with
from tokenbound.corpus.sources.fields import (
    EVERYWHERE,
    ONLY_WHERE_SET,
    DatasetFields,
    EncodingFields,
    ExcludeFields,
    Fields,
    LimitFields,
    MessageFields,
    PartFields,
    PathFields,
    SpecialTokenFields,
    StoredIdFields,
    TableFields,
    TokenizerFields,
)


class _SourceField(Fields):
    source: str
    """Kind of source: `python-stdlib`, `text`, `jsonl`, `csv`, `parquet`, `arrow`, `mds`, `tokens`, `megatron`,
    `datatrove`, `hf`, or one that an installed package provides, which may have keys of its own."""

    @field_validator("source")
    @classmethod
    def _known_source(cls, source: str) -> str:
        SOURCES.get(source)
        return source


class CorpusConfig(
    DatasetFields,
    StoredIdFields,
    TokenizerFields,
    LimitFields,
    SpecialTokenFields,
    PartFields,
    EncodingFields,
    TableFields,
    MessageFields,
    ExcludeFields,
    PathFields,
    _SourceField,
):
    """The training corpus and how its documents become token ids."""

    model_config = ConfigDict(extra="allow")  # the keys of the source alone: see `_only_keys_of_source`

    @model_validator(mode="after")
    def _only_keys_of_source(self) -> Self:
        """A key that the source would ignore is refused; defaults are allowed, as resolved configs spell them out."""
        kind = SOURCES.get(self.source)
        fields = {**type(self).model_fields, **kind.takes.model_fields}
        unknown = [key for key in self._own() if key not in fields]
        if unknown:
            error = PydanticCustomError("extra_forbidden", "unknown key", {"known": list(fields)})
            details = [InitErrorDetails(type=error, loc=(key,), input=self._own()[key]) for key in unknown]
            raise ValidationError.from_exception_data(type(self).__name__, details)
        for key in type(self).model_fields:
            if key != "source" and key not in EVERYWHERE:
                self._require_applied(key, kind)
        return self

    def _require_applied(self, key: str, kind: type[Source[Fields]]) -> None:
        value, default = getattr(self, key), type(self).model_fields[key].default
        if key in kind.takes.model_fields and kind.takes.model_fields[key].default != default:
            raise ValueError(f"source `{self.source}` gives `{key}` another default; name it differently there")
        if value == default:
            return
        if not kind.applies(key):
            raise ValueError(
                f"`{key}: {value}` does not apply to source `{self.source}`; remove it (it applies to "
                f"{', '.join(sources_with(key))})"
            )
        if key in SpecialTokenFields.model_fields and self.tokenizer == "bytes":
            raise ValueError(f"`{key}: {value}` does not apply to tokenizer `bytes`, which has none; remove it")

    @model_validator(mode="after")
    def _as_the_source_takes_it(self, info: ValidationInfo) -> Self:
        """Keys of the source's own are validated by its class, and all of them together by its `check`."""
        kind = SOURCES.get(self.source)
        fields = self._fields(kind, strict_json=info.mode == "json")
        for key in kind.takes.model_fields.keys() - type(self).model_fields.keys():
            self._own()[key] = getattr(fields, key)
        source = kind(fields)
        for key, reason in source.ignored().items():
            if getattr(fields, key) != kind.takes.model_fields[key].default:
                raise ValueError(f"`{key}: {getattr(fields, key)}` does not apply: {reason}; remove it")
        source.check()
        if issubclass(kind, IdSource):
            self._refuse_tokenizer()
        elif self.tokenizer is None:
            raise ValueError(f"source `{self.source}` needs `tokenizer`")
        return self

    def _refuse_tokenizer(self) -> None:
        if self.tokenizer is not None:
            raise ValueError(f"source `{self.source}` holds ids already; remove `tokenizer`")
        if self.tokenizer_is == "counted":
            raise ValueError(f"source `{self.source}` has no tokenizer to count; declare `tokenizer_is: given`")
        if self.add_bos or self.add_eos:
            raise ValueError(f"source `{self.source}` is scored as it is; set `add_bos: false` and `add_eos: false`")

    @model_validator(mode="after")
    def _answers_can_be_found(self) -> Self:
        """Prompts have completions, conversations a tokenizer with a template, and answers are somewhere."""
        prompt, completion, messages = self.prompt_field, self.completion_field, self.messages_field
        if (prompt is None) != (completion is None):
            missing = "prompt_field" if prompt is None else "completion_field"
            raise ValueError(f"`{missing}` is missing: a prompt and its answer are two columns; name both")
        if prompt is not None and prompt == completion:
            raise ValueError(f"`prompt_field` and `completion_field` are both {prompt!r}; name two columns")
        if prompt is not None and messages is not None:
            raise ValueError("`messages_field` and `prompt_field` are both given; remove one")
        if self.targets == "answers" and prompt is None and messages is None:
            raise ValueError(
                "`targets: answers` needs to know where they are; name `prompt_field` and `completion_field`, or "
                "`messages_field`"
            )
        if messages is not None:
            self._refuse_other_frames()
        return self

    def _refuse_other_frames(self) -> None:
        """A conversation is framed by its chat template alone."""
        if self.tokenizer == "bytes":
            raise ValueError("`messages_field` needs a Hugging Face tokenizer with a chat template, not `bytes`")
        if self.tokenizer_is == "counted":
            raise ValueError("`messages_field` needs `tokenizer_is: given`: a chat template is not in the artifact")
        if self.add_bos or self.add_eos:
            raise ValueError(
                "`messages_field`: the chat template says how a conversation begins and ends; set `add_bos: false` and "
                "`add_eos: false`"
            )

    def reader(self) -> Source[Fields]:
        """The corpus as its source reads it."""
        kind = SOURCES.get(self.source)
        source = kind(self._fields(kind))
        source.max_document_bytes = self.max_document_bytes
        if isinstance(source, FileSource):
            source.exclude = self.exclude
        return source

    def is_set(self, key: str) -> bool:
        """Whether a shared key has another value than its default."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, as_plain_data: SerializerFunctionWrapHandler) -> dict[str, object]:
        tree: dict[str, object] = as_plain_data(self)
        return {key: value for key, value in tree.items() if key not in ONLY_WHERE_SET or self.is_set(key)}

    def _fields(self, kind: type[Source[Fields]], *, strict_json: bool = False) -> Fields:
        """The keys that a source takes; in a file, a number as text is a mistake and not a spelling."""
        own = self._own()
        shared = {key: getattr(self, key) for key in kind.takes.model_fields.keys() & type(self).model_fields.keys()}
        given = {**shared, **{key: own[key] for key in kind.takes.model_fields.keys() & own.keys()}}
        if strict_json:
            return kind.takes.model_validate_json(json.dumps(given), strict=True)
        return kind.takes.model_validate(given)

    def _own(self) -> dict[str, object]:
        """The keys that only this source has, by name."""
        return {} if self.model_extra is None else self.model_extra
