"""What a run will cost and what it can show, before it is paid for: the `plan` command.

Nothing is written but the prepared corpus, which the run itself will use. What is exact, measured, estimated and
assumed is told apart, and no number here is a bound.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import ray

from tokenbound.bounds.claim import Claim
from tokenbound.bounds.decisions import TreeChoice
from tokenbound.certificate.derived import best_loss_line, claim_of
from tokenbound.certificate.identity import configuration, scoring_protocol
from tokenbound.compression.methods import CompressionMethod
from tokenbound.config.compress import LosslessSettings
from tokenbound.config.run import RunConfig, WindowsConfig
from tokenbound.corpus.prepared import PreparedCorpus
from tokenbound.corpus.windows import shard_slices
from tokenbound.engine.artifacts import everywhere, named_artifact
from tokenbound.engine.cluster.executor import executor
from tokenbound.engine.cluster.session import plain_errors
from tokenbound.engine.compress.predicted_bound import lines_if_all, separate_lines_if_all
from tokenbound.engine.corpus import Text, check_corpus, open_corpus, text_of
from tokenbound.engine.evaluate.gpu_count import gpus_for_memory
from tokenbound.engine.evaluate.graph import Placement, place_replicas, replica_device
from tokenbound.engine.evaluate.preparation import (
    BYTES_PER_TOKEN,
    check_model,
    drawn_windows,
    identities,
    load_artifact,
    register_of,
    require_tokenizer,
    require_tokens,
    sampled_shard_windows,
    shard_tokens_of,
    tree_choice,
)
from tokenbound.engine.evaluate.stages import ReplicaSpec, open_plan
from tokenbound.engine.evaluate.weights_form import choose, form_needs_here, placed, room_of
from tokenbound.engine.plan.throughput import Probe, extrapolated_speed, measure_speed
from tokenbound.errors import InputError
from tokenbound.models.quantized.schemes import scheme_of
from tokenbound.store import filesystem as files
from tokenbound.store.copies import local_copy
from tokenbound.store.filesystem import anchored
from tokenbound.store.uri import join, split

if TYPE_CHECKING:
    from tokenbound.compression.artifact_file import ArtifactFile
    from tokenbound.models.forms import Choice, Form, FormNeeds
    from tokenbound.models.memory import ReplicaMemory

EXACT_WEIGHTS = 1 << 25
"""Checkpoints of up to so many weights are encoded as the run would do it; of larger ones a sample is."""

SAMPLED_TENSORS = 32
"""Tensors of a larger checkpoint that are encoded."""

SAMPLED_WEIGHTS = 1 << 18
"""Weights of each."""

GPU_TFLOPS = 156.0
"""Half of what an A100 multiplies at best in bfloat16: the assumed speed of a GPU that is not at hand."""

LARGEST_CORPUS_TOKENS = 10**15
"""Beyond it nobody has a corpus."""

Provenance = Literal["exact", "estimated", "assumed", "unknown"]


@dataclass(frozen=True)
class Work:
    """What is to be scored."""

    num_tokens: int
    """m, exactly."""
    num_windows: int
    num_shards: int
    tokens_to_score: int
    """m, or what a sample of windows holds on average; with `until_slack_bits` at most."""
    disk_bytes: int
    """Of the losses, at the size that is asked for before scoring."""


@dataclass(frozen=True)
class Hypothesis:
    """The model and its price."""

    parameters: int
    artifact_bytes: int | None
    code_length_bits: float | None
    """L(h): artifact and protocol."""
    code_length_is: Provenance
    """`exact`: encoded, or an artifact. `estimated`: from some of its tensors. `assumed`: as the user says."""


@dataclass(frozen=True)
class FormForecast:
    """What one replica takes in one of the forms of `how.weights`."""

    form: Form
    device_bytes: int
    """On its device; with a CPU all its memory."""
    host_bytes: int
    """Beside it on the host of a GPU."""
    disk_bytes: int
    """In the local folder of its node."""
    load_seconds: float
    """Until its first shard begins, start-up of the process not counted."""
    tokens_per_second: float | None
    """Null where nothing was measured."""


@dataclass(frozen=True)
class Replicas:
    """Memory and speed."""

    device: str
    count: int
    """That the machines at hand would run; 0 where one does not fit."""
    weights_bytes: int
    activations_bytes: int
    logits_bytes: int
    total_bytes: int
    """Of one replica."""
    gpu_bytes: int
    """Memory of one GPU: the smallest of the cluster, or the assumed one."""
    gpus_each: int
    """GPUs of that size over which a replica is spread."""
    tokens_per_second: float | None
    """Of one replica, measured while the others ran; null where nothing was measured."""
    hours: float | None
    """For all replicas together, start-up not counted."""
    device_hours: float | None
    """Hours times replicas, and times the GPUs of each: what is paid for."""
    assumed_gpu_hours: float | None
    """The same on GPUs that multiply at an assumed rate; null for models without matrices."""
    assumed_gpu_tflops: float
    """That rate, sustained, in 10^12 operations per second of one GPU."""
    form: Form
    """How they hold their weights: as `how.weights` says, or as `auto` chooses."""
    form_because: str
    """Why."""
    forms: tuple[FormForecast, ...]
    """What each possible form would take."""


@dataclass(frozen=True)
class Outlook:
    """What may come out, bits per token. None of it is a bound."""

    random_guess_bits: float
    probed_tokens: int
    """Random tokens of the corpus whose losses stand for all; 0 where the weights were not at hand."""
    loss_bits: float | None
    """Their mean unsmoothed loss."""
    predicted_bound_bits: float | None
    """The smallest loss line if every token had these losses."""
    predicted_method: str | None
    predicted_beside: dict[str, float]
    """Bounds on other risks if every token had these losses, by method."""
    tokens_to_beat_guessing: int | None
    """Smallest m with a line below guessing, if the losses stayed as they are; null if there is none."""
    perfect_bits: float | None
    """The smallest loss line of a perfect model with this code length: every loss zero."""
    perfect_tokens_to_beat_guessing: int | None
    """Smallest m at which that is below guessing."""


@dataclass(frozen=True)
class Forecast:
    """Costs and prospects of a run."""

    work: Work
    hypothesis: Hypothesis
    replicas: Replicas
    outlook: Outlook
    notes: tuple[str, ...]
    """What was assumed, in words."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class _Model:
    architecture: Mapping[str, Any]
    artifact: ArtifactFile | None
    num_bytes: int | None
    provenance: Provenance


