"""GGUF headers: read as the `gguf` package reads them, and refused in little memory where they are not sound."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf_support import random_weights, write_gguf, write_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenbound.errors import InputError
from tokenbound.gguf_file import MAX_HEADER_BYTES, locate_gguf, parts_of, read_gguf

EXTRA = {"general.tags": ["a", "b"], "numbers": [1, 2, 3], "flag": True, "half": 0.5, "text": "héllo"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    weights = random_weights(4, 64)
    tensors = {"a.weight": (weights, "Q4_0"), "b.weight": (weights, "F32"), "c.weight": (weights[0], "F16")}
    return write_gguf(path, "llama", {"block_count": 1}, tensors, EXTRA)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(*, version: int = 3, keys: bytes = b"", num_keys: int = 0, tensors: bytes = b"", count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, count, num_keys) + keys + tensors


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def entry(name: str = "w", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def test_a_header_is_what_the_gguf_package_reads(small: Path) -> None:
    found, expected = read_gguf(small), GGUFReader(small)
    named = {name: field.contents() for name, field in expected.fields.items() if not name.startswith("GGUF.")}
    assert dict(found.metadata) == named
    for tensor in expected.tensors:
        mine = found.tensors[tensor.name]
        assert (mine.type.name, mine.offset, mine.num_bytes) == (
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert np.array_equal(mine.read(), tensor.data.view(np.uint8).reshape(mine.stored_shape))
    assert found.architecture == "llama"


HOSTILE: dict[str, tuple[bytes, str]] = {
    "another file": (b"PK\x03\x04" + bytes(64), "is not a GGUF file"),
    "nothing": (b"", "cut off"),
    "version": (header(version=1), "version 1"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "keys": (header(num_keys=1 << 60), "declares 1152921504606846976 metadata keys"),
    "tensors": (header(count=1 << 60), "and 1152921504606846976 tensors"),
    "name length": (header(num_keys=1, keys=struct.pack("<Q", 1 << 62)), "a string of"),
    "name": (header(num_keys=1, keys=key("a\nb", 4, bytes(4))), "control characters"),
    "not text": (header(num_keys=1, keys=struct.pack("<Q", 2) + b"\xff\xfe" + bytes(8)), "not UTF-8"),
    "twice": (header(num_keys=2, keys=key("a", 4, bytes(4)) * 2), "'a' occurs twice"),
    "type": (header(num_keys=1, keys=key("a", 13, bytes(8))), "unknown type 13"),
    "string": (header(num_keys=1, keys=key("a", 8, struct.pack("<Q", 1 << 40))), "a string of 1099511627776 bytes"),
    "numbers": (header(num_keys=1, keys=key("a", 9, struct.pack("<IQ", 4, 1 << 60))), "declares 1152921504606846976 n"),
    "strings": (header(num_keys=1, keys=key("a", 9, struct.pack("<IQ", 8, 1 << 60))), "declares 1152921504606846976 s"),
    "nested": (header(num_keys=1, keys=key("a", 9, struct.pack("<IQ", 9, 1))), "an array of type 9"),
    "axes": (header(count=1, tensors=entry(shape=(1,) * 5) + bytes(64)), "has 5 axes"),
    "no axes": (header(count=1, tensors=entry(shape=()) + bytes(64)), "has 0 axes"),
    "empty": (header(count=1, tensors=entry(shape=(0,)) + bytes(64)), r"shape \(0,\)"),
    "ragged": (header(count=1, tensors=entry(shape=(33,), kind=2) + bytes(64)), "Q4_0 does not hold"),
    "huge": (header(count=1, tensors=entry(shape=(1 << 62, 1 << 62)) + bytes(64)), "does not end within the file"),
    "beyond": (header(count=1, tensors=entry(offset=1 << 40) + bytes(512)), "does not end within the file"),
    "unaligned": (header(count=1, tensors=entry(offset=4) + bytes(512)), "not aligned"),
    "overlapping": (header(count=2, tensors=entry("v") + entry("w") + bytes(512)), "overlaps another"),
    "doubled": (header(count=2, tensors=entry() + entry(offset=128) + bytes(512)), "'w' occurs twice"),
    "ggml type": (header(count=1, tensors=entry(kind=9) + bytes(512)), "of ggml type 9"),
    "alignment": (
        header(num_keys=1, keys=key("general.alignment", 4, struct.pack("<I", 3)), count=1, tensors=entry()),
        "general.alignment is 3",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_in_little_memory(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(InputError, match=message) as refused:
        read_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert "\n" not in str(refused.value)


def test_a_header_larger_than_any_model_has_is_refused(tmp_path: Path) -> None:
    """A sparse file: what it declares is there, and still too much."""
    path = tmp_path / "large.gguf"
    data = header(num_keys=1, keys=key("a", 8, struct.pack("<Q", MAX_HEADER_BYTES)))
    with path.open("wb") as file:
        file.write(data)
        file.truncate(4 * MAX_HEADER_BYTES)
    with pytest.raises(InputError, match="a string of 67108864 bytes"):
        read_gguf(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_read_or_refused(data: st.DataObject, small: Path, tmp_path: Path) -> None:
    content = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 900))
        width = data.draw(st.sampled_from([1, 4, 8]))
        value = data.draw(st.sampled_from([0, 1, 2, 8, 9, 255, 1 << 20, (1 << 31) - 1, (1 << 32) - 1, (1 << 64) - 1]))
        content[place : place + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2, 900, 40, 3]))])
    with suppress(InputError):
        found = read_gguf(path)
        for tensor in found.tensors.values():
            assert tensor.read().nbytes == tensor.num_bytes <= len(content)


def split(folder: Path, **changes: Any) -> Path:
    """A model in two files."""
    weights = random_weights(4, 64)
    for index, name in enumerate("ab"):
        values = {"split.no": index, "split.count": 2, "split.tensors.count": 2, **changes.get(name, {})}
        metadata = {"block_count": 1} if name == "a" else {}
        path = folder / f"m-{index + 1:05}-of-00002.gguf"
        write_gguf(path, "llama", metadata, {changes.get("names", "ab")[index]: (weights + index, "F32")}, values)
    return folder / "m-00001-of-00002.gguf"


def test_parts_of_a_split_file_are_read_together(tmp_path: Path) -> None:
    first = split(tmp_path)
    found = read_gguf(first)
    assert [path.name for path in parts_of(first)] == sorted(path.name for path in tmp_path.iterdir())
    assert found.tensors["b"].path.name == "m-00002-of-00002.gguf"
    assert np.array_equal(found.tensors["b"].read().view(np.float32), random_weights(4, 64) + 1)
    with pytest.raises(InputError, match=r"is not the first part; give m-00001-of-00002\.gguf"):
        read_gguf(tmp_path / "m-00002-of-00002.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": {"split.no": 5}}, r"is not part 2 of 2"),
        ({"b": {"split.count": 3}}, r"is not part 2 of 2"),
        ({"a": {"split.tensors.count": 3}}, r"hold 2 tensors, not 3"),
        ({"names": "aa"}, r"repeats tensor 'a'"),
        ({"a": {"split.count": 3}}, r"is a part of 3 \(split.count\), but is not named like one"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_gguf(split(tmp_path, **changes))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    first = split(tmp_path)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(InputError, match=r"m-00002-of-00002\.gguf does not exist; a split GGUF file needs all"):
        read_gguf(first)


def test_a_file_that_was_cut_off_after_its_header_was_read(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(small.read_bytes())
    found = read_gguf(path)
    path.write_bytes(small.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"cut\.gguf was cut off at tensor"):
        [entry.read() for entry in found.tensors.values()]


def test_files_are_found_by_path_and_by_name_in_a_folder(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf")
    assert locate_gguf(path) == locate_gguf(f"{tmp_path}#m.gguf") == path
    assert locate_gguf(tmp_path) is locate_gguf("org/name") is locate_gguf("org/name@v1") is None
    with pytest.raises(InputError, match=r"holds no n\.gguf \(GGUF files there: m\.gguf\)"):
        locate_gguf(f"{tmp_path}#n.gguf")
    with pytest.raises(InputError, match=r"n\.gguf does not exist"):
        locate_gguf(tmp_path / "n.gguf")
