"""Pretraining on Ray Train: one worker on a laptop, many GPUs on a cluster, the same loop.

Ray Train keeps the checkpoints and restarts workers; started again with the same output, a run goes on from its
last checkpoint.
"""

from __future__ import annotations

import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from tokenbound.config import PretrainConfig, WindowsConfig, dump_config
from tokenbound.corpus.prepared import PreparedCorpus
from tokenbound.engine.cluster import cluster_resources, plain_errors, ray_session
from tokenbound.engine.compress import counted_tokenizer, encode_checkpoint, text_of
from tokenbound.engine.progress import describe_speed
from tokenbound.engine.smoothing import add_smoothing_head
from tokenbound.engine.tokens import CorpusStream, open_corpus
from tokenbound.errors import InputError, MismatchError, TokenboundError
from tokenbound.models.structured.settings import MarkovFamily
from tokenbound.store.run import RunDirectory, canonical_json, sha256_hex

logger = logging.getLogger(__name__)

STATE = "state.pt"
FINISHED = "trained.json"
MODEL_ARTIFACT = "model.tokenbound"


@dataclass(frozen=True)
class Trained:
    """What a finished training run left behind."""

    model: str
    """Float model in Hugging Face format; of a family only what is trained."""
    artifact: str
    """The encoded model."""
    artifact_bytes: int
    loss_bits: float
    """Smoothed training loss at the end, bits per token."""
    trained_parameters: int
    """Numbers that training chose."""


def pretrain(config: PretrainConfig) -> Trained:
    """Train the configured model, write it in Hugging Face format and as an artifact; a finished run is returned.

    Raises:
        InputError: the config, the corpus or the model shape cannot be used, or training diverged.
        MismatchError: the output holds a run of another config.
    """
    output = Path(config.how.output).absolute()
    _claim_output(config, output)
    if (output / FINISHED).exists():
        return Trained(**json.loads((output / FINISHED).read_text()))
    with ray_session(config.how.ray_address):
        corpus = open_corpus(config.what.corpus, output=config.how.output, cache=config.how.cache)
        if isinstance(config.what.family, MarkovFamily):
            return _finish(output, _count(config, corpus, output))
        architecture = _architecture(config, corpus)
        parameters = _check(config, architecture, corpus)
        result = _fit(config, architecture, corpus, output)
        trained = _export(config, architecture, corpus, result, output, parameters)
    return _finish(output, trained)


def _finish(output: Path, trained: Trained) -> Trained:
    RunDirectory(str(output)).write_json(FINISHED, asdict(trained))
    return trained


def _count(config: PretrainConfig, corpus: PreparedCorpus, output: Path) -> Trained:
    """Count n-grams in place of training: there is no float model beside the artifact."""
    from tokenbound.engine.markov import fit_markov

    family, text = config.what.family, text_of(corpus, WindowsConfig(context="packed"))
    assert isinstance(family, MarkovFamily)
    vocab_size, tokenizer = corpus.manifest.rule.max_id + 1, counted_tokenizer(config.what.corpus)
    data, fitted = fit_markov(corpus, family, vocab_size, text, tokenizer=tokenizer)
    RunDirectory(str(output)).write(MODEL_ARTIFACT, data)
    path = str(output / MODEL_ARTIFACT)
    return Trained(path, path, len(data), fitted.loss_bits, fitted.tree.num_levels)


def _claim_output(config: PretrainConfig, output: Path) -> None:
    """An output directory belongs to one config: resuming another's checkpoint would be silent nonsense."""
    identity = sha256_hex(canonical_json(config.what.model_dump(mode="json")))
    marker = output / "training.json"
    if marker.exists() and json.loads(marker.read_text())["sha256"] != identity:
        raise MismatchError(f"how.output {output} holds a training run of another config; choose another directory")
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    marker.write_text(json.dumps({"sha256": identity}))


def _architecture(config: PretrainConfig, corpus: PreparedCorpus) -> dict[str, Any]:
    rule = corpus.manifest.rule
    defaults = {
        "vocab_size": rule.max_id + 1,
        "bos_token_id": rule.bos_id,
        "eos_token_id": rule.eos_id,
        "use_cache": False,
    }
    return {**defaults, **config.what.model}


def _check(config: PretrainConfig, architecture: dict[str, Any], corpus: PreparedCorpus) -> int:
    """Refuse before the first step what cannot be trained; how many parameters are trained."""
    if "model_type" not in architecture:
        raise InputError("what.model needs `model_type`, e.g. llama")
    if corpus.manifest.rule.max_id >= architecture["vocab_size"]:
        raise InputError(
            f"what.model.vocab_size {architecture['vocab_size']} is too small for ids up to "
            f"{corpus.manifest.rule.max_id}"
        )
    positions = architecture.get("max_position_embeddings") or architecture.get("n_positions")
    if positions is not None and config.what.network_training.window > positions:
        raise InputError(
            f"what.training.window {config.what.network_training.window} exceeds the model's {positions} positions"
        )
    if corpus.manifest.tokens <= config.what.network_training.window:
        raise InputError(
            f"the corpus has {corpus.manifest.tokens} tokens, fewer than what.training.window + 1 = "
            f"{config.what.network_training.window + 1}"
        )
    return _check_family(config, architecture)