def plan_run(
    config: RunConfig,
    *,
    probe_seconds: float = 60.0,
    bits_per_weight: float | None = None,
    gpu_bytes: int = 80 * 2**30,
    gpu_tflops: float = GPU_TFLOPS,
    exact_weights: int = EXACT_WEIGHTS,
) -> Forecast:
    """Prepare the corpus, weigh the model, and measure the replicas' speed.

    Args:
        config: the run.
        probe_seconds: how long the replicas score; 0 for no measurement.
        bits_per_weight: assume this code length; for checkpoints that are not worth encoding now.
        gpu_bytes: memory of a GPU where the cluster has none to ask.
        gpu_tflops: 10^12 operations per second that a GPU sustains, for hours that cannot be measured here.
        exact_weights: up to how many weights a checkpoint is encoded whole; of a larger one a sample is.

    Raises:
        InputError: config, corpus or model cannot be used, or the model is a delta.
    """
    if config.what.model.base is not None:
        raise InputError("what.model.base: a run of a delta cannot be planned yet; plan the whole fine-tune")
    name = config.what.model.artifact
    artifact = None if name is None else named_artifact(name, folder=config.how.local_folder)
    if artifact is not None:
        require_tokenizer(artifact, config.what.corpus)
    architecture = _of_checkpoint(config) if artifact is None else artifact.architecture
    check_model(architecture, check_corpus(config.what.corpus).max_id, config.what.windows.length)
    with executor().session(config.how.ray_address, config.how.ray_timeout_s):
        corpus = open_corpus(config.what.corpus, output=config.how.output, cache=config.how.cache)
        text = text_of(corpus, config.what.windows)
        work = _work(config, text)
        place = join(split(corpus.root)[0], f"{uuid.uuid4().hex}.tokenbound")
        model = (
            _model(config, text, architecture, bits_per_weight, exact_weights, place)
            if artifact is None
            else _Model(architecture, artifact, artifact.num_bytes, "exact")
        )
        placement, replicas, parameters = _replicas(config, model, work, gpu_bytes, gpu_tflops)
        probe, speed = None, None
        if replicas.count and probe_seconds > 0:
            tree = tree_choice(config.what, corpus, model.architecture)
            spec = _spec(config, placement, model.artifact, everywhere(name or place), tree)
            if replicas.form == "dense":
                probe = measure_speed(model.architecture, spec, text, placement=placement, seconds=probe_seconds)
                speed = probe.tokens_per_second
            else:
                speed = extrapolated_speed(model.architecture, spec, placement)
        if name is None:
            files.delete(*files.resolve(place))
        replicas = _timed(config, model, replicas, speed, work)
    claim = _claim(config, model, probe, corpus.manifest.vocab_size, text)
    bits = claim.code_length_bits if claim else None
    hypothesis = Hypothesis(parameters, model.num_bytes, bits, model.provenance)
    return Forecast(
        work,
        hypothesis,
        replicas,
        _outlook(claim, probe if model.artifact is not None else None, corpus.manifest.vocab_size),
        tuple(_notes(config, model, replicas, probe)),
    )


