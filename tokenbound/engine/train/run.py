"""Pretraining: a model trained, quantized, trained on its grid where that is asked for, and encoded.

    float training  ->  model/            (`what.training`; or a checkpoint that is there already, `what.start`)
    compression     ->  compressed.tokenbound      (or an artifact that is there already, `what.artifact`)
    finish          ->  model.tokenbound  (`what.finish`: quantization-aware, on the bound itself)

Each stage is kept; a run that was stopped goes on in the stage that it had reached, from its last checkpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenbound.config.family import Family, LoraFamily, MarkovFamily
from tokenbound.config.run import FinishConfig, PretrainConfig, TrainingConfig, WindowsConfig, dump_config
from tokenbound.corpus.prepared import CorpusRule, PreparedCorpus
from tokenbound.engine.cluster.executor import executor
from tokenbound.engine.compress.predicted_bound import ArtifactPlace, price_of_bits
from tokenbound.engine.compress.run import counted_tokenizer, encode_checkpoint
from tokenbound.engine.corpus import Text, check_corpus, open_corpus, text_of
from tokenbound.engine.train.ray_train import fit
from tokenbound.engine.train.smoothing import add_smoothing_head
from tokenbound.errors import InputError, MismatchError
from tokenbound.store import filesystem as files
from tokenbound.store.copies import local_copy
from tokenbound.store.filesystem import anchored
from tokenbound.store.run import RunDirectory, canonical_json, sha256_hex
from tokenbound.store.uri import is_uri

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokenbound.training.qat import GridModel

logger = logging.getLogger(__name__)

FLOAT_MODEL = "float.json"
FINISHED = "trained.json"
COMPRESSED = "compressed.tokenbound"
MODEL_ARTIFACT = "model.tokenbound"
CANDIDATE = "candidate.tokenbound"
"""An artifact that is scored once and removed."""


@dataclass(frozen=True)
class FloatModel:
    """A trained model before compression."""

    path: str
    """Hugging Face format; of a family only what is trained, of an adapter as `peft` saves it; or the artifact that is
    trained further."""
    loss_bits: float | None
    """Smoothed training loss at the end, bits per token; None where nothing was trained."""
    trained_parameters: int
    """Numbers that training chose."""


@dataclass(frozen=True)
class Trained:
    """What a finished training run left behind."""

    model: str
    """Float model, as in `FloatModel`."""
    artifact: str
    """The encoded model."""
    artifact_bytes: int
    loss_bits: float
    """Smoothed training loss at the end, bits per token: of the rounded model where there was a finish."""
    trained_parameters: int
    """Numbers that training chose."""


def pretrain(config: PretrainConfig) -> Trained:
    """Train the configured model, write it in Hugging Face format and as an artifact; a finished run is returned.

    Raises:
        InputError: the config, the corpus or the model shape cannot be used, or training diverged.
        MismatchError: the output holds a run of another config.
    """
    if is_uri(config.how.output):
        raise InputError(
            f"how.output {config.how.output}: training keeps its checkpoints in a local or shared directory; name one, "
            "and copy model.tokenbound to the store afterwards"
        )
    output = Path(config.how.output).absolute()
    _require_own(config, output)
    run = RunDirectory(str(output))
    if run.exists(FINISHED):
        return Trained(**run.read_json(FINISHED))
    architecture = check_training(config)
    _claim_output(config, output)
    with executor().session(config.how.ray_address, config.how.ray_timeout_s):
        corpus = open_corpus(config.what.corpus, output=config.how.output, cache=config.how.cache)
        trained = _count(config, corpus, run) if architecture is None else _train(config, architecture, corpus, run)
    run.write_json(FINISHED, asdict(trained))
    return trained


def check_training(config: PretrainConfig) -> dict[str, Any] | None:
    """Refuse what can be refused without Ray; reads neither the corpus nor tensors.

    Returns:
        The architecture; None where n-grams are counted.

    Raises:
        InputError: corpus, tokenizer, model or family cannot be used, or a tracker is not installed.
    """
    from tokenbound.training.trackers import require_trackers

    rule = check_corpus(config.what.corpus)
    require_trackers(config.how.log)
    if isinstance(config.what.family, MarkovFamily):
        return None
    architecture = _architecture(config, rule)
    _check_shape(config, architecture, rule)
    _check_family(config, architecture)
    return architecture


def _count(config: PretrainConfig, corpus: PreparedCorpus, run: RunDirectory) -> Trained:
    """Count n-grams in place of training: there is no float model beside the artifact."""
    from tokenbound.engine.train.ngrams import fit_markov

    family, text = config.what.family, text_of(corpus, WindowsConfig(context="packed"))
    assert isinstance(family, MarkovFamily)
    vocab_size, tokenizer = corpus.manifest.rule.max_id + 1, counted_tokenizer(config.what.corpus)
    data, fitted = fit_markov(corpus, family, vocab_size, text, place=run.place(CANDIDATE), tokenizer=tokenizer)
    run.write(MODEL_ARTIFACT, data)
    path = run.path(MODEL_ARTIFACT)
    return Trained(path, path, len(data), fitted.loss_bits, fitted.tree.num_levels)


def _train(config: PretrainConfig, architecture: dict[str, Any], corpus: PreparedCorpus, run: RunDirectory) -> Trained:
    """The stages of a network, each skipped where its result is there."""
    text = text_of(corpus, WindowsConfig(length=config.what.last_training.window, context="packed"))
    if not run.exists(FLOAT_MODEL):
        run.write_json(FLOAT_MODEL, asdict(_float_model(config, architecture, corpus, Path(run.root))))
    model = FloatModel(**run.read_json(FLOAT_MODEL))
    given = config.what.artifact is not None
    if not run.exists(COMPRESSED):
        what, out = config.what, run.place(COMPRESSED)
        if given:
            run.write(COMPRESSED, Path(model.path).read_bytes())
        else:
            encode_checkpoint(model.path, what.compress, out=out, base=what.base, corpus=what.corpus, text=text)
    data, loss_bits = run.read(COMPRESSED), model.loss_bits
    if config.what.finish is not None:
        price = config.what.finish.nats_per_bit
        if price is None:
            price = _price(run, None if given else model.path, len(data), text)
        data, loss_bits = _finish(config, config.what.finish, corpus, price, run.path(COMPRESSED))
    assert loss_bits is not None, "either stage trains"
    if config.what.smoothing_head is not None:
        data = add_smoothing_head(data, text, config.what.smoothing_head)
    run.write(MODEL_ARTIFACT, data)
    return Trained(model.path, run.path(MODEL_ARTIFACT), len(data), loss_bits, model.trained_parameters)


def _price(run: RunDirectory, checkpoint: str | None, num_bytes: int, text: Text) -> float:
    """What a bit of code is worth, by the losses of the unquantized checkpoint; without one, of the given artifact."""
    if checkpoint is None:
        place = run.place(COMPRESSED)
        return price_of_bits(ArtifactPlace(place, sha256_hex(run.read(COMPRESSED))), num_bytes, text)
    exact = encode_checkpoint(checkpoint, None, out=run.place(CANDIDATE))
    price = price_of_bits(ArtifactPlace(run.place(CANDIDATE), exact.sha256), num_bytes, text)
    files.delete(run.filesystem, run.path(CANDIDATE))
    return price


MARKER = "training.json"
"""Names the config that an output directory belongs to."""


def _identity(config: PretrainConfig) -> dict[str, str]:
    return {"sha256": sha256_hex(canonical_json(config.what.model_dump(mode="json")))}


def _require_own(config: PretrainConfig, output: Path) -> None:
    """An output directory belongs to one config: resuming another's checkpoint would be silent nonsense."""
    marker = output / MARKER
    if marker.exists() and json.loads(marker.read_text()) != _identity(config):
        raise MismatchError(f"how.output {output} holds a training run of another config; choose another directory")


