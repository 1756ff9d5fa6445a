"""Pretraining through Ray Train, and compression on Ray, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from here_support import Killed

from tokenbound.compression.artifact import decode_artifact, encode_artifact
from tokenbound.compression.regrid import artifact_grids
from tokenbound.config.compress import AutoSettings, KfacSettings, LosslessSettings, RoundToNearestSettings
from tokenbound.config.run import PretrainConfig, RunConfig, validate
from tokenbound.engine.cluster.executor import use_executor
from tokenbound.engine.compress.run import compress_checkpoint, parts_of
from tokenbound.engine.train.run import Trained, pretrain
from tokenbound.errors import InputError, MismatchError
from tokenbound.models.checkpoint import read_checkpoint
from tokenbound.models.generate import generate_ids

pytestmark = pytest.mark.usefixtures("ray_session")

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def config(tmp_path: Path, text_folder: Path, **training: Any) -> PretrainConfig:
    tree = {
        "what": {
            "model": MODEL,
            "corpus": {
                "source": "text",
                "paths": [str(text_folder)],
                "tokenizer": "bytes",
                "tokenizer_is": "given",
                "add_bos": False,
                "add_eos": True,
            },
            "training": {"tokens": 4096, "window": 32, "batch": 4, "optimizer": "muon", "lr": 0.02, **training},
            "compress": {"method": "rtn"},
        },
        "how": {"output": str(tmp_path / "out"), "progress_interval_s": 0.1},
    }
    return validate(PretrainConfig, tree, origin="test")


def test_a_model_is_trained_encoded_and_speaks(tmp_path: Path, text_folder: Path) -> None:
    chosen = config(tmp_path, text_folder, seed=3)
    trained = pretrain(chosen.model_copy(update={"how": chosen.how.model_copy(update={"log": ("tensorboard",)})}))
    assert 0 < trained.loss_bits < 8
    last = json.loads((tmp_path / "out/progress.jsonl").read_text().splitlines()[-1])
    assert last["step"] == last["total_steps"] == 4096 // (4 * 32)
    assert last["loss_bits"] == trained.loss_bits
    assert last["tokens_per_s"] > 0
    assert last["seconds_left"] == 0
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["what"]["training"]["seed"] == 3
    assert list((tmp_path / "out/checkpoints/tensorboard").glob("events.*"))
    data = Path(trained.artifact).read_bytes()
    assert len(data) == trained.artifact_bytes
    assert decode_artifact(data).architecture["model_type"] == "llama"
    first = list(generate_ids(data, [65], max_new_tokens=8, seed=1))
    assert first == list(generate_ids(data, [65], max_new_tokens=8, seed=1))
    assert len(first) == 8
    assert list(generate_ids(data, [65], max_new_tokens=3, temperature=0)) == list(
        generate_ids(data, [65], max_new_tokens=3, temperature=0, seed=9)
    )
    for name in ("trained.json", "float.json"):  # killed behind the last checkpoint: nothing is left to train
        (tmp_path / "out" / name).unlink()
    assert pretrain(chosen) == trained
    assert Path(trained.artifact).read_bytes() == data
    assert json.loads((tmp_path / "out/progress.jsonl").read_text().splitlines()[-1]) == last
    with pytest.raises(MismatchError, match="another config"):
        pretrain(config(tmp_path, text_folder, seed=5))


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_artifact(tmp_path: Path, text_folder: Path) -> None:
    interval_s, steps, found = 1.0, 5000, []
    training = {"tokens": 4 * 32 * steps, "optimizer": "muon"}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        tree = config(tmp_path / name, text_folder, **training).model_dump(mode="json")
        tree["what"]["model"]["attention_dropout"] = 0.1
        tree["how"] |= {"checkpoint_interval_s": interval_s, "progress_interval_s": 0.1, "threads": 1}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        log = tmp_path / name / "out/progress.jsonl"
        if name == "killed":
            kill_when(start(path), lambda log=log: spanned_s(lines(log)) > 5.0)
            before, killed = lines(log), time.time()
        assert start(path).wait(900) == 0
        found.append([(tmp_path / name / "out" / file).read_bytes() for file in ("model.tokenbound", "trained.json")])
    assert found[0][0] == found[1][0]
    after = lines(log)[len(before) :]
    assert after[0]["step"] < steps
    kept = [line["step"] for line in before if line["time"] < killed - interval_s - SAVING_S]
    assert after[0]["step"] > kept[-1]
    losses = [json.loads(each[1])["loss_bits"] for each in found]
    assert losses[0] == losses[1]


SAVING_S = 2.0
"""A checkpoint counts once it is written and Ray Train has noted it."""


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def spanned_s(events: list[dict[str, Any]]) -> float:
    return events[-1]["time"] - events[0]["time"] if events else 0.0


def start(path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tokenbound", "pretrain", str(path)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)


def kill_when(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    """SIGKILL to every process of it; what it had started in sessions of their own dies with its cluster."""
    deadline = time.monotonic() + 600
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.usefixtures("trained_here")
def test_an_artifact_is_finished_on_its_grid(tmp_path: Path, text_folder: Path, tiny_checkpoint: Path) -> None:
    plain = config(tmp_path, text_folder)
    finish = {"tokens": 2048, "window": 32, "batch": 4, "lr": 0.01}
    what = {**plain.what.model_dump(), "model": {}, "start": str(tiny_checkpoint), "training": None, "finish": finish}
    chosen = validate(PretrainConfig, {"what": what, "how": plain.how.model_dump()}, origin="test")
    trained = pretrain(chosen)
    before = (tmp_path / "out" / "compressed.tokenbound").read_bytes()
    after = Path(trained.artifact).read_bytes()
    assert before != after
    assert decode_artifact(before).architecture == decode_artifact(after).architecture
    assert trained.artifact_bytes == len(after)
    (tmp_path / "out" / "trained.json").unlink()  # killed before the last step: nothing is trained twice
    assert pretrain(chosen) == trained
    for changes in (
        {"start": None},
        {"training": None, "finish": None},
        {"compress": {"method": "lossless"}},
        {"artifact": trained.artifact},
    ):
        with pytest.raises(InputError):
            validate(PretrainConfig, {"what": {**what, **changes}, "how": plain.how.model_dump()}, origin="test")


@pytest.mark.usefixtures("trained_here")
def test_a_finished_artifact_is_trained_further(tmp_path: Path, text_folder: Path, tiny_checkpoint: Path) -> None:
    """On steps an octave wider it becomes smaller."""
    plain, path = config(tmp_path, text_folder), tmp_path / "start.tokenbound"
    checkpoint = read_checkpoint(str(tiny_checkpoint))
    path.write_bytes(encode_artifact(checkpoint.architecture, checkpoint.tensors, RoundToNearestSettings(step=0.3)))
    finish = {"tokens": 2048, "window": 32, "batch": 4, "lr": 1e-3, "embedding_lr": 1e-3, "coarser": {"weight": 2}}
    nothing = {"model": {}, "training": None, "compress": None}

    def finished(artifact: Path) -> Trained:
        what = {**plain.what.model_dump(), **nothing, "artifact": str(artifact), "finish": finish}
        how = {**plain.how.model_dump(), "output": str(tmp_path / artifact.stem)}
        return pretrain(validate(PretrainConfig, {"what": what, "how": how}, origin="test"))

    trained = finished(path)
    start, end = path.read_bytes(), Path(trained.artifact).read_bytes()
    assert len(end) < 0.8 * len(start)
    assert artifact_grids(start).keys() == artifact_grids(end).keys()
    assert len(list(generate_ids(end, [65], max_new_tokens=4))) == 4
    exact = tmp_path / "exact.tokenbound"
    exact.write_bytes(encode_artifact(checkpoint.architecture, checkpoint.tensors, LosslessSettings()))
    for wrong in (exact, tmp_path / "absent.tokenbound"):
        with pytest.raises(InputError, match=r"what\.artifact"):
            finished(wrong)


@pytest.mark.usefixtures("trained_here", "compressed_here")
def test_a_family_is_trained_encoded_and_speaks(tmp_path: Path, text_folder: Path) -> None:
    plain = config(tmp_path, text_folder, tokens=1024)
    family = {"kind": "sublora", "rank": 2, "dimension": 64}
    what = {**plain.what.model_dump(), "family": family, "compress": {"method": "kfac", "rate": 0.1}}
    what["finish"] = {"tokens": 256, "window": 32, "batch": 4, "nats_per_bit": 1e-6}
    trained = pretrain(validate(PretrainConfig, {"what": what, "how": plain.how.model_dump()}, origin="test"))
    data = Path(trained.artifact).read_bytes()
    assert decode_artifact(data).architecture["tokenbound_family"]["dimension"] == 64
    assert len(list(generate_ids(data, [65], max_new_tokens=4))) == 4


@pytest.mark.slow
def test_two_workers_train_one_model(tmp_path: Path, text_folder: Path) -> None:
    """Data parallel on processors, as on GPUs: twice the tokens for each step, checkpoints by the main worker alone."""
    tree = config(tmp_path, text_folder, tokens=2048).model_dump(mode="json")
    tree["how"] |= {"workers": 2, "threads": 1, "checkpoint_interval_s": 0.1}
    trained = pretrain(validate(PretrainConfig, tree, origin="test"))
    last = lines(tmp_path / "out/progress.jsonl")[-1]
    assert last["step"] == last["total_steps"] == 2048 // (2 * 4 * 32)
    assert last["tokens"] == 2048
    assert 0 < trained.loss_bits < 8


def test_shapes_are_checked_before_the_first_step(tmp_path: Path, text_folder: Path) -> None:
    with pytest.raises(InputError, match="64 positions"):
        pretrain(config(tmp_path, text_folder, window=65))


@pytest.mark.usefixtures("compressed_here")
def test_calibrated_methods_and_the_rate_search(run_tree: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    run, out = validate(RunConfig, run_tree(), origin="test"), str(tmp_path / "a.tokenbound")
    coarse = compress_checkpoint(str(tiny_checkpoint), KfacSettings(rate=1.0), run, out=out)
    fine = compress_checkpoint(str(tiny_checkpoint), KfacSettings(rate=1e-2), run, out=out)
    assert coarse.num_bytes < fine.num_bytes
    auto = compress_checkpoint(str(tiny_checkpoint), AutoSettings(low=1e-2, high=1.0, tries=3), run, out=out)
    assert auto.settings["method"] == "kfac"
    assert auto.read() == Path(out).read_bytes()
    with pytest.raises(InputError, match="--config"):
        compress_checkpoint(str(tiny_checkpoint), KfacSettings(), None, out=out)


def test_a_killed_compression_goes_on(run_tree: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    run, out = validate(RunConfig, run_tree(), origin="test"), str(tmp_path / "a.tokenbound")
    work = Path(parts_of(out))

    def compressed(rate: float = 0.1, after: int = 1 << 30) -> tuple[bytes, list[str]]:
        killed = Killed(after=after)
        with use_executor(killed):
            data = compress_checkpoint(str(tiny_checkpoint), KfacSettings(rate=rate), run, out=out).read()
        return data, [each for each in killed.given if isinstance(each, str)]  # tensors, not files of the corpus

    first, names = compressed()
    assert not work.exists()
    with pytest.raises(KeyboardInterrupt):
        compressed(after=4)
    kept = sorted(work.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(kept) == 4 + 4, "the parts of the calibration, and four tensors"
    kept[-1].unlink()
    kept[-2].write_bytes(b"torn")
    assert compressed() == (first, names[2:])
    assert compressed(0.2)[0] != first