def _work(config: RunConfig, text: Text) -> Work:
    plan = open_plan(text.corpus_root, text.spec)[1]
    require_tokens(plan)
    shard_tokens, count = shard_tokens_of(config, plan), drawn_windows(config.what.sample, plan.num_windows)
    batch = config.what.windows.batch
    if count is None:
        shards, tokens = len(shard_slices(plan, shard_tokens, batch)), plan.num_tokens
    else:
        shards = math.ceil(count / sampled_shard_windows(plan, shard_tokens, batch))
        tokens = round(plan.num_tokens * count / plan.num_windows)
    return Work(plan.num_tokens, plan.num_windows, shards, tokens, BYTES_PER_TOKEN * tokens)


# --- The model and its price --------------------------------------------------------------------------------------


def _of_checkpoint(config: RunConfig) -> dict[str, Any]:
    """The architecture of a checkpoint, whose weights need not be there; those that are must be sound."""
    from tokenbound.models.checkpoint import check_checkpoint, read_architecture, stored_bytes
    from tokenbound.models.hf_model import blank_model

    assert config.what.model.checkpoint is not None
    path = local_copy(config.what.model.checkpoint_place)
    if stored_bytes(path):
        return check_checkpoint(path)
    architecture = read_architecture(path)
    blank_model(architecture)
    return architecture


def _model(
    config: RunConfig,
    text: Text,
    architecture: dict[str, Any],
    bits_per_weight: float | None,
    exact_weights: int,
    place: str,
) -> _Model:
    """A checkpoint, and what it will weigh."""
    from tokenbound.models.checkpoint import stored_bytes

    choice, corpus = config.what.model, config.what.corpus
    assert choice.checkpoint is not None
    checkpoint = local_copy(choice.checkpoint_place)
    parameters = _num_weights(architecture)
    if bits_per_weight is not None:
        return _Model(architecture, None, math.ceil(bits_per_weight * parameters / 8), "assumed")
    stored = stored_bytes(checkpoint)
    if not stored:
        return _Model(architecture, None, None, "unknown")
    if parameters <= exact_weights:
        artifact = load_artifact(config, text, out=place)
        require_tokenizer(artifact, corpus)
        return _Model(artifact.architecture, artifact, artifact.num_bytes, "exact")
    method = choice.compress or LosslessSettings()
    sample = _coded_sample(checkpoint, method)
    if sample is None:
        return _Model(architecture, None, None, "unknown")
    coded, tensors = sample
    if scheme_of(architecture) is None or not method.is_exact:
        share = parameters / sum(tensor.numel() for tensor in tensors)
    else:  # an element may hold many codes
        share = stored / sum(tensor.nbytes for tensor in tensors)
    return _Model(architecture, None, math.ceil(coded * share), "estimated")


def _num_weights(architecture: Mapping[str, Any]) -> int:
    from tokenbound.models.hf_model import blank_model

    return sum(parameter.numel() for parameter in blank_model(architecture).parameters())


def _coded_sample(checkpoint: str, settings: CompressionMethod) -> tuple[int, list[Any]] | None:
    """Bytes that leading rows of some tensors take, and these; None for methods that need a calibration."""
    if settings.needs_calibration:
        return None
    from tokenbound.models.checkpoint import sample_weights

    place, dense = Path(checkpoint).expanduser(), not settings.is_exact
    tensors = sample_weights(place, tensors=SAMPLED_TENSORS, weights=SAMPLED_WEIGHTS, dense=dense)
    with plain_errors():
        sizes = list(executor().map(partial(_encoded_bytes, settings), tensors.items()))
    return sum(sizes), list(tensors.values())


