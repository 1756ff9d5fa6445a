"""Every source of rows finds the text of a row by one rule, and one key says what a row without a text is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from tokenbound.corpus.answers import Answered, Conversation, Document
from tokenbound.corpus.config import CorpusConfig
from tokenbound.corpus.documents import find_files, list_files, read_documents, read_rows
from tokenbound.corpus.files import SourceFile
from tokenbound.corpus.prepare import Sizes, cache_name, corpus_rule, prepare_corpus
from tokenbound.corpus.row_text import RowText
from tokenbound.corpus.summary import corpus_section
from tokenbound.corpus.windows import plan_corpus
from tokenbound.errors import InputError
from tokenbound.report.words import corpus_sentences
from tokenbound.store.sections import CorpusSection

Row = dict[str, Any]


def write_jsonl(folder: Path, rows: list[Row]) -> Row:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": "jsonl", "paths": (str(folder / "a.jsonl"),)}


def write_parquet(folder: Path, rows: list[Row]) -> Row:
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return {"source": "parquet", "paths": (str(folder / "a.parquet"),)}


def write_dataset(folder: Path, rows: list[Row]) -> Row:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return {"source": "hf", "name": str(folder / "saved")}


def write_arrow(folder: Path, rows: list[Row]) -> Row:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    return {"source": "arrow", "paths": (str(folder / "a.arrow"),)}


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet, "arrow": write_arrow, "hf": write_dataset}


@pytest.fixture(params=WRITERS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., CorpusConfig]]:
    """A corpus of some rows in each kind of file."""

    def write(rows: list[Row], **keys: object) -> CorpusConfig:
        given = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": False}
        return CorpusConfig(**{**WRITERS[request.param](tmp_path, rows), **given, **keys})

    return write


def texts(config: CorpusConfig) -> list[Document]:
    return [text for file in find_files(config) for text in read_documents(config, file)]


def test_a_field_inside_another_is_named_with_a_dot(written) -> None:
    rows = [{"a": {"b": {"c": "one"}, "n": 1}, "text": "x"}, {"a": {"b": {"c": "two"}, "n": 2}, "text": "y"}]
    assert texts(written(rows, text_field="a.b.c")) == ["one", "two"]


def test_a_name_that_has_the_dot_itself_comes_first(written) -> None:
    rows = [{"a.b": "outer", "a": {"b": "inner"}}]
    assert texts(written(rows, text_field="a.b")) == ["outer"]


def test_columns_whose_names_begin_alike_are_told_apart(written) -> None:
    rows = [{"text.raw": "raw", "text": "clean"}]
    assert texts(written(rows)) == ["clean"]


def test_a_list_of_texts_is_one_document_line_by_line(written) -> None:
    rows = [{"text": ["one", "two"]}, {"text": ["three"]}, {"text": []}]
    assert texts(written(rows)) == ["one\ntwo", "three", ""]


def test_a_list_inside_another_field_is_joined_too(written) -> None:
    assert texts(written([{"doc": {"lines": ["a", "b"]}}], text_field="doc.lines")) == ["a\nb"]


def test_prompts_and_answers_are_found_by_the_same_rule(written) -> None:
    rows = [{"qa": {"q": "2 + 2 =", "a": [" 4", "!"]}, "other": 1}, {"qa": {"q": "?", "a": []}, "other": 2}]
    config = written(rows, prompt_field="qa.q", completion_field="qa.a")
    assert texts(config) == [Answered.of("2 + 2 =", " 4\n!"), Answered.of("?", "")]


def test_conversations_are_found_by_the_same_rule(written) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"chat": {"turns": turns}, "n": 1}, {"chat": {"turns": turns[:1]}, "n": 2}]
    config = written(rows, messages_field="chat.turns", tokenizer="some")
    assert texts(config) == [Conversation(tuple(turns)), Conversation(tuple(turns[:1]))]


def test_a_row_without_a_conversation_is_a_row_without_a_text(written) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    rows = [{"chat": None}, {"chat": turns}]
    with pytest.raises(InputError, match=r"(row 0|line 1): field 'chat' is null; .* or `corpus.missing: skip`"):
        texts(written(rows, messages_field="chat", tokenizer="some"))
    config = written(rows, messages_field="chat", tokenizer="some", missing="skip")
    [file] = find_files(config)
    assert [*read_rows(config, file)] == [None, Conversation(tuple(turns))]


def test_a_row_without_a_prompt_or_an_answer_is_a_row_without_a_text(written, tmp_path: Path) -> None:
    rows = [{"q": "one", "a": None}, {"q": "two", "a": "2"}, {"q": None, "a": "3"}, {"q": "four", "a": ""}]
    asked = {"prompt_field": "q", "completion_field": "a", "targets": "answers"}
    with pytest.raises(InputError, match=r"(row 0|line 1): field 'a' is null; .* or `corpus.missing: skip`"):
        texts(written(rows, **asked))
    config = written(rows, **asked, missing="skip")
    [file] = find_files(config)
    assert [*read_rows(config, file)] == [None, Answered.of("two", "2"), None, Answered.of("four", "")]
    for name, sizes in (("one", Sizes()), ("small", Sizes(part_bytes=8, batch_documents=1))):
        corpus = prepare_corpus(config, str(tmp_path / name), sizes=sizes)
        assert (corpus.manifest.documents, corpus.manifest.rows_without_text) == (2, 2)
        scored = corpus.targets_between(0, 0, corpus.manifest.tokens)
        assert scored is not None
        assert scored.nonzero()[0].tolist() == [3], "the answers are where they are without the rows left out"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt_field": "x", "completion_field": "a"}, "'x'.*set `corpus.prompt_field`"),
        ({"prompt_field": "a", "completion_field": "l"}, "'l'.*not text.*`corpus.completion_field`"),
        ({"messages_field": "a", "tokenizer": "some"}, "'a' .*list of messages.*`corpus.messages_field`"),
        ({"messages_field": "l.x", "tokenizer": "some"}, "'l.x'.*`corpus.messages_field`"),
    ],
)
def test_the_key_that_names_the_wrong_field_is_named(written, keys, message) -> None:
    with pytest.raises(InputError, match=message):
        texts(written([{"a": "x", "l": [{"x": 1}]}], **keys))


def test_items_of_a_list_may_not_be_null(written) -> None:
    with pytest.raises(InputError, match=r"(row 0|line 1): field 'text': item 2 of the list is null, not text"):
        texts(written([{"text": ["a", None]}]))


def test_items_of_a_list_must_be_texts(written) -> None:
    message = r"'text'.* (is list<.*not text|item 1 of the list is dict).*`corpus.text_field`"
    with pytest.raises(InputError, match=message):
        texts(written([{"text": [{"role": "user"}]}]))


@pytest.mark.parametrize("field", ["a", "a.b.c", "l.b"])
def test_a_path_that_ends_too_early_or_too_late_is_refused(written, field) -> None:
    with pytest.raises(InputError, match=rf"'{field}'.*set `corpus.text_field`"):
        texts(written([{"a": {"b": "x"}, "l": [{"b": "x"}]}], text_field=field))


@pytest.mark.parametrize("field", ["text", "a.b"])
def test_rows_without_a_text_are_refused_or_left_out(written, field) -> None:
    rows = [{"text": "one", "a": {"b": "one"}}, {"text": None, "a": {"b": None}}, {"text": "", "a": {"b": ""}}]
    with pytest.raises(InputError, match=rf"(row 1|line 2): field '{field}' is null; .* or `corpus.missing: skip`"):
        texts(written(rows, text_field=field))
    config = written(rows, text_field=field, missing="skip")
    assert texts(config) == ["one", ""], "a text without a character is a text"
    [file] = find_files(config)
    assert [*read_rows(config, file)] == ["one", None, ""]


def test_a_row_has_no_text_where_what_holds_it_is_null(written) -> None:
    rows = [{"a": {"b": "one"}}, {"a": None}]
    assert texts(written(rows, text_field="a.b", missing="skip")) == ["one"]


def test_a_field_that_is_absent_from_one_line_is_no_text(tmp_path: Path) -> None:
    given = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": False}
    where = write_jsonl(tmp_path, [{"a": {"b": "one"}}, {"c": 1}, {"a": {}}])
    with pytest.raises(InputError, match=r"line 2: no field 'a.b' \(there are: c\).*missing: skip"):
        texts(CorpusConfig(**where, **given, text_field="a.b"))
    config = CorpusConfig(**where, **given, text_field="a.b", missing="skip")
    assert [*read_rows(config, find_files(config)[0])] == ["one", None, None]


def test_a_column_that_is_absent_is_no_row_without_a_text(written) -> None:
    if written([{"a": "x"}]).source == "jsonl":
        return  # whose rows have no columns in common
    with pytest.raises(InputError, match=r"no column 'text' \(there are: a\)"):
        texts(written([{"a": "x"}], missing="skip"))


def test_a_line_that_has_a_field_on_the_way_twice_is_refused(tmp_path: Path) -> None:
    given = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": False}
    for line in ('{"a": {"b": "x"}, "a": {"b": "y"}}', '{"a": {"b": "x", "b": "y"}}'):
        (tmp_path / "a.jsonl").write_text(line)
        config = CorpusConfig(source="jsonl", paths=(str(tmp_path / "a.jsonl"),), **given, text_field="a.b")
        with pytest.raises(InputError, match=r"line 1: field '[ab]' is there more than once"):
            texts(config)


def test_rows_that_are_left_out_are_counted_on_the_certificate(written, tmp_path: Path) -> None:
    rows = [{"text": None}, {"text": "a text"}, {"text": None}, {"text": None}, {"text": "another"}]
    config = written(rows, missing="skip")
    for name, sizes in (("one", Sizes()), ("small", Sizes(part_bytes=8, batch_documents=1))):
        corpus = prepare_corpus(config, str(tmp_path / name), sizes=sizes)
        assert (corpus.manifest.documents, corpus.manifest.rows_without_text) == (2, 3)
    plan = plan_corpus([corpus.document_offsets(0)], length=8, context="document")
    section = corpus_section(config, corpus.manifest, plan, context="document", skipped={})
    assert (section["missing"], section["rows_without_text"]) == ("skip", 3)
    TypeAdapter(CorpusSection).validate_python(section)
    assert corpus_sentences(section) == ["Rows without a text were left out: 3."]
    part = config.model_copy(update={"part": {"from": 0.0, "to": 1.0, "salt": ""}})
    assert prepare_corpus(part, str(tmp_path / "part")).manifest.rows_without_text == 3


def test_the_key_is_in_a_digest_only_where_it_is_set(written) -> None:
    plain = written([{"text": "x"}])
    assert "missing" not in corpus_rule(plain).to_dict()
    assert "missing" not in plain.model_dump(mode="json")
    skip = plain.model_copy(update={"missing": "skip"})
    assert corpus_rule(skip).to_dict()["missing"] == "skip"
    assert cache_name(skip) != cache_name(plain)


def test_a_dataset_whose_rows_are_left_out_has_a_digest_of_its_texts(tmp_path: Path) -> None:
    given = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": False}
    config = CorpusConfig(**write_dataset(tmp_path, [{"text": "ab"}, {"text": None}]), **given, missing="skip")
    [file] = list_files(config)
    assert file.bytes == 2


def test_a_list_may_come_as_bytes() -> None:
    assert RowText("x").of({"x": [b"d\xc3\xa9j\xc3\xa0", "vu"]}) == "déjà\nvu"
    with pytest.raises(InputError, match="field 'x' is not UTF-8"):
        RowText("x").of({"x": [b"\xff"]})


def test_a_file_of_nothing_but_rows_without_a_text_is_no_corpus(tmp_path: Path, written) -> None:
    config = written([{"text": None}, {"text": None}], missing="skip")
    with pytest.raises(InputError, match="corpus is empty"):
        prepare_corpus(config, str(tmp_path / "out"))


def test_a_span_of_lines_counts_its_own(tmp_path: Path) -> None:
    given = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": False}
    where = write_jsonl(tmp_path, [{"text": "one"}, {"text": None}, {"text": None}])
    config, size = CorpusConfig(**where, **given, missing="skip"), (tmp_path / "a.jsonl").stat().st_size
    spans = [SourceFile("a.jsonl", where["paths"][0], size, span=cut) for cut in ((0, 20), (20, size))]
    assert [[*read_rows(config, span)] for span in spans] == [["one", None], [None]]