def _check_family(config: PretrainConfig, architecture: dict[str, Any]) -> int:
    """A family that does not fit is refused before a worker starts."""
    from tokenbound.models.structured.build import count_trained

    trained = count_trained(architecture, config.what.family)
    logger.info("family %s: %d trained parameters", config.what.family.kind, trained)
    return trained


def _build_model(architecture: dict[str, Any], family: Any) -> Any:
    """A fresh model in its trained form, random from torch's present seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tokenbound.models.structured.registry import attach_family

    shape = dict(architecture)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape))
    attach_family(model, family)
    return model


def _fit(config: PretrainConfig, architecture: dict[str, Any], corpus: PreparedCorpus, output: Path) -> Any:
    resources = cluster_resources()
    use_gpu = config.how.device == "cuda" or (config.how.device == "auto" and resources.gpus > 0)
    share = max(1, (resources.cpus - 1 if resources.cpus > 2 else resources.cpus) // config.how.workers)
    cpus = share if config.how.threads == "auto" else config.how.threads
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "architecture": architecture,
            "family": config.what.family,
            "training": config.what.network_training.model_dump(mode="json"),
            "corpus_root": corpus.root,
            "output": str(output),
            "threads": cpus,
            "cuda": use_gpu,
            "checkpoint_interval_s": config.how.checkpoint_interval_s,
            "progress_interval_s": config.how.progress_interval_s,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.how.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": max(0.5, cpus - 0.5), **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=str(output),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(max_failures=2),
        ),
    )
    with _progress_lines(output), plain_errors():
        return trainer.fit()


def _worker(settings: dict[str, Any]) -> None:
    """One training worker; runs in its own process."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from tokenbound.config import TrainingConfig
    from tokenbound.training.loop import StepReport, train

    if not settings["cuda"]:
        torch.set_num_threads(settings["threads"])
    training = TrainingConfig(**settings["training"])
    set_seed(training.seed)
    model = _build_model(settings["architecture"], settings["family"])
    accelerator = Accelerator(cpu=not settings["cuda"], mixed_precision="bf16" if settings["cuda"] else "no")
    run, last = RunDirectory(settings["output"]), [time.monotonic()]
    metrics: dict[str, Any] = {}

    def on_step(step: StepReport) -> None:
        metrics.update(asdict(step))
        due = time.monotonic() - last[0] >= settings["progress_interval_s"] or step.step == step.total_steps
        if accelerator.is_main_process and due:
            last[0] = time.monotonic()
            run.log_progress(event="step", **metrics)

    def save(write: Callable[[Path], None]) -> None:
        if not accelerator.is_main_process:
            ray.train.report(dict(metrics))
            return
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / STATE)
            ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(folder))

    checkpoint = ray.train.get_checkpoint()
    options: dict[str, Any] = {
        "on_step": on_step,
        "save": save,
        "checkpoint_interval_s": settings["checkpoint_interval_s"],
        "accelerator": accelerator,
    }
    stream = CorpusStream(PreparedCorpus(settings["corpus_root"]))
    if checkpoint is None:
        train(model, stream, training, **options)
        return
    with checkpoint.as_directory() as folder:
        train(model, stream, training, resume_from=Path(folder) / STATE, **options)


@contextmanager
def _progress_lines(output: Path) -> Iterator[None]:
    """Log what the worker appends to `progress.jsonl`."""
    path, done = output / "progress.jsonl", threading.Event()
    start = path.stat().st_size if path.exists() else 0

    def follow() -> None:
        position = start
        while not done.wait(1.0):
            if path.exists() and path.stat().st_size > position:
                with path.open(encoding="utf-8") as stream:
                    stream.seek(position)
                    for line in stream:
                        _log_step(json.loads(line))
                    position = stream.tell()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _log_step(event: dict[str, Any]) -> None:
    total = event["tokens"] // event["step"] * event["total_steps"]
    logger.info(
        "training: %.4f bits/token, %s",
        event["loss_bits"],
        describe_speed(event["tokens"], total, event["tokens_per_s"]),
    )


def _export(
    config: PretrainConfig,
    architecture: dict[str, Any],
    corpus: PreparedCorpus,
    result: Any,
    output: Path,
    parameters: int,
) -> Trained:
    """From the last checkpoint to a Hugging Face folder and an artifact."""
    import torch

    from tokenbound.models.structured.build import save_trained

    if result.checkpoint is None:
        raise TokenboundError(f"training ended without a checkpoint ({result.error}); see {output}")
    family = config.what.family
    model = _build_model(architecture, family)
    with result.checkpoint.as_directory() as folder:
        model.load_state_dict(torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)["model"])
    if family.kind == "dense":
        model.save_pretrained(output / "model")
    else:
        save_trained(model, family, output / "model")
    text = text_of(corpus, WindowsConfig(length=config.what.network_training.window, context="packed"))
    data = encode_checkpoint(str(output / "model"), config.what.compress, corpus=config.what.corpus, text=text)
    if config.what.smoothing_head is not None:
        data = add_smoothing_head(data, text, config.what.smoothing_head)
    RunDirectory(str(output)).write(MODEL_ARTIFACT, data)
    loss_bits = float(result.metrics["loss_bits"])
    return Trained(str(output / "model"), str(output / MODEL_ARTIFACT), len(data), loss_bits, parameters)
