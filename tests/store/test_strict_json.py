"""Records that could be read in two ways are refused, each with the field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokenbound.errors import MismatchError
from tokenbound.store.run import RunDirectory
from tokenbound.store.strict_json import MAX_DEPTH, SUM_BITS, StrictJsonError, check_tree, parse_json


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ('{"x": [{"a": 1, "a": 1}]}', "field 'x.0': the key 'a' is given twice"),
        ('{"a": NaN}', "field 'a': NaN is not a number"),
        ('{"a": [1, -Infinity]}', "field 'a.1': -Infinity is not a number"),
        ('{"a": 1e999}', "field 'a': 1e999 is not a finite number"),
        ('{"a": 18446744073709551616}', "field 'a': 18446744073709551616 does not fit into 64 bits"),
        ('{"a": -9223372036854775809}', "field 'a': -9223372036854775809 does not fit into 64 bits"),
        ('{"a": ' + "9" * 5000 + "}", "field 'a': 9+... does not fit into 64 bits"),
        ('{"a": "\\ud800"}', "field 'a': the text is not Unicode"),
        ('{"\\udfff": 1}', "the key '.*' is not Unicode"),
        ("[" * 100_000, f"nested more than {MAX_DEPTH} levels|not JSON"),
        ("[" * 40 + "]" * 40, f"nested more than {MAX_DEPTH} levels"),
        ('{"a": 1} {"b": 2}', "not JSON"),
        ("{'a': 1}", "not JSON"),
        ("", "not JSON"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(text: str, reason: str) -> None:
    with pytest.raises(StrictJsonError, match=reason) as caught:
        parse_json(text.encode())
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"\xff{}", '{"a": 1}'.encode("utf-16"), b'\xef\xbb\xbf{"a": 1}'])
def test_records_are_utf8_without_a_mark(data: bytes) -> None:
    with pytest.raises(StrictJsonError, match=r"UTF-8|BOM|not JSON"):
        parse_json(data)


def test_what_json_can_say_is_read_as_it_is() -> None:
    tree = {"a": [1, -1, 2**64 - 1, -(2**63), 0.5, True, None, "ü\u2028"], "b": {"c": {}}}
    assert parse_json(json.dumps(tree).encode()) == tree
    assert parse_json(b"[" + str(2**80).encode() + b"]", integer_bits=SUM_BITS) == [2**80]


def test_large_records_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "certificate.json").write_text(json.dumps({"a": "x" * 20}))
    with pytest.raises(MismatchError, match=r"certificate.json is damaged \(29 bytes, more than the 10"):
        RunDirectory(str(tmp_path)).read_json("certificate.json", max_bytes=10)
    with pytest.raises(StrictJsonError, match="more than the 10"):
        parse_json(b'{"a": 1234567}', max_bytes=10)


def test_references_that_multiply_are_counted() -> None:
    tree: list[object] = [0] * 10
    for _ in range(8):
        tree = [tree] * 10
    with pytest.raises(StrictJsonError, match="more than 1,000 values"):
        check_tree(tree, max_values=1000)
