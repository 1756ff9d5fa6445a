"""Coding a model takes the model and what two of its largest tensors take, beside the artifact's own bytes; decoding a
bomb takes at most twice what it declares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tokenbound

MODELS, BOMBS = (Path(__file__).parent / name for name in ("peak_memory.py", "bombs.py"))
WORK_BYTES = 6 << 20
"""What is held whatever the model's size: blocks, tables, and pages of libraries that are first touched here."""
GENERAL_BYTES = 128 << 20
"""What LZMA2 and zstd -19 hold besides, where they are tried."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's VmHWM")


def measured(script: Path, *cases: str) -> dict[str, dict[str, int]]:
    """Peaks in a fresh process whose allocators give back at once what is freed."""
    quiet = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    path = {"PYTHONPATH": str(Path(tokenbound.__file__).parents[1])}
    command = [sys.executable, str(script), *cases]
    shown = subprocess.run(command, env={**os.environ, **quiet, **path}, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, int]] = json.loads(shown.stdout)
    assert set(found) == set(cases) if cases else found
    return found


def assert_within(sizes: dict[str, int], work_bytes: int) -> None:
    allowed = sizes["model"] + 2 * sizes["largest"] + work_bytes
    assert sizes["model"] // 2 < sizes["decode"] <= allowed
    if "encode" in sizes:
        assert sizes["model"] < sizes["encode"] <= allowed + sizes["artifact"]


def test_coding_takes_the_model_and_two_of_its_tensors() -> None:
    for case, sizes in measured(MODELS, "1.0-float32", "0.02-bfloat16").items():
        assert sizes["largest"] > WORK_BYTES, case
        assert_within(sizes, WORK_BYTES)


@pytest.mark.slow
def test_decoding_the_codecs_of_others_takes_no_more() -> None:
    for sizes in measured(MODELS, "groups", "lattice").values():
        assert_within(sizes, WORK_BYTES)


@pytest.mark.slow
def test_exact_coding_takes_general_codecs_besides() -> None:
    for sizes in measured(MODELS, "lossless-uint8", "lossless-int32", "lossless-float32").values():
        assert_within(sizes, GENERAL_BYTES)


def assert_no_explosion(found: dict[str, dict[str, int]]) -> None:
    for name, sizes in found.items():
        assert sizes["declared"] > WORK_BYTES, name
        assert sizes["peak"] <= 2 * (sizes["declared"] + sizes["artifact"]) + WORK_BYTES, name


def test_bombs_take_no_more_than_twice_what_they_declare() -> None:
    short = (
        "matrix bfloat16",
        "static matrix bfloat16",
        "static classes float8_e4m3fn",
        "split planes bfloat16",
        "deflated float8_e4m3fn",
        "vector float32",
        "general 2 float32",
        "packed 1 2 int32",
        "repeated planes float32",
    )
    found = measured(BOMBS, *short, "n-grams of pairs")
    assert min(sizes["declared"] / sizes["artifact"] for sizes in found.values()) > 1000
    assert_no_explosion(found)


@pytest.mark.slow
def test_no_codec_makes_a_bomb() -> None:
    assert_no_explosion(measured(BOMBS))
