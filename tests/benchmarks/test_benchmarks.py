"""The benchmarks compute what they say, on shapes so small that no number means anything."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tokenbound import Certificate
from tokenbound.errors import ReplicaOutOfMemory
from tokenbound.models.checkpoint import read_checkpoint
from tokenbound.models.memory import random_model
from tokenbound.store.losses import Losses
from tokenbound.store.run import RunDirectory

HERE = Path(__file__).parent
TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A benchmark as a module, its siblings importable."""
    monkeypatch.syspath_prepend(str(HERE))

    def read(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", HERE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return read


def test_the_gpu_benchmark_counts_the_products_of_a_pass(load: Callable[[str], Any]) -> None:
    gpu = load("gpu")
    model = random_model(TINY, torch.float32)
    layer = 4 * 16 * 16 + 3 * 16 * 24
    assert gpu.operations_per_token(model, 32) == 2 * (2 * layer + 16 * 50) + 2 * 32 * 16 * 2
    case = gpu.Case("tiny", TINY, 32, 4)
    found = gpu.measure(case, torch.device("cpu"), torch.float32, ceiling_per_s=1e12, repeat=1)
    assert found.tokens_per_second > 0
    assert 0 < found.ceiling_share < 1
    assert found.head_share > 0
    assert found.case.name in gpu.row(found)
    assert gpu.ceiling(torch.device("cpu"), torch.float32, (64, 128), 1) > 0
    lengths = {(case.length, case.batch) for case in gpu.cases()}
    assert lengths == {(2048, 8), (4096, 4)}


def test_the_gpu_benchmark_runs_from_end_to_end(
    load: Callable[[str], Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = load("gpu")
    gpu.main(["--device", "cpu", "--toy", "--repeat", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert "TFLOP/s in bfloat16" in lines[0]
    assert [line.split(" | ")[0] for line in lines[3:]] == ["| toy llama, V=500", "| toy gpt2, V=500"]
    assert all(float(line.split(" | ")[2].replace(",", "")) > 0 for line in lines[3:])

    def full(*_: Any, **__: Any) -> None:
        raise ReplicaOutOfMemory("out of memory for a batch; use a smaller windows.batch")

    monkeypatch.setattr(gpu, "measure", full)
    assert "| out of memory for a batch |" in gpu.line(gpu.toy_cases()[0], torch.device("cpu"), torch.bfloat16)


def test_the_gpu_benchmark_measures_packed_and_streamed_replicas(load: Callable[[str], Any], tmp_path: Path) -> None:
    gpu = load("gpu")
    for form in ("packed", "streamed"):
        size = {"ceiling_per_s": 1e12, "length": 32, "batch": 2}
        found = gpu.measure_form(form, "toy", 4.0, tmp_path, torch.device("cpu"), **size)
        assert found.tokens_per_second > 0
        assert found.case.name in gpu.row(found)


def test_the_forms_benchmark_sets_measurements_beside_predictions(load: Callable[[str], Any], tmp_path: Path) -> None:
    forms = load("forms")
    artifact = forms.repeated_artifact(forms.SHAPES["toy"], 4, tmp_path / "toy.tokenbound")
    options = {"threads": torch.get_num_threads(), "batch": 2, "length": 32, "windows": 3}
    predicted = forms.predict(artifact, **options)
    found = forms.measure(artifact, "packed", **options)
    assert found.tokens_per_second > 0
    shown = forms.table("toy", 4, options, [(found, predicted["packed"])])
    assert "| packed |" in shown


def test_gpt2_keeps_its_products_in_matrices_too(load: Callable[[str], Any]) -> None:
    shape = {"model_type": "gpt2", "n_layer": 3, "n_embd": 8, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    expected = 2 * (3 * 12 * 8 * 8 + 8 * 40) + 2 * 16 * 8 * 3
    assert load("gpu").operations_per_token(random_model(shape, torch.float32), 16) == expected


def test_the_head_benchmark_measures_less_memory_for_chunks(load: Callable[[str], Any]) -> None:
    head = load("head")
    hidden, weight = torch.randn(1024, 8), torch.randn(3000, 8)
    targets = torch.randint(3000, (1024,))
    whole = head.peak_bytes(lambda: hidden @ weight.t())
    assert whole == 4 * 1024 * 3000
    chunked = head.peak_bytes(lambda: head.token_statistics(hidden, weight, None, targets))
    assert chunked < whole / 2
    assert head.seconds(lambda: None, torch.device("cpu")) >= 0


def test_the_layers_benchmark_counts_multiplications(load: Callable[[str], Any]) -> None:
    rows = load("layers").measure(16, 8, torch.device("cpu"), 1)
    found = {row["layer"]: (row["parameters"], row["operations"]) for row in rows}
    assert found == {
        "dense": (256, 1.0),
        "monarch, 4 blocks": (128, 0.5),
        "kronecker, 1 terms": (32, 0.5),  # 4 * 4 * 4 for each of its two products
        "kronecker, 4 terms": (128, 2.0),
    }
    assert rows[0]["both_ratio"] == 1


def test_synthetic_losses_are_uneven_and_repeatable(load: Callable[[str], Any]) -> None:
    scorer = load("scale").SyntheticScorer(None)
    rng = np.random.default_rng(0)
    row = {
        "shard": 3,
        "windows": b"",
        "mask": np.ones((20, 512), bool),
        "targets": rng.integers(0, 50_257, (20, 512)),
        "position": np.broadcast_to(np.arange(512), (20, 512)),
        "document": np.broadcast_to(np.arange(20)[:, None], (20, 512)),
    }
    first, again = scorer(row), scorer(row)
    assert (first["nll"] == again["nll"]).all()
    assert len(np.unique(first["nll"])) > 0.99 * first["nll"].size
    assert 2 < first["nll"].mean() < 8
    assert first["entropy"].max() < np.log(50_257)
    same_token = {**row, "targets": np.zeros((20, 512), int)}
    assert scorer(same_token)["nll"].std() > 1


def test_the_harness_pads_to_the_longest_of_its_batch_and_we_to_the_window(load: Callable[[str], Any]) -> None:
    found = load("harness").positions_per_token
    assert found(np.array([100, 200])) == pytest.approx((2 * 200 / 300, 2 * 512 / 300))
    assert found(np.array([100, 600, 512])) == pytest.approx((4 * 512 / 1212, 4 * 512 / 1212))
    nine = np.array([512] * 8 + [3])
    assert found(nine) == pytest.approx((1.0, 9 * 512 / (8 * 512 + 3)))


def test_documents_have_realistic_lengths(load: Callable[[str], Any], tmp_path: Path) -> None:
    harness = load("harness")
    case = harness.write_case(tmp_path, TINY, 300_000)
    lengths = harness.lengths(case)
    assert lengths.sum() == case.tokens >= 300_000
    assert 450 < np.median(lengths) < 750
    assert 0.3 < (lengths <= 512).mean() < 0.6


def test_the_rate_leaves_the_first_wave_out(load: Callable[[str], Any], tmp_path: Path) -> None:
    bench = load("bench")
    run, tokens = RunDirectory(str(tmp_path)), 100
    for shard in range(4):
        nll = np.ones(tokens, np.float32)
        losses = Losses(
            window_id=np.array([shard]),
            offsets=np.array([0, tokens]),
            unscored=np.zeros(1, bool),
            document=np.zeros(tokens, np.int64),
            position=np.arange(tokens, dtype=np.int32),
            nll=nll,
            entropy=nll,
            rank=np.zeros(tokens, np.int32),
            token=None,
        )
        run.commit(shard, losses, {}, "f")
        os.utime(tmp_path / f"shards/{shard:05d}.json", (10.0 + shard, 10.0 + shard))
    assert bench.commit_rate(tmp_path, 2) == pytest.approx(2 * tokens / 2.0)


def test_large_models_are_made_tensor_by_tensor(load: Callable[[str], Any], tmp_path: Path) -> None:
    big = load("big_models")
    weights = {
        name: sum(math.prod(size) for _, size in big.headers(shape).values()) for name, shape in big.SHAPES.items()
    }
    assert weights["tinyllama"] == 1_100_048_384
    assert weights["llama2-7b"] == 6_738_415_616
    assert weights["llama2-70b"] == 68_976_648_192
    shape = big.SHAPES["toy"]
    found = read_checkpoint(big.write_checkpoint(shape, tmp_path / "toy")).tensors
    assert found.keys() == big.headers(shape).keys()
    drawn = {name: tensor for name, tensor in found.items() if tensor.ndim == 2}
    assert all(float(tensor.float().std()) == pytest.approx(0.02, rel=0.05) for tensor in drawn.values())
    assert len({tensor.float().sum().item() for tensor in drawn.values()}) == len(drawn), "no two are the same"


def test_results_of_a_model_take_the_place_of_older_ones(load: Callable[[str], Any], tmp_path: Path) -> None:
    big, path = load("big_models"), tmp_path / "results.md"
    for seconds in (10.0, 20.0):
        peaks = {
            "evaluate": big.Peak(seconds, 3.0, 2_500_000_000, "driver"),
            "verify": big.Peak(1.0, 1.0, 10**9, "driver"),
        }
        big.record(big.Measured("toy, 4 bit, streamed", 10**6, 64, peaks), path)
    lines = path.read_text().splitlines()
    head = next(line for line in lines if line.startswith("| model |"))
    (row,) = [line for line in lines if line.startswith("| toy")]
    assert row.count("|") == head.count("|")
    assert "| 20 | 3 | 2.50 |" in row


def test_a_run_has_one_row_among_the_real_models(load: Callable[[str], Any], tmp_path: Path) -> None:
    table, run = tmp_path / "real_models.md", HERE.parent / "golden/full"
    real_models = load("real_models")
    real_models.add([run], table)
    real_models.add([run, run], table)
    head, line = table.read_text().splitlines()[-3::2]
    assert len(line.split(" | ")) == len(head.split(" | "))
    assert table.read_text().count("\n| ") == 2
    certificate = Certificate.load(run / "certificate.json")
    assert f"| {certificate.artifact_bytes:,} |" in line
    assert f"| {certificate.mean_nll_bits:.3f} |" in line
