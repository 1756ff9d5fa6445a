from __future__ import annotations

from pathlib import Path

from tokenbound.engine.compress.checkpointed_parts import Parts


def test_parts_belong_to_an_identity_and_damage_counts_as_missing(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path), {"model": 1})
    assert parts.get("a") is None
    parts.put("a", b"one")
    parts.put("empty", b"")
    assert Parts(str(tmp_path), {"model": 1}).get("a") == b"one"
    assert parts.get("empty") == b""
    assert Parts(str(tmp_path), {"model": 2}).get("a") is None
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert parts.get("a") is None
    assert parts.get("empty") is None


def test_a_part_may_come_in_pieces_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path / "parts"), 0)
    parts.put("a", b"o", memoryview(b"ne"))
    assert parts.get("a") == b"one"
    assert len(list((tmp_path / "parts").iterdir())) == 1
