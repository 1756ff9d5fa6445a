from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from losses_support import make_losses

from tokenbound.errors import IncompleteError, InputError, MismatchError
from tokenbound.limits import MAX_SHARD_TOKENS
from tokenbound.store.run import RunDirectory, losses_sha256, missing_shards, sha256_hex


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(str(tmp_path / "run"))


def test_a_shard_counts_only_with_its_record(run: RunDirectory) -> None:
    record = run.commit(0, make_losses([4, 4]), {"n": 8}, "f")
    assert run.committed() == {0: record}
    (Path(run.root) / "shards/00000.json").unlink()
    assert run.committed() == {}
    assert list(missing_shards(2, {0: record})) == [1]


def test_losses_are_read_back_through_their_record(run: RunDirectory) -> None:
    losses = make_losses([4, 4])
    record = run.commit(3, losses, {}, "f")
    assert run.losses(record).num_tokens == losses.num_tokens
    assert run.record(3) == record


def test_committing_again_overwrites(run: RunDirectory) -> None:
    first = run.commit(0, make_losses([4]), {}, "f")
    second = run.commit(0, make_losses([4]), {}, "f")
    assert first == second
    assert len(list(Path(run.root).rglob("*.parquet"))) == 1


def test_every_changed_byte_is_noticed(run: RunDirectory) -> None:
    record = run.commit(0, make_losses([40, 40]), {}, "f")
    path = Path(run.root) / record.file
    original = path.read_bytes()
    for at in range(0, len(original), 97):
        path.write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
        with pytest.raises(MismatchError, match=r"00000\.parquet changed"):
            run.losses(record)


def test_truncated_and_missing_files_are_noticed(run: RunDirectory) -> None:
    record = run.commit(0, make_losses([40]), {}, "f")
    path = Path(run.root) / record.file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MismatchError, match="changed after it was committed"):
        run.losses(record)
    path.unlink()
    with pytest.raises(MismatchError, match="missing"):
        run.losses(record)


def test_damaged_records_are_named(run: RunDirectory) -> None:
    run.commit(0, make_losses([4]), {}, "f")
    path = Path(run.root) / "shards/00000.json"
    for text in ("{", '{"shard": 0}', path.read_text().replace('"shard":0', '"shard":7')):
        path.write_text(text)
        with pytest.raises(MismatchError, match=r"shards/00000\.json"):
            run.record(0)


def test_an_uncommitted_shard_is_incomplete(run: RunDirectory) -> None:
    with pytest.raises(IncompleteError):
        run.record(5)


def test_stray_parquet_files_and_other_names_are_ignored(run: RunDirectory) -> None:
    run.commit(0, make_losses([4]), {}, "f")
    (Path(run.root) / "losses/00009.parquet").write_bytes(b"left by a killed writer")
    (Path(run.root) / "shards/notes.txt").write_text("x")
    assert list(run.committed()) == [0]


def test_the_ledger_digest_depends_on_order_and_content(run: RunDirectory) -> None:
    a, b = run.commit(0, make_losses([4]), {}, "f"), run.commit(1, make_losses([4], seed=1), {}, "f")
    assert len({losses_sha256([a, b]), losses_sha256([b, a]), losses_sha256([a])}) == 3


def test_counts_are_compared_before_anything_is_decoded(run: RunDirectory) -> None:
    losses = make_losses([40, 40])
    honest = run.commit(0, losses, {}, "f")
    assert sum(piece.num_tokens for piece in run.pieces(honest)) == 80
    for changes in ({"windows": 3}, {"tokens": 40}, {"tokens": 81}):
        with pytest.raises(MismatchError, match=r"00000\.parquet: windows or tokens differ"):
            next(run.pieces(replace(honest, **changes)))


def test_a_shard_larger_than_any_is_refused_by_its_metadata(run: RunDirectory) -> None:
    values = MAX_SHARD_TOKENS + 1
    offsets = pa.array([0, values], pa.int32())
    nulls = pa.ListArray.from_arrays(offsets, pa.nulls(values, pa.int8()))  # 8 MB that claim to be 67 million losses
    sink = io.BytesIO()
    pq.write_table(pa.table({"window_id": pa.array([0]), "nll": nulls}), sink)
    data = sink.getvalue()
    run.write("losses/00000.parquet", data)
    record = replace(
        run.commit(1, make_losses([4]), {}, "f"),
        file="losses/00000.parquet",
        bytes=len(data),
        sha256=sha256_hex(data),
        windows=1,
        tokens=values,
    )
    with pytest.raises(MismatchError, match=r"67,108,865 tokens, more than the 67,108,864 of the largest shard"):
        run.losses(record)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_or_device_in_the_place_of_a_file_is_refused(run: RunDirectory) -> None:
    record = run.commit(0, make_losses([40]), {}, "f")
    for name in (record.file, "shards/00000.json"):
        path = Path(run.root) / name
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        for read in (run.read, run.read_json):
            with pytest.raises(InputError, match=r"is a named pipe, not a file"):
                read(name)
        path.unlink()
        path.symlink_to("/dev/zero")
        for read in (run.read, run.read_json):
            with pytest.raises(InputError, match=r"is a device, not a file"):
                read(name)
        with pytest.raises((InputError, MismatchError)):
            run.losses(run.record(0))
        path.unlink()
        path.write_bytes(kept)
    assert run.losses(run.record(0)).num_tokens == 40
