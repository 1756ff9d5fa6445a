"""Coding a model takes the model and what two of its largest tensors take, beside the artifact's own bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tokenbound

SCRIPT = Path(__file__).parent / "peak_memory.py"
WORK_BYTES = 6 << 20
"""What is held whatever the model's size: blocks, tables, and pages of libraries that are first touched here."""
GENERAL_BYTES = 128 << 20
"""What LZMA2 and zstd -19 hold besides, where they are tried."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's VmHWM")


def measured(*cases: str) -> dict[str, dict[str, int]]:
    """Peaks in a fresh process whose allocators give back at once what is freed."""
    quiet = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    path = {"PYTHONPATH": str(Path(tokenbound.__file__).parents[1])}
    command = [sys.executable, str(SCRIPT), *cases]
    shown = subprocess.run(command, env={**os.environ, **quiet, **path}, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, int]] = json.loads(shown.stdout)
    assert set(found) == set(cases)
    return found


def assert_within(sizes: dict[str, int], work_bytes: int) -> None:
    allowed = sizes["model"] + 2 * sizes["largest"] + work_bytes
    assert sizes["model"] // 2 < sizes["decode"] <= allowed
    if "encode" in sizes:
        assert sizes["model"] < sizes["encode"] <= allowed + sizes["artifact"]


def test_coding_takes_the_model_and_two_of_its_tensors() -> None:
    for case, sizes in measured("1.0-float32", "0.02-bfloat16").items():
        assert sizes["largest"] > WORK_BYTES, case
        assert_within(sizes, WORK_BYTES)


@pytest.mark.slow
def test_decoding_the_codecs_of_others_takes_no_more() -> None:
    for sizes in measured("groups", "lattice").values():
        assert_within(sizes, WORK_BYTES)


@pytest.mark.slow
def test_exact_coding_takes_general_codecs_besides() -> None:
    for sizes in measured("lossless-uint8", "lossless-int32", "lossless-float32").values():
        assert_within(sizes, GENERAL_BYTES)