def _encoded_bytes(settings: CompressionMethod, item: tuple[str, Any]) -> int:
    from tokenbound.compression.tensor import encode_tensor

    return len(encode_tensor(*item, settings).payload)


# --- Replicas -----------------------------------------------------------------------------------------------------


def _replicas(
    config: RunConfig, model: _Model, work: Work, gpu_bytes: int, gpu_tflops: float
) -> tuple[Placement, Replicas, int]:
    """How many replicas there will be, the memory of one, and the number of weights."""
    what, device = config.what, replica_device(config.how)
    memory = _memory(model, what.model.dtype, what.windows, device)
    gpu = executor().smallest_gpu_bytes() if device == "cuda" and executor().resources().gpus else gpu_bytes
    gpus = _gpus(config, model, memory, gpu)
    needs = _needs(config, model, memory, device, work)
    choice = _choice(config, needs, work)
    placement = placed(choice, config.how, work.num_shards, gpus if device == "cuda" and choice.form == "dense" else 1)
    if choice.form != "dense":
        room = room_of(device).device_bytes
        fits = not room or needs[choice.form].device_bytes <= room
    elif device == "cuda":
        fits = gpus <= executor().resources().gpus_of_a_node
    else:
        fits = needs["dense"].device_bytes * placement.replicas <= _host_bytes()
    sizes = (memory.weights_bytes, memory.activations_bytes, memory.logits_bytes, memory.total_bytes)
    count = placement.replicas if fits else 0
    operations = _operations(model, work, what.windows.length, memory.parameters)
    gpu_hours = None if operations is None else gpus * operations / (gpu_tflops * 1e12) / 3600
    forms = tuple(FormForecast(**asdict(need), tokens_per_second=None) for need in needs.values())
    found = Replicas(
        device, count, *sizes, gpu, gpus, None, None, None, gpu_hours, gpu_tflops, choice.form, choice.why, forms
    )
    return placement, found, memory.parameters


def _needs(
    config: RunConfig, model: _Model, memory: ReplicaMemory, device: str, work: Work
) -> Mapping[Form, FormNeeds]:
    """What a replica takes in each form, from the artifact's index, or from the code length that it would have."""
    import torch

    from tokenbound.models.forms import layer_sizes, packed_bytes, packed_bytes_at

    windows, dtype = config.what.windows, getattr(torch, config.what.model.dtype)
    sizes = layer_sizes(model.architecture)
    packed = None
    if model.artifact is not None:
        packed = packed_bytes(model.artifact.parsed.coded)
    elif sizes is not None and model.num_bytes is not None:
        packed = packed_bytes_at(8 * model.num_bytes / memory.parameters, sizes, dtype)
    return form_needs_here(
        memory,
        sizes,
        dtype=dtype,
        device=device,
        batch_tokens=windows.batch * windows.length,
        shard_tokens=_shard_tokens(work),
        artifact_bytes=model.num_bytes,
        packed=packed,
    )


