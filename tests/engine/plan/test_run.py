"""The plan of a run: exact where it can be, measured where it must be, and silent about what it cannot know."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from gguf_support import llama, write_llama
from layouts_support import gptq
from quantized_support import save_with_layout
from training_support import artifact_with_head

from tokenbound import cli
from tokenbound.bounds.claim import Claim
from tokenbound.certificate.derived import best_loss_line
from tokenbound.compression.artifact import encode_artifact
from tokenbound.config.compress import KfacSettings, LosslessSettings, RoundToNearestSettings
from tokenbound.config.family import MarkovFamily
from tokenbound.config.run import RunConfig, validate
from tokenbound.demo import demo_artifact
from tokenbound.engine.compress.predicted_bound import lines_if_all
from tokenbound.engine.evaluate.preparation import prepare
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.engine.plan import run as planning
from tokenbound.engine.plan.run import plan_run, tokens_to_beat_guessing
from tokenbound.engine.train.ngrams import encode_markov
from tokenbound.errors import InputError
from tokenbound.models.checkpoint import read_checkpoint
from tokenbound.training.ngram_fit import build_grams, count_ngrams, fit_tree

pytestmark = pytest.mark.usefixtures("ray_session")
Tree = Callable[..., dict[str, Any]]


def config_of(tree: dict[str, Any]) -> RunConfig:
    return validate(RunConfig, tree, origin="test")


def test_a_plan_foretells_the_run_and_writes_none(run_tree: Tree) -> None:
    config = config_of(run_tree())
    plan = plan_run(config, probe_seconds=0.2)
    assert not Path(config.how.output).exists()
    prepared = prepare(config)
    assert plan.work.num_tokens == plan.work.tokens_to_score == prepared.plan.num_tokens
    assert plan.work.num_shards == len(prepared.shards(None))
    assert plan.hypothesis.artifact_bytes == prepared.artifact.num_bytes
    assert plan.hypothesis.code_length_is == "exact"
    assert plan.replicas.tokens_per_second is not None
    assert plan.replicas.hours is not None
    assert plan.replicas.hours * 3600 * plan.replicas.tokens_per_second * plan.replicas.count == pytest.approx(
        plan.work.tokens_to_score
    )
    assert plan.outlook.loss_bits == pytest.approx(8, abs=0.3)  # random weights on bytes
    assert plan.outlook.predicted_bound_bits is not None
    assert plan.outlook.predicted_bound_bits > plan.outlook.loss_bits
    assert plan.outlook.perfect_tokens_to_beat_guessing is not None
    assert plan.outlook.tokens_to_beat_guessing is None or (
        plan.work.num_tokens < plan.outlook.perfect_tokens_to_beat_guessing < plan.outlook.tokens_to_beat_guessing
    )
    assert any("random tokens" in note for note in plan.notes)


@pytest.mark.slow
def test_a_plan_foretells_the_line_of_decisions(run_tree: Tree) -> None:
    """Every window of a small corpus is probed, so that the prediction is what the run will print."""
    windows = {"length": 32, "context": "document", "batch": 4}
    config = config_of(run_tree(windows=windows, bound={"methods": ["freedman", "bits"]}))
    plan = plan_run(config, probe_seconds=60)
    assert plan.outlook.probed_tokens == plan.work.num_tokens
    certificate = evaluate(config)
    [line] = [line for line in certificate.bounds if line["method"] == "bits"]
    assert plan.outlook.predicted_beside == {"bits": pytest.approx(line["value"], rel=1e-6)}
    assert plan.outlook.predicted_bound_bits == pytest.approx(certificate.bound_bits, rel=1e-3)


def test_a_sample_is_planned_as_it_will_be_drawn(run_tree: Tree) -> None:
    windows = {"length": 32, "context": "document", "batch": 4, "shard_tokens": 640}
    config = config_of(run_tree(windows=windows, sample={"windows": 60, "pilot_windows": 20}))
    plan = plan_run(config, probe_seconds=0)
    prepared = prepare(config)
    assert plan.work.num_shards == len(prepared.shards(60))
    assert plan.work.tokens_to_score < plan.work.num_tokens
    assert plan.replicas.tokens_per_second is plan.outlook.loss_bits is None
    assert any("slack" in note for note in plan.notes)


def test_a_shape_without_weights_is_planned(run_tree: Tree, tmp_path: Path) -> None:
    shape = {"model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps({**shape, **heads}))
    config = config_of(run_tree(model={"checkpoint": str(tmp_path), "dtype": "bfloat16"}))
    plan = plan_run(config, probe_seconds=0, bits_per_weight=2.0, gpu_bytes=80 * 2**30)
    assert plan.hypothesis.code_length_is == "assumed"
    assert plan.hypothesis.code_length_bits == pytest.approx(2 * 70.55e9, rel=1e-3)
    assert plan.replicas.gpus_each == 2
    # Two GPUs of a replica work in turns; each of its windows is computed whole.
    positions = plan.work.num_windows * config.what.windows.length
    expected_h = 2 * 2 * 70.55e9 * positions / 156e12 / 3600
    assert plan.replicas.assumed_gpu_hours == pytest.approx(expected_h, rel=1e-3)
    held = {form.form: form.device_bytes for form in plan.replicas.forms}
    assert plan.replicas.form != "dense"  # if this machine does not have half a terabyte
    assert held["streamed"] < 15e9 < 20e9 < held["packed"] < 40e9 < 400e9 < held["dense"]
    assert plan.outlook.tokens_to_beat_guessing is None
    assert plan.outlook.perfect_tokens_to_beat_guessing is not None
    assert plan.outlook.perfect_tokens_to_beat_guessing > 10**9
    unknown = plan_run(config, probe_seconds=0)
    assert unknown.hypothesis.code_length_bits is None
    assert [form.form for form in unknown.replicas.forms] == ["dense", "streamed"]


def test_a_small_shape_without_weights_is_timed_with_random_ones(
    run_tree: Tree, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    (tmp_path / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    plan = plan_run(config_of(run_tree(model={"checkpoint": str(tmp_path)})), probe_seconds=0.1)
    assert plan.replicas.tokens_per_second is not None
    assert plan.outlook.loss_bits is None
    assert plan.outlook.probed_tokens == 0
    assert any("random weights" in note for note in plan.notes)


def test_a_large_checkpoint_is_weighed_by_a_sample(run_tree: Tree, tiny_checkpoint: Path) -> None:
    method = {"method": "rtn", "step": 0.5}
    config = config_of(run_tree(model={"checkpoint": str(tiny_checkpoint), "compress": method}))
    exact = plan_run(config, probe_seconds=0).hypothesis
    estimated = plan_run(config, probe_seconds=0, exact_weights=0).hypothesis
    assert estimated.code_length_is == "estimated"
    assert estimated.artifact_bytes == pytest.approx(exact.artifact_bytes, rel=0.25)
    assert planning._coded_sample(str(tiny_checkpoint), KfacSettings()) is None
    tried = (RoundToNearestSettings(step=0.5), RoundToNearestSettings(step=0.125), LosslessSettings())
    samples = [planning._coded_sample(str(tiny_checkpoint), settings) for settings in tried]
    weights = sum(tensor.numel() for tensor in samples[0][1])
    coarser, finer, lossless = (8 * sample[0] / weights for sample in samples)
    assert coarser < finer < lossless < 33


def test_a_large_quantized_checkpoint_is_weighed_by_its_bytes(
    run_tree: Tree, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    settings = {"quant_method": "gptq", "bits": 4}
    save_with_layout(tiny_checkpoint, tmp_path / "q", settings, lambda weights: gptq(weights, 4, 16))
    config = config_of(run_tree(model={"checkpoint": str(tmp_path / "q")}))
    exact = plan_run(config, probe_seconds=0).hypothesis
    estimated = plan_run(config, probe_seconds=0, exact_weights=0).hypothesis
    assert estimated.code_length_is == "estimated"
    assert estimated.artifact_bytes == pytest.approx(exact.artifact_bytes, rel=0.25)


def test_a_gguf_file_is_planned_as_other_checkpoints_are(run_tree: Tree, tmp_path: Path) -> None:
    model = llama(hidden_size=256, intermediate_size=256, num_hidden_layers=4)
    shape = {"embedding_length": 256, "feed_forward_length": 256, "block_count": 4, "rope.dimension_count": 64}
    path = write_llama(tmp_path / "m.gguf", model, "Q8_0", **shape)
    for method, compress in (
        (LosslessSettings(), None),
        (RoundToNearestSettings(step=0.25), {"method": "rtn", "step": 0.25}),
    ):
        config = config_of(run_tree(model={"checkpoint": str(path), "compress": compress}))
        estimated = plan_run(config, probe_seconds=0, exact_weights=0).hypothesis
        checkpoint = read_checkpoint(path, dense=not method.is_exact)
        exact = len(encode_artifact(checkpoint.architecture, checkpoint.tensors, method))
        assert estimated.code_length_is == "estimated"
        assert estimated.artifact_bytes == pytest.approx(exact, rel=0.1)


def test_the_m_that_beats_guessing_is_the_smallest() -> None:
    rng = np.random.default_rng(0)
    losses = (rng.gamma(1, 1.2, 2000), rng.gamma(1, 1.2, 2000).clip(0, 5), np.zeros(2000, np.int32))
    claim = Claim(257, 257, 50_000, 0.05, 2000, what_if=True)
    needed = tokens_to_beat_guessing(claim, losses)
    assert needed is not None
    for tokens, beats in ((needed, True), (int(0.97 * needed), False)):
        line = best_loss_line(lines_if_all(replace(claim, num_tokens=tokens), *losses))
        assert line is not None
        assert line.vacuous is not beats
    hopeless = (np.full(2000, 9.0), np.full(2000, 5.0), np.full(2000, 200, np.int32))
    assert tokens_to_beat_guessing(claim, hopeless) is None


def test_the_command_speaks_to_people_and_programs(
    run_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_tree()))
    monkeypatch.setattr("sys.argv", ["tokenbound", "plan", str(path), "--probe-seconds", "0.1"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    assert "tokens/s" in shown
    assert "nothing above is a bound" in shown
    asked = ("to score", "code length", "a perfect model", "a replica needs", "on GPUs", "GPU hours", "speed here")
    asked += ("held dense", "held packed", "held streamed", "how.weights")
    for item in (
        *asked,
        "time",
        "guessing",
        "loss",
        "predicted",
        "predicted bits",
        "shards",
        "it beats guessing",
        "(exact)",
    ):
        assert item in shown, item
    monkeypatch.setattr("sys.argv", ["tokenbound", "plan", str(path), "--probe-seconds", "0", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    tree = json.loads(capsys.readouterr().out)
    assert tree["work"]["num_tokens"] > 0
    assert tree["replicas"]["tokens_per_second"] is None


def test_what_the_run_would_refuse_the_plan_refuses(run_tree: Tree) -> None:
    with pytest.raises(InputError, match="64 positions"):
        plan_run(config_of(run_tree(windows={"length": 65, "context": "packed"})))


def test_an_artifact_of_any_kind_is_planned(run_tree: Tree, tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = tmp_path / "model.tokenbound"
    for data, words in ((artifact_with_head(tiny_checkpoint), "smoothing head"), (bigrams(), "random tokens")):
        path.write_bytes(data)
        plan = plan_run(config_of(run_tree(model={"artifact": str(path)})), probe_seconds=0.1)
        assert plan.hypothesis.artifact_bytes == len(data)
        assert plan.replicas.count > 0
        assert plan.replicas.weights_bytes < plan.replicas.total_bytes
        assert plan.outlook.loss_bits is not None
        assert any(words in note for note in plan.notes)
    assert plan.hypothesis.parameters == 2 * (1 + 17) + 17 + 17
    declared = {"base": str(tiny_checkpoint), "base_is_independent": "random"}
    with pytest.raises(InputError, match=r"what\.model\.base: .* cannot be planned"):
        plan_run(config_of(run_tree(model={"artifact": str(path), **declared})))


def bigrams() -> bytes:
    """Seventeen bytes that follow each other in a ring."""
    ids = (np.arange(5000) % 17 + 65).astype(np.uint16)
    fitted = fit_tree(build_grams(count_ngrams(ids, 1, 257), 1, 257), 257, 0.01)
    return encode_markov(fitted, MarkovFamily(order=1))


def test_a_streamed_run_is_timed_by_models_of_one_and_two_layers(run_tree: Tree, tmp_path: Path) -> None:
    path = tmp_path / "model.tokenbound"
    path.write_bytes(demo_artifact())
    tree = run_tree(model={"artifact": str(path)})
    tree["how"]["weights"] = "streamed"
    plan = plan_run(config_of(tree), probe_seconds=0.1)
    speeds = {form.form: form.tokens_per_second for form in plan.replicas.forms}
    assert plan.replicas.form == "streamed"
    assert plan.replicas.tokens_per_second == speeds["streamed"]
    assert None not in speeds.values()
    assert plan.outlook.loss_bits is None
    assert any("two layers" in note for note in plan.notes)
