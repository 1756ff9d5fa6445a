"""An artifact opened as a file gives the tensors that its bytes give, and holds none of them."""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenbound.compression.artifact import decode_artifact, encode_artifact
from tokenbound.compression.artifact_file import ArtifactFile, _digests, open_artifact
from tokenbound.compression.container import ArtifactError
from tokenbound.compression.decode_pool import FilePart
from tokenbound.compression.dtypes import tensor_bytes
from tokenbound.compression.tensor import decode_tensor
from tokenbound.config.compress import LosslessSettings
from tokenbound.errors import MismatchError

GOLDEN = Path(__file__).parent / "golden" / "every_codec.tokenbound"


def mapped_bytes(path: Path) -> int:
    """Resident bytes of the mappings of a file in this process."""
    text, found = Path("/proc/self/smaps").read_text(), 0
    for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text):
        if str(path) in part.split("\n", 1)[0]:
            found += 1024 * int(re.search(r"Rss:\s+(\d+) kB", part).group(1))  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("opened", ["path", "bytes"])
def test_it_is_the_artifact_that_its_bytes_are(opened: str) -> None:
    data = GOLDEN.read_bytes()
    found, whole = ArtifactFile(GOLDEN if opened == "path" else data), decode_artifact(data)
    assert (found.sha256, found.num_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert (found.architecture, found.settings) == (whole.architecture, whole.settings)
    assert (found.tokenizer, found.base) == (whole.tokenizer, whole.base)
    assert found.names == list(found.tensors) == list(whole.tensors)
    assert len(found.tensors) == len(whole.tensors)
    assert "absent" not in found.tensors
    for name, tensor in whole.tensors.items():
        assert np.array_equal(tensor_bytes(found.tensor(name)), tensor_bytes(tensor))
    assert {name for name, _ in found.decoded()} == set(found.names)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="looks at Linux's list of mapped pages")
def test_neither_opening_nor_decoding_keeps_the_tensors_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.tokenbound"
    tensors = {f"w{index}": torch.randint(0, 256, (1 << 21,), dtype=torch.uint8) for index in range(8)}
    path.write_bytes(encode_artifact({}, tensors, LosslessSettings()))
    found = ArtifactFile(path)
    assert found.num_bytes > 8 << 21
    assert mapped_bytes(path) < 3 << 21  # the system may map pages around one that is read
    for name in found.names:
        assert torch.equal(found.tensor(name), tensors[name])
        assert mapped_bytes(path) < 3 << 21  # the system may map pages around one that is read
    assert all(item.payload.obj is found._data for item in found.parsed.coded)  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 200])
def test_what_is_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.tokenbound"
    path.write_bytes(GOLDEN.read_bytes()[:size])
    with pytest.raises(ArtifactError):
        ArtifactFile(path)


@pytest.mark.parametrize("place", [10, -20, -3])
def test_a_changed_byte_is_noticed(tmp_path: Path, place: int) -> None:
    path, data = tmp_path / "changed.tokenbound", bytearray(GOLDEN.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError):
        ArtifactFile(path)


def test_the_digests_are_those_of_the_pieces_in_which_it_is_read() -> None:
    data = GOLDEN.read_bytes()
    expected = hashlib.sha256(data[:-8]).digest(), hashlib.sha256(data).hexdigest()
    for size in (1, 7, 8, 9, 64, len(data) - 8, len(data) - 1, len(data)):
        pieces = (data[start : start + size] for start in range(0, len(data), size))
        assert _digests(pieces, len(data)) == expected


def test_the_one_that_was_opened_stays_when_another_takes_its_name(tmp_path: Path) -> None:
    path, other = tmp_path / "a.tokenbound", tmp_path / "b.tokenbound"
    path.write_bytes(GOLDEN.read_bytes())
    other.write_bytes(encode_artifact({}, {"w": torch.zeros(3)}, LosslessSettings()))
    found = ArtifactFile(path)
    other.replace(path)
    assert torch.equal(found.tensor(found.names[0]), ArtifactFile(GOLDEN).tensor(found.names[0]))
    with pytest.raises(MismatchError, match=r"a\.tokenbound has the digest .* put the artifact back"):
        open_artifact(path, sha256=found.sha256)


def test_another_process_gets_the_place_and_not_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "large.tokenbound"
    path.write_bytes(encode_artifact({}, {"w": torch.rand(1 << 18)}, LosslessSettings()))
    found = ArtifactFile(path)
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).tensor("w"), found.tensor("w"))
    part = found._portable(found.coded("w"))
    assert isinstance(part, FilePart)
    assert len(pickle.dumps(part)) < 1000
    assert torch.equal(decode_tensor(part.read()), found.tensor("w"))