def _shard_tokens(work: Work) -> int:
    return max(1, work.tokens_to_score // max(1, work.num_shards))


def _choice(config: RunConfig, needs: Mapping[Form, FormNeeds], work: Work) -> Choice:
    """The form that the run would take.

    Raises:
        InputError: it was asked for and is not possible; the message says what to set.
    """
    from tokenbound.models.forms import Choice

    asked = config.how.weights
    if asked == "auto":
        return choose(needs, place_replicas(config.how, work.num_shards))
    if asked not in needs:
        raise InputError(
            f"how.weights: {asked} cannot be planned, because the model has no list of layers or its code length is "
            "not known; set how.weights: dense, or give --bits-per-weight"
        )
    return Choice(asked, asked != "dense", "how.weights asks for it")


def _operations(model: _Model, work: Work, length: int, parameters: int) -> float | None:
    """Of all forward passes, padding included: two for each weight and position; attention over windows adds little."""
    if model.architecture.get("model_type") == "markov":
        return None
    positions = work.num_windows * length * work.tokens_to_score / work.num_tokens
    return 2.0 * parameters * positions


def _gpus(config: RunConfig, model: _Model, memory: ReplicaMemory, gpu_bytes: int) -> int:
    """Over how many GPUs the run would spread a replica."""
    import torch

    asked = config.how.gpus_per_replica
    if asked != "auto" or model.architecture.get("model_type") == "markov":
        return 1 if asked == "auto" else asked
    return gpus_for_memory(
        model.architecture, memory, dtype=getattr(torch, config.what.model.dtype), gpu_bytes=gpu_bytes
    )


def _memory(model: _Model, dtype: str, windows: WindowsConfig, device: str) -> ReplicaMemory:
    import torch

    from tokenbound.models.memory import markov_memory, replica_memory
    from tokenbound.models.structured.ngram_lm import decode_markov

    shape: dict[str, Any] = {"batch": windows.batch, "length": windows.length, "device": device}
    if model.architecture.get("model_type") != "markov":
        return replica_memory(model.architecture, dtype=getattr(torch, dtype), **shape)
    assert model.artifact is not None, "n-grams come as an artifact"
    return markov_memory(decode_markov(model.architecture, dict(model.artifact.tensors)), **shape)


def _host_bytes() -> float:
    """Memory that Ray may give to the workers of all nodes."""
    return float(ray.cluster_resources().get("memory", 0))


def _spec(
    config: RunConfig, placement: Placement, artifact: ArtifactFile | None, place: str, tree: TreeChoice | None
) -> ReplicaSpec:
    """How the run's replicas would score; without an artifact, of the architecture alone."""
    windows = config.what.windows
    return ReplicaSpec(
        "" if artifact is None else place,
        config.what.model.dtype,
        windows.batch,
        windows.length,
        placement.device,
        placement.threads,
        artifact_sha256=None if artifact is None else artifact.sha256,
        local_folder=config.how.local_folder,
        base=None if config.what.model.base is None else anchored(config.what.model.base),
        compile=config.how.compile,
        share=placement.replicas > 1,
        gpus=placement.gpus,
        tree=tree,
    )


def _timed(config: RunConfig, model: _Model, replicas: Replicas, speed: float | None, work: Work) -> Replicas:
    """With the speed of every form, from that of a dense replica, and the hours of the chosen one."""
    if speed is None:
        return replicas
    forms = tuple(
        replace(form, tokens_per_second=_speed_of(config, model, form.form, replicas.device, speed, work))
        for form in replicas.forms
    )
    found = next(form.tokens_per_second for form in forms if form.form == replicas.form)
    assert found is not None, "every form has been given a speed"
    replica_hours = work.tokens_to_score / found / 3600
    gpus = replicas.gpus_each if replicas.form == "dense" else 1
    return replace(
        replicas,
        tokens_per_second=found,
        hours=replica_hours / replicas.count,
        device_hours=replica_hours * (gpus if replicas.device == "cuda" else 1),
        forms=forms,
    )


def _speed_of(config: RunConfig, model: _Model, form: Form, device: str, dense: float, work: Work) -> float:
    import torch

    from tokenbound.models.forms import layer_sizes, tokens_per_second

    sizes, windows = layer_sizes(model.architecture), config.what.windows
    if sizes is None:
        return dense
    return tokens_per_second(
        form,
        dense,
        sizes,
        dtype=getattr(torch, config.what.model.dtype),
        device=device,
        cores=executor().resources().cpus_of_a_node,
        batch_tokens=windows.batch * windows.length,
        shard_tokens=_shard_tokens(work),
    )


# --- Outlook ------------------------------------------------------------------------------------------------------


def _claim(config: RunConfig, model: _Model, probe: Probe | None, tokenizer_size: int, text: Text) -> Claim | None:
    """What the run would claim; None while the code length is unknown."""
    if model.num_bytes is None:
        return None
    width = probe.vocab_size if probe else max(tokenizer_size, int(model.architecture.get("vocab_size", 0)))
    corpus, plan = open_plan(text.corpus_root, text.spec)
    claim = claim_of(
        config.what.bound.numbered(_expected_ordinal(config, model, corpus)),
        artifact_bytes=model.num_bytes,
        protocol=scoring_protocol(config.what.model, config.what.corpus, config.what.windows),
        vocab_size=width,
        tokenizer_vocab_size=tokenizer_size,
        num_tokens=plan.num_tokens,
        num_documents=plan.num_sequences,
        tree=tree_choice(config.what, corpus, model.architecture),
    )
    return replace(claim, what_if=True)


def _expected_ordinal(config: RunConfig, model: _Model, corpus: PreparedCorpus) -> int:
    """The run's place in the register of draws, or the place it would get; nothing is entered."""
    what, artifact = config.what, model.artifact
    tree = tree_choice(what, corpus, model.architecture)
    known = identities(what, "" if artifact is None else artifact.sha256, corpus.manifest, None, tree)
    return register_of(corpus.root, corpus.manifest).check(configuration(what, known), what.bound.trial)


def _outlook(claim: Claim | None, probe: Probe | None, tokenizer_size: int) -> Outlook:
    perfect = (np.zeros(1, np.float32), np.zeros(1, np.float32), np.zeros(1, np.int32))
    best, _, best_tokens = _prospects(claim, perfect)
    value, method, tokens = _prospects(claim, (probe.nll, probe.entropy, probe.rank)) if probe else (None, None, None)
    return Outlook(
        random_guess_bits=math.log2(tokenizer_size),
        probed_tokens=len(probe.nll) if probe else 0,
        loss_bits=float(probe.nll.mean(dtype=np.float64)) / math.log(2) if probe else None,
        predicted_bound_bits=value,
        predicted_method=method,
        predicted_beside=_beside(claim, probe),
        tokens_to_beat_guessing=tokens,
        perfect_bits=best,
        perfect_tokens_to_beat_guessing=best_tokens,
    )


def _beside(claim: Claim | None, probe: Probe | None) -> dict[str, float]:
    """Value of each line that bounds another risk, at this m."""
    if claim is None or probe is None:
        return {}
    lines = separate_lines_if_all(claim, probe.piece)
    return {line.method: line.value for line in lines if line.value is not None}


def _prospects(claim: Claim | None, losses: tuple[Any, Any, Any]) -> tuple[float | None, str | None, int | None]:
    """Value and method of the smallest loss line at this m, and the m from which one is below guessing."""
    line = None if claim is None else best_loss_line(lines_if_all(claim, *losses))
    if claim is None or line is None:
        return None, None, None
    return line.value, line.method, tokens_to_beat_guessing(claim, losses)


def tokens_to_beat_guessing(claim: Claim, losses: tuple[Any, Any, Any]) -> int | None:
    """Smallest m, to 2 %, at which these losses would give a loss line below guessing.

    Args:
        claim: what would be claimed; its own number of tokens does not matter.
        losses: nll, entropy (nats) and rank, [n] each; no m below n is looked at.
    """

    def beats(tokens: int) -> bool:
        line = best_loss_line(lines_if_all(replace(claim, num_tokens=tokens), *losses))
        return line is not None and not line.vacuous

    low = high = len(losses[0])
    while not beats(high):
        low, high = high, 8 * high
        if high > LARGEST_CORPUS_TOKENS:
            return None
    while high - low > high // 50:
        middle = (low + high) // 2
        low, high = (low, middle) if beats(middle) else (middle, high)
    return high


def _notes(config: RunConfig, model: _Model, replicas: Replicas, probe: Probe | None) -> Iterator[str]:
    from tokenbound.models.smoothing_head import SMOOTHING

    if model.provenance == "unknown":
        yield "the code length is not known: give the weights in a directory, or --bits-per-weight"
    if model.provenance == "estimated":
        yield f"the code length is estimated from {SAMPLED_TENSORS} tensors"
    if not replicas.count and replicas.device == "cuda":
        yield f"a replica needs {replicas.gpus_each} GPUs of one node, which is not there; nothing was measured"
    elif not replicas.count:
        yield "a replica does not fit beside the others into the memory here; nothing was measured"
    if replicas.form != "dense" and replicas.tokens_per_second is not None:
        yield "the speed was extrapolated from random models of one and of two layers; no loss was predicted"
    if probe is not None and model.artifact is None:
        yield "the speed was measured with random weights; no loss was predicted"
    if probe is not None and model.artifact is not None:
        yield f"predictions take the losses of {len(probe.nll):,} random tokens for those of the whole corpus"
    if SMOOTHING in model.architecture:
        yield "the lines of the model's smoothing head are not predicted"
    if not config.what.sample.is_full:
        yield "the slack of scoring only a sample comes on top of the predicted bound"
