"""Tables of text: cells, quotes and line ends are told apart as they were written, and what is none is refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.corpus.answers import Answered, Document
from tokenbound.corpus.config import CorpusConfig
from tokenbound.corpus.documents import find_corpus, find_files, read_documents, read_rows
from tokenbound.corpus.prepare import corpus_rule, prepare_corpus
from tokenbound.corpus.summary import corpus_section
from tokenbound.corpus.windows import plan_corpus
from tokenbound.errors import InputError

TEXTS = ["plain", 'says "so"', "two\nlines", "a,b;c\td", "crlf\r\ninside", "日本語 🙂", " spaces "]


def config(*paths: object, **fields: object) -> CorpusConfig:
    tree = {"tokenizer": "bytes", "tokenizer_is": "given", "add_bos": False, "add_eos": False} | fields
    return CorpusConfig(source="csv", paths=tuple(str(path) for path in paths), **tree)


def texts(setting: CorpusConfig) -> list[Document]:
    return [text for file in find_files(setting) for text in read_documents(setting, file)]


def table(values: list[str], *, delimiter: str = ",", end: str = "\r\n", quoting: int = csv.QUOTE_MINIMAL) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows([["id", "text", "n"], *([index, value, "x"] for index, value in enumerate(values))])
    return stream.getvalue()


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
@pytest.mark.parametrize(("kind", "delimiter"), [("csv", ","), ("tsv", "\t"), ("TAB", "\t")])
def test_cells_come_back_as_they_were_written(tmp_path, suffix, pack, kind, delimiter):
    (tmp_path / f"a.{kind}{suffix}").write_bytes(pack(table(TEXTS, delimiter=delimiter).encode()))
    (tmp_path / "notes.md").write_text("none")
    setting = config(tmp_path)
    assert texts(setting) == TEXTS
    assert find_corpus(setting).skipped == {"other suffix": 1}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), max_size=8),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_every_text_survives(tmp_path_factory, values, delimiter, end):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    # Left to itself, Python's writer does not quote carriage returns before newlines, and nobody can read them.
    path.write_bytes(table(values, delimiter=delimiter, end=end, quoting=csv.QUOTE_ALL).encode())
    assert texts(config(path, delimiter=delimiter)) == values


@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1", "utf-16"])
def test_tables_are_in_the_encoding(tmp_path, encoding):
    (tmp_path / "a.csv").write_bytes(table(["déjà"]).encode(encoding))
    assert texts(config(tmp_path, encoding=encoding)) == ["déjà"]


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\nx\n")
    assert texts(config(tmp_path)) == ["x"]


def test_blank_lines_are_none_and_the_last_line_needs_no_end(tmp_path):
    (tmp_path / "a.csv").write_text("\ntext\n\na\n\n\nb")
    assert texts(config(tmp_path)) == ["a", "b"]


def test_files_without_a_row_hold_no_document(tmp_path):
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "b.csv").write_text("id,text\n")
    assert texts(config(tmp_path)) == []


def test_an_empty_cell_is_a_row_without_a_text(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n1,a\n2,\n3,""\n')
    with pytest.raises(InputError, match=r"a\.csv', line 3: field 'text' is null; .*`corpus.missing: skip`"):
        texts(config(tmp_path))
    setting = config(tmp_path, missing="skip")
    assert [*read_rows(setting, find_files(setting)[0])] == ["a", None, None]


def test_two_cells_are_a_prompt_and_its_answer(tmp_path):
    (tmp_path / "a.csv").write_text("answer,n,question\n4,1,2 + 2 = \n,2,?\n")
    setting = config(tmp_path, prompt_field="question", completion_field="answer", missing="skip")
    assert [*read_rows(setting, find_files(setting)[0])] == [Answered.of("2 + 2 = ", "4"), None]
    with pytest.raises(InputError, match=r"cells have no fields inside; set `corpus.completion_field`"):
        texts(config(tmp_path, prompt_field="question", completion_field="answer.x"))


def test_quotes_are_text_where_the_config_says_so(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tn\n"so" he said\t1\n5" disk\t2\n"open\t3\n')
    with pytest.raises(InputError, match=r"line 2: not a row of a table .*set `corpus.quoting: none`"):
        texts(config(tmp_path))
    assert texts(config(tmp_path, quoting="none")) == ['"so" he said', '5" disk', '"open']


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,a,b\n", r"line 2: 3 cells, but the header has 2; quote cells"),
        ("id,text\n1\n", r"line 2: 1 cells, but the header has 2"),
        ('id,text\n1,"a\nb', r"line 3: not a row of a table \(unexpected end of data\)"),
        ('id,text\n1,"a" b\n', r"line 2: not a row of a table .*; double the quotes"),
        ("id,body\n1,a\n", r"no column 'text' \(there are: body, id\); set `corpus.text_field`"),
        ("text,text\na,b\n", r"2 columns are named 'text'"),
        ("id;text\n1;a\n", r"its header is one cell, 'id;text'; set `corpus.delimiter: ';'`"),
        ("text\ra\rb", r"line 1: not a row of a table .*new-line.*; quote cells that hold line ends"),
        ("text\na\rb\n", r"line 2: not a row of a table .*new-line.*; quote cells that hold line ends"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content, newline="")
    with pytest.raises(InputError, match=message):
        texts(config(tmp_path))


def test_fields_inside_cells_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("a,a.b\n1,x\n")
    assert texts(config(tmp_path, text_field="a.b")) == ["x"]
    with pytest.raises(InputError, match=r"no column 'a\.c', and cells have no fields inside"):
        texts(config(tmp_path, text_field="a.c"))


@pytest.mark.parametrize("wide", ["utf-16-le", "utf-16"])
def test_other_encodings_are_named(tmp_path, wide):
    (tmp_path / "a.csv").write_bytes("id,text\n1,a\n".encode(wide))
    with pytest.raises(InputError, match=f"it looks like UTF-16.*set `corpus.encoding: {wide}`"):
        texts(config(tmp_path))


def test_a_quote_that_is_never_closed_does_not_fill_the_memory(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b'text\n"a' + b"\nb" * (1 << 20)))
    with pytest.raises(InputError, match=r"more than 10,000 bytes .*; or close its quotes"):
        texts(config(tmp_path, max_document_bytes=10_000))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text\n" + b"a" * (1 << 24)))
    with pytest.raises(InputError, match="more than 10,000 bytes"):
        texts(config(tmp_path, max_document_bytes=10_000))


def test_a_cell_may_be_longer_than_python_reads_by_default(tmp_path):
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert [len(text) for text in texts(config(tmp_path))] == [200_000]


@pytest.mark.parametrize("delimiter", ["", ",,", '"', "\n", "\0"])
def test_a_delimiter_is_one_character(delimiter):
    with pytest.raises(ValueError, match=r"must be one character, and no quote or line end; such as ';'"):
        config("x", delimiter=delimiter)


def test_how_cells_were_read_is_in_the_digest_and_on_the_certificate(tmp_path):
    (tmp_path / "a.csv").write_text("id;text\n1;a text\n")
    setting = config(tmp_path, delimiter=";")
    assert corpus_rule(setting).to_dict()["options"] == {"delimiter": ";", "quoting": "double"}
    corpus = prepare_corpus(setting, str(tmp_path / "out"))
    plan = plan_corpus([corpus.document_offsets(0)], length=4, context="document")
    section = corpus_section(setting, corpus.manifest, plan, context="document", skipped={})
    assert section["delimiter"] == ";"
    assert "quoting" not in section


def test_the_config_of_the_page_about_corpora(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/how-to/corpus.md").read_text()
    tree = yaml.safe_load(page[page.index("# tables.yaml") : page.index("how: {output: runs/tables}")])
    for name in ("a.csv", "a.test.csv", "drafts/a.csv", "sub/b.csv"):
        (tmp_path / "tables" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tables" / name).write_text(f'id;body\n1;"of {name}; quoted"\n2;\n')
    monkeypatch.chdir(tmp_path)
    setting = CorpusConfig(**{**tree["what"]["corpus"], "tokenizer": "bytes", "add_bos": False})
    corpus = prepare_corpus(setting, str(tmp_path / "out"))
    assert bytes(corpus.read_ids(0, 0, corpus.manifest.tokens).tolist()) == b"of a.csv; quotedof sub/b.csv; quoted"
    assert (corpus.skipped, corpus.manifest.rows_without_text) == ({"excluded": 2}, 2)


def test_no_other_table_is_changed(tmp_path):
    """The limit of cells is Python's own, for the whole process: it may only grow."""
    path = Path(tmp_path / "a.csv")
    path.write_text("text\nx\n")
    before = csv.field_size_limit()
    assert texts(config(path)) == ["x"]
    assert csv.field_size_limit() >= before