def _claim_output(config: PretrainConfig, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (output / MARKER).write_text(json.dumps(_identity(config)))


def _architecture(config: PretrainConfig, rule: CorpusRule) -> dict[str, Any]:
    if config.what.artifact is not None:
        return _trainable_artifact(config.what.artifact)
    if config.what.base is not None:
        from tokenbound.models.weights import check_base

        return check_base(local_copy(config.what.base))
    if config.what.start is not None:
        from tokenbound.models.checkpoint import check_checkpoint

        return check_checkpoint(local_copy(config.what.start))
    defaults = {
        "vocab_size": rule.max_id + 1,
        "bos_token_id": rule.bos_id,
        "eos_token_id": rule.eos_id,
        "use_cache": False,
    }
    return {**defaults, **config.what.model}


def _trainable_artifact(path: str) -> dict[str, Any]:
    """Architecture of an artifact that can be trained further.

    Raises:
        InputError: it cannot be read, is a delta, or holds nothing on a grid.
    """
    from tokenbound.compression.artifact_file import ArtifactFile
    from tokenbound.compression.codecs import UNIFORM
    from tokenbound.compression.methods import built_in_methods

    try:
        parsed = ArtifactFile(path).parsed
    except OSError as error:
        raise InputError(f"what.artifact {path!r} cannot be read: {error.strerror}") from None
    if parsed.base is not None or all(item.codec != UNIFORM for item in parsed.coded):
        usable = built_in_methods(lambda method: method.writes_grid)
        raise InputError(f"what.artifact {path!r} must be a whole model quantized by {usable}")
    return parsed.architecture


def _trainings(config: PretrainConfig) -> list[tuple[str, TrainingConfig]]:
    """The trainings that are asked for, by their keys."""
    named = (("training", config.what.training), ("finish", config.what.finish))
    return [(name, training) for name, training in named if training is not None]


def _check_shape(config: PretrainConfig, architecture: dict[str, Any], rule: CorpusRule) -> None:
    """Ids and windows that do not fit the model are refused."""
    if "model_type" not in architecture:
        raise InputError("what.model needs `model_type`, e.g. llama")
    if rule.max_id >= architecture["vocab_size"]:
        raise InputError(f"what.model.vocab_size {architecture['vocab_size']} is too small for ids up to {rule.max_id}")
    positions = architecture.get("max_position_embeddings") or architecture.get("n_positions")
    for name, training in _trainings(config):
        if positions is not None and training.window > positions:
            raise InputError(f"what.{name}.window {training.window} exceeds the model's {positions} positions")


def _require_tokens(config: PretrainConfig, corpus: PreparedCorpus) -> None:
    tokens = corpus.manifest.tokens
    for name, training in _trainings(config):
        if tokens <= training.window:
            raise InputError(
                f"the corpus has {tokens} tokens, fewer than what.{name}.window + 1 = {training.window + 1}"
            )


def _check_family(config: PretrainConfig, architecture: dict[str, Any]) -> int:
    """A family that does not fit is refused; how many parameters it trains."""
    from tokenbound.models.build import count_trained
    from tokenbound.models.structured.adapter import count_adapter
    from tokenbound.models.structured.registry import family_of
    from tokenbound.models.weights import Weights

    family = family_of(architecture) or config.what.family
    if config.what.base is None:
        return count_trained(architecture, family)
    assert isinstance(family, LoraFamily), "the config has checked it"
    return count_adapter(Weights(architecture, {}), family)


def _build_model(architecture: dict[str, Any], family: Family, start: str | None) -> PreTrainedModel:
    """A model in its trained form: a checkpoint's, or fresh and random from torch's present seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tokenbound.models.build import trained_form
    from tokenbound.models.checkpoint import read_checkpoint
    from tokenbound.models.structured.registry import attach_family

    if start is not None:
        checkpoint = read_checkpoint(local_copy(start))
        trained = trained_form(checkpoint.architecture, checkpoint.tensors)
        for name, parameter in trained.named_parameters():
            parameter.requires_grad_(name in checkpoint.tensors)
        return trained
    shape = dict(architecture)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape))
    attach_family(model, family)
    return model


def _adapter_builder(config: PretrainConfig) -> Callable[[], Any] | None:
    """What builds the base with fresh factors from torch's present seed; None where there is no base."""
    base, family = config.what.base, config.what.family
    if base is None:
        return None
    assert isinstance(family, LoraFamily), "the config has checked it"
    return partial(_build_adapter, anchored(base), family)


def _build_adapter(base: str, family: LoraFamily) -> PreTrainedModel:
    from tokenbound.models.structured.adapter import adapted_model
    from tokenbound.models.weights import read_base

    return adapted_model(read_base(local_copy(base)), family)


def _float_model(
    config: PretrainConfig, architecture: dict[str, Any], corpus: PreparedCorpus, output: Path
) -> FloatModel:
    """What is to be compressed: trained here, or the checkpoint that the config starts from."""
    from tokenbound.models.build import save_trained
    from tokenbound.models.structured.adapter import save_adapter
    from tokenbound.models.structured.registry import family_of
    from tokenbound.training.loop import load_trained

    _require_tokens(config, corpus)
    parameters = _check_family(config, architecture)
    family, start, base = family_of(architecture) or config.what.family, config.what.start, config.what.base
    logger.info("family %s: %d trained parameters", family.kind, parameters)
    if config.what.training is None:
        given = start or config.what.artifact
        assert given is not None
        return FloatModel(anchored(given), None, parameters)
    build = _adapter_builder(config) or partial(
        _build_model, architecture, family, None if start is None else anchored(start)
    )
    state, loss_bits = fit(build, config.what.training, corpus, config.how)
    model = build()
    load_trained(model, state)
    if base is not None:
        save_adapter(model, base, output / "model")
    elif family.kind == "dense":
        model.save_pretrained(output / "model")
    else:
        save_trained(model, family, output / "model")
    return FloatModel(str(output / "model"), loss_bits, parameters)


def _finish(
    config: PretrainConfig, training: FinishConfig, corpus: PreparedCorpus, price: float, artifact: str
) -> tuple[bytes, float]:
    """Quantization-aware training of an artifact on the bound: its bytes afterwards, and its training loss."""
    from tokenbound.compression.regrid import replace_grids
    from tokenbound.training.loop import load_trained

    data = Path(artifact).read_bytes()
    logger.info("finish: %d bytes at the start; a bit of code is worth %.3g nats of loss", len(data), price)
    build = partial(_grid_model, artifact, price, training.coarser, _adapter_builder(config))
    state, loss_bits = fit(build, training, corpus, config.how, folder="finish")
    model = build()
    load_trained(model, state)
    finished = replace_grids(data, model.finish())
    logger.info("finish: %d bytes at the end", len(finished))
    return finished, loss_bits


def _grid_model(
    artifact: str, nats_per_bit: float, coarser: Mapping[str, int], build_adapter: Callable[[], PreTrainedModel] | None
) -> GridModel:
    """An artifact's model, to be trained on its grid; of a delta, its factors on the base."""
    from tokenbound.compression.artifact import decode_artifact
    from tokenbound.compression.regrid import artifact_grids, widened
    from tokenbound.models.build import trained_form
    from tokenbound.models.structured.adapter import factor_names
    from tokenbound.training.qat import GridModel

    data = Path(artifact).read_bytes()
    decoded, grids = decode_artifact(data), widened(artifact_grids(data), coarser)
    if build_adapter is None:
        return GridModel(trained_form(decoded.architecture, decoded.tensors), grids, nats_per_bit)
    model = build_adapter()
    names = factor_names(model)
    model.load_state_dict({name: decoded.tensors[coded] for name, coded in names.items()}, strict=False)
    return GridModel(model, grids, nats_per_bit, names)
