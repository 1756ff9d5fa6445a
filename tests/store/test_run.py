from __future__ import annotations

from pathlib import Path

import pytest
from losses_support import make_losses

from tokenbound.errors import IncompleteError, MismatchError
from tokenbound.store.run import RunDirectory, losses_sha256, missing_shards


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
