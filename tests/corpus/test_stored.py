"""Flat ids in another width, byte order or kind of file than the config says are refused by what they are."""

from __future__ import annotations

import gzip
import io

import numpy as np
import pytest

from tokenbound.config import CorpusConfig
from tokenbound.corpus.prepare import prepare_corpus
from tokenbound.corpus.prepared import Manifest
from tokenbound.errors import InputError

IDS = np.random.default_rng(0).integers(3, 50_000, 4000)


def prepare(folder, data: bytes, *, name: str = "a.bin", dtype: str | None = "uint16", vocab_size: int = 50_257):
    (folder / name).write_bytes(data)
    fields = {"dtype": dtype, "vocab_size": vocab_size, "tokenizer_is": "given", "add_bos": False, "add_eos": False}
    config = CorpusConfig(source="tokens", paths=(str(folder / name),), **fields)
    return prepare_corpus(config, str(folder / "out")).manifest


def array(dtype: str, ids=IDS) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, ids.astype(dtype))
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_the_right_width_is_read(tmp_path, dtype):
    assert prepare(tmp_path, IDS.astype(dtype).tobytes(), dtype=dtype).tokens == len(IDS)


@pytest.mark.parametrize(
    ("stored", "read", "vocab_size", "message"),
    [
        ("<u4", "uint16", 50_257, "every second id is 0, so its ids look like 32-bit ones; set `corpus.dtype: uint32`"),
        ("<u4", "uint16", 65_536, "32-bit ones; set `corpus.dtype: uint32`"),
        ("<u8", "uint16", 50_257, "64-bit ones; store its ids as uint32"),
        ("<u8", "uint32", 50_257, "64-bit ones; store its ids as uint32"),
        ("<u2", "uint32", 50_257, "its ids fit as `dtype: uint16`"),
        ("<u2", "uint32", 128_256, "its ids fit as `dtype: uint16`"),
        (">u2", "uint16", 50_257, "big-endian 16-bit"),
        (">u4", "uint32", 50_257, "big-endian 32-bit"),
        (">u4", "uint16", 50_257, "big-endian 32-bit"),
    ],
)
def test_another_width_or_byte_order_is_named(tmp_path, stored, read, vocab_size, message):
    with pytest.raises(InputError, match=message):
        prepare(tmp_path, IDS.astype(stored).tobytes(), dtype=read, vocab_size=vocab_size)


def test_large_ids_read_in_halves_are_named(tmp_path):
    ids = np.random.default_rng(0).integers(3, 128_256, 4000).astype("<u4")
    with pytest.raises(InputError, match="every second id is at most 1, so its ids look like 32-bit ones"):
        prepare(tmp_path, ids.tobytes(), vocab_size=65_536)


def test_a_size_of_the_other_width_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no multiple of the 4 .*set `corpus\.dtype: uint16`"):
        prepare(tmp_path, IDS[:-1].astype("<u2").tobytes(), dtype="uint32")
    with pytest.raises(InputError, match="no multiple of the 2"):
        prepare(tmp_path, b"abc")


@pytest.mark.parametrize(("vocab_size", "eos_id"), [(65_537, None), (128_256, None), (100, 100)])
def test_a_vocabulary_that_does_not_fit_is_refused_before_anything_is_read(vocab_size, eos_id):
    fields = {"tokenizer_is": "given", "add_bos": False, "add_eos": False, "eos_id": eos_id}
    with pytest.raises(ValueError, match=r"does not fit `dtype: uint16`|is outside `vocab_size`"):
        CorpusConfig(source="tokens", paths=("nowhere.bin",), dtype="uint16", vocab_size=vocab_size, **fields)


@pytest.mark.parametrize("dtype", ["u1", "u2", ">u2", "i4", ">u4", "i8"])
def test_arrays_say_their_own_type(tmp_path, dtype):
    ids = IDS % 256
    assert prepare(tmp_path, array(dtype, ids), name="a.npy", dtype=None, vocab_size=256).tokens == len(ids)


def test_an_array_is_one_under_the_name_of_a_flat_file(tmp_path):
    assert prepare(tmp_path, array("u2"), dtype=None).tokens == len(IDS)


def test_arrays_that_contradict_the_config_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"array of int64, but `corpus\.dtype` is uint16; remove `dtype`"):
        prepare(tmp_path, array("i8"), name="a.npy")
    with pytest.raises(InputError, match=r"array of uint16, whose ids end at 65535, below `corpus\.vocab_size` 128256"):
        prepare(tmp_path, array("u2"), name="a.npy", dtype=None, vocab_size=128_256)
    with pytest.raises(InputError, match="does not begin like one"):
        prepare(tmp_path, IDS.astype("<u2").tobytes(), name="a.npy")


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (gzip.compress(IDS.astype("<u2").tobytes()), "a.bin", "compressed by gzip.*decompress it"),
        (IDS.astype("<u2").tobytes(), "a.bin.xz", r"named \.xz.*decompress it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n", "a.bin", "git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "a.bin", "a zip archive, not flat ids"),
        (
            np.array([20240520, 1, 4000], "<i4").tobytes().ljust(1024, b"\0") + IDS.astype("<u2").tobytes(),
            "a.bin",
            "llm",
        ),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, data, name, message):
    with pytest.raises(InputError, match=message):
        prepare(tmp_path, data, name=name)


def test_ids_that_begin_like_gzip_are_ids(tmp_path):
    manifest: Manifest = prepare(tmp_path, b"\x1f\x8b\x08\x00" + IDS.astype("<u2").tobytes())
    assert manifest.tokens == len(IDS) + 2
