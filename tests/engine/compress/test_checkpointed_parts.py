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


def test_without_a_folder_parts_are_in_memory() -> None:
    parts = Parts(None, 0)
    parts.put("a", b"one")
    assert parts.get("a") == b"one"
    assert Parts(None, 0).get("a") is None
