"""From a checkpoint to an artifact on Ray: calibration over windows of the corpus, one task per tensor to encode."""

from __future__ import annotations

import errno
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray
from pyarrow.fs import LocalFileSystem

from tokenbound.compression.methods import (
    CompressionMethod,
    SearchMethod,
    SearchSpace,
    built_in_methods,
    settings_record,
)
from tokenbound.config.compress import LosslessSettings
from tokenbound.config.run import CorpusConfig, RunConfig
from tokenbound.corpus.prepared import PreparedCorpus
from tokenbound.corpus.tokenizers import load_tokenizer
from tokenbound.corpus.windows import gather
from tokenbound.engine.cluster.executor import executor
from tokenbound.engine.cluster.progress import told
from tokenbound.engine.cluster.session import plain_errors
from tokenbound.engine.compress.checkpointed_parts import Parts
from tokenbound.engine.compress.layer_calibration import LARGE_WEIGHTS, StoredCalibration, calibrate_stored
from tokenbound.engine.compress.predicted_bound import (
    CALIBRATION_TOKENS,
    CANDIDATE_TOKENS,
    ArtifactPlace,
    bound_if_all,
    score_artifact,
)
from tokenbound.engine.corpus import SEED, Text, check_corpus, open_corpus, text_of
from tokenbound.engine.evaluate.stages import open_plan
from tokenbound.errors import IncompleteError, InputError
from tokenbound.models.quantized.schemes import scheme_of
from tokenbound.store import filesystem as files
from tokenbound.store.copies import local_copy, temporary_folder
from tokenbound.store.filesystem import anchored
from tokenbound.store.uri import base_name, join, split

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.artifact import IndexEntry
    from tokenbound.compression.artifact_file import ArtifactFile
    from tokenbound.compression.calibration import Calibration
    from tokenbound.compression.tensor import CodedTensor

logger = logging.getLogger(__name__)


CALIBRATION_PART_TOKENS = 1 << 16
"""Tokens of one calibration task: what a kill can lose of it. The artifact depends on it, not on the processors."""

CALIBRATION_BATCH_TOKENS = 4096
"""Tokens of one forward and backward pass."""


def require_fit(architecture: Mapping[str, Any], max_id: int, length: int) -> None:
    """Whether a model can read these tokens in windows of this length, by its architecture alone.

    Raises:
        InputError: ids outside the vocabulary, or windows longer than the model's positions.
    """
    size = architecture.get("vocab_size")
    if isinstance(size, int) and max_id >= size:
        raise InputError(
            f"what.corpus.tokenizer has ids up to {max_id}, but the model's vocabulary has {size}; "
            "use the tokenizer that the model was trained with"
        )
    positions = architecture.get("max_position_embeddings") or architecture.get("n_positions")
    if isinstance(positions, int) and length > positions:
        raise InputError(
            f"what.windows.length {length} exceeds the model's {positions} positions; set it to {positions} or less"
        )


def check_encoding(
    path: str, settings: CompressionMethod | None, *, base: str | None = None, has_text: bool = True
) -> dict[str, Any]:
    """The architecture of what `encode_checkpoint` would encode; reads no tensor and needs no Ray.

    Args:
        path: as there.
        settings: as there.
        base: as there.
        has_text: whether there will be tokens to calibrate on.

    Raises:
        InputError: the files are not there, or the method cannot encode them.
    """
    from tokenbound.models.checkpoint import check_checkpoint
    from tokenbound.models.weights import check_adapter, check_base, is_adapter

    method, path = settings or LosslessSettings(), local_copy(anchored(path))
    adapter = base is not None and is_adapter(path)
    if adapter:
        check_adapter(path)
        _require_factors(method)
    if not has_text:
        _require_text(method)
    if base is not None:
        found = check_base(local_copy(anchored(base)))
        return found if adapter else check_checkpoint(path)
    architecture = check_checkpoint(path)
    _require_exact(architecture, method, path)
    return architecture


def _require_text(method: CompressionMethod) -> None:
    if method.needs_calibration:
        raise InputError(f"method {method.name!r} needs tokens to calibrate on; name a run config with --config")


def _require_exact(architecture: Mapping[str, Any], method: CompressionMethod, path: str) -> None:
    """What is quantized already is kept as it is."""
    quantized = scheme_of(architecture)
    if quantized is not None and not method.is_exact and not quantized.may_change:
        raise InputError(
            f"compress.method {method.name!r} would change what {quantized.name} made of {path}; use `lossless`, or "
            "give the weights from before it was quantized"
        )


def _require_factors(method: CompressionMethod) -> None:
    """An adapter's factors have no calibration."""
    if not method.codes_adapters:
        usable = built_in_methods(lambda other: other.codes_adapters)
        raise InputError(f"method {method.name!r} calibrates whole weights, not an adapter's factors; use {usable}")


def encode_checkpoint(
    path: str,
    settings: CompressionMethod | None,
    *,
    out: str,
    base: str | None = None,
    corpus: CorpusConfig | None = None,
    text: Text | None = None,
    folder: str | None = None,
    large_weights: int = LARGE_WEIGHTS,
) -> ArtifactFile:
    """Encode a checkpoint into a file, tensor by tensor; runs inside a Ray session.

    Finished calibrations and tensors are kept beside it, in the folder `parts_of(out)`, until the file is written: the
    next start after a kill goes on from there.

    Args:
        path: Hugging Face checkpoint; beside a base also the directory of a LoRA adapter.
        settings: a method of compression with its settings; None means lossless.
        out: the artifact to write, a path or URI that every machine of the cluster can read.
        base: encode what the checkpoint changes of this one; checkpoint or artifact.
        corpus: its tokenizer goes into the artifact where it is `counted`.
        text: tokens to calibrate on, for the methods that need them.
        folder: `how.local_folder`.
        large_weights: checkpoints of more weights are calibrated with one layer in memory, where there is no GPU.

    Returns:
        The artifact, open.

    Raises:
        InputError: the checkpoint cannot be read or encoded, does not fit the text, or a method lacks that; or the
            disk is full.
    """
    from tokenbound.compression.weight_delta import tensors_sha256

    chosen, path = settings or LosslessSettings(), anchored(path)
    content = _content(path, None if base is None else anchored(base), chosen)
    if text is not None:
        require_fit(content.architecture, PreparedCorpus(text.corpus_root).manifest.rule.max_id, text.spec.length)
    tokenizer = None if corpus is None else counted_tokenizer(corpus)
    if text is None:
        _require_text(chosen)
    seen = None if text is None else [text.corpus_root, asdict(text.spec), text.num_tokens, CALIBRATION_TOKENS, SEED]
    digest = tensors_sha256(content.tensors)
    parts = Parts(parts_of(out), [version("tokenbound"), digest, content.architecture, content.reference, seen])
    is_calibrated = chosen.needs_calibration and text is not None and not content.is_adapter
    calibration: Calibration | StoredCalibration | None = None
    if is_calibrated and text is not None:
        calibration = _calibration(path, text, parts, by_layers=_by_layers(content, large_weights))
    task = partial(_encode_one, content.tensors, None if calibration is None else ray.put(calibration))

    def encode(tried: CompressionMethod, place: str) -> ArtifactFile:
        coded = _encode(content.tensors, partial(task, tried), tried, parts)
        return _write(content, coded, settings_record(tried), place, tokenizer)

    with _full_disk_named(out):
        if isinstance(chosen, SearchMethod):
            assert text is not None
            space = chosen.space(of_adapter=content.is_adapter)
            candidate = join(parts_of(out), "candidate.tokenbound")
            chosen = _best_setting(lambda tried: encode(tried, candidate), space, text, content.base, candidate, folder)
        artifact = encode(chosen, out)
    files.delete_folder(*files.resolve(parts_of(out)))
    return artifact


def parts_of(out: str) -> str:
    """The folder of finished parts beside an artifact that is being made."""
    folder, name = split(out)
    return join(folder, f"{name}.parts")


@contextmanager
def _full_disk_named(out: str) -> Iterator[None]:
    """Say what to do where the disk is full.

    Raises:
        InputError: it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{out}: {error.strerror}: the artifact is written once more than its own size while it is made; free "
            "some, or choose another disk"
        ) from None


def counted_tokenizer(corpus: CorpusConfig) -> bytes | None:
    """The tokenizer's bytes where an artifact must hold them."""
    if corpus.tokenizer_is == "given" or corpus.tokenizer is None:
        return None
    return load_tokenizer(corpus.tokenizer).files()


@dataclass(frozen=True)
class _Content:
    """What is encoded."""

    architecture: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]
    """Read one by one, here and in the tasks."""
    reference: dict[str, Any] | None = None
    """What a delta says of its base."""
    base: str | None = None
    """Where that base is."""

    is_adapter: bool = False
    """Whether the tensors are an adapter's factors, or come from them: there is no calibration of those."""


def _content(path: str, base: str | None, method: CompressionMethod) -> _Content:
    """The tensors to code, and what they belong to.

    Raises:
        InputError: they cannot be read, or the method cannot encode this delta.
    """
    from tokenbound.models.checkpoint import read_checkpoint
    from tokenbound.models.weights import is_adapter, read_base, read_delta

    if base is None:
        checkpoint = read_checkpoint(path, dense=not method.is_exact)
        _require_exact(checkpoint.architecture, method, path)
        return _Content(checkpoint.architecture, checkpoint.tensors)
    architecture, delta = read_delta(path, read_base(base), base_name=base)
    content = _Content(architecture, delta.tensors, delta.reference, base, is_adapter(path))
    if content.is_adapter:
        _require_factors(method)
    return content


@dataclass(frozen=True)
class _Coded:
    """Tensors whose codes are kept as parts."""

    entries: list[IndexEntry]
    payload: Callable[[IndexEntry], memoryview]


def _encode(
    tensors: Mapping[str, torch.Tensor],
    task: Callable[[str], CodedTensor],
    settings: CompressionMethod,
    parts: Parts,
) -> _Coded:
    """Code all tensors, one task each; those whose parts are there are not coded again.

    A part is the codec's number and the code. Of the codes one at a time is held here.
    """
    from tokenbound.compression.artifact import IndexEntry
    from tokenbound.compression.dtypes import dtype_code
    from tokenbound.compression.tensor import CodedTensor
    from tokenbound.compression.tensor_map import header_of

    record = json.dumps(settings_record(settings))  # of a plugin its version is part of it
    headers = {name: header_of(tensors, name) for name in tensors}

    def key(name: str) -> str:
        return f"tensor {name} {record}"

    def entry(name: str, codec: int, payload: bytes | memoryview) -> IndexEntry:
        dtype, shape = headers[name]
        return IndexEntry.of(CodedTensor(name, shape, dtype_code(dtype, name), codec, payload))

    def payload(entry: IndexEntry) -> memoryview:
        found = parts.get(key(entry.name))
        if found is None:
            raise IncompleteError(f"the code of tensor {entry.name!r} was lost while it was kept; run it again")
        return found[1:]

    kept = {name: parts.get(key(name)) for name in tensors}
    entries = [entry(name, found[0], found[1:]) for name, found in kept.items() if found is not None]
    # The largest first, so that none is waited for at the end.
    size = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in headers.items()}
    missing = sorted((name for name, found in kept.items() if found is None), key=lambda name: (-size[name], name))
    kept.clear()
    with plain_errors():
        for name, coded in zip(missing, executor().map(task, missing), strict=True):
            parts.put(key(name), bytes([coded.codec]), coded.payload)
            entries.append(entry(name, coded.codec, coded.payload))
    return _Coded(entries, payload)


def _encode_one(
    tensors: Mapping[str, torch.Tensor],
    calibration: ray.ObjectRef[Calibration | StoredCalibration] | None,
    settings: CompressionMethod,
    name: str,
) -> CodedTensor:
    import torch

    from tokenbound.compression.tensor import encode_tensor

    torch.set_num_threads(1)
    found = None if calibration is None else ray.get(calibration)
    return encode_tensor(
        name, tensors[name], settings, found.of(name) if isinstance(found, StoredCalibration) else found
    )


def _write(
    content: _Content, coded: _Coded, settings: Mapping[str, Any], place: str, tokenizer: bytes | None
) -> ArtifactFile:
    """Write an artifact from its kept codes, first to a local file, and open it."""
    from tokenbound.compression.artifact import artifact_parts
    from tokenbound.compression.artifact_file import ArtifactFile

    filesystem, path = files.resolve(place)
    local = Path(path) if files.is_local(filesystem) else temporary_folder() / base_name(place)
    parts = artifact_parts(
        content.architecture, coded.entries, coded.payload, settings, tokenizer=tokenizer, base=content.reference
    )
    with files.open_atomic(LocalFileSystem(), str(local)) as stream:
        stream.writelines(parts)
    if not files.is_local(filesystem):
        with local.open("rb") as source:
            files.write_stream(filesystem, path, source)
    return ArtifactFile(local)


def _by_layers(content: _Content, large_weights: int) -> bool:
    """Whether a model is calibrated with one layer in memory: where it is large and has layers, and runs on a CPU."""
    from tokenbound.compression.tensor_map import header_of
    from tokenbound.models.blocks import has_layers

    weights = sum(math.prod(header_of(content.tensors, name)[1]) for name in content.tensors)
    return weights > large_weights and not executor().resources().gpus and has_layers(content.architecture)


def _calibration(path: str, text: Text, parts: Parts, *, by_layers: bool) -> Calibration | StoredCalibration:
    """Second moments and Fisher factors over random windows: parts of `CALIBRATION_PART_TOKENS` on a pool of actors."""
    from tokenbound.compression.calibration import merge_calibrations, read_calibration, write_calibration

    windows = text.windows(CALIBRATION_TOKENS)
    count = min(-(-CALIBRATION_TOKENS // CALIBRATION_PART_TOKENS), len(windows))
    if by_layers:
        logger.info("calibrating on %d tokens, layer by layer", min(CALIBRATION_TOKENS, text.num_tokens))
        return calibrate_stored(path, text, parts, [(part, windows[part::count]) for part in range(count)])
    missing = [part for part in range(count) if parts.get(f"calibration {part}") is None]
    if missing:
        logger.info("calibrating on %d tokens", min(CALIBRATION_TOKENS, text.num_tokens))
    jobs = [(part, windows[part::count]) for part in missing]
    resources = executor().resources()
    device, slots = ("cuda", resources.gpus) if resources.gpus else ("cpu", resources.cpus)
    options = {"num_gpus": 1, "num_cpus": 0} if device == "cuda" else {"num_cpus": 1}
    pool = executor().pool(partial(_Calibrator, path, text, device), jobs, actors=min(slots, len(jobs)), **options)
    with plain_errors():
        for part, found in zip(missing, told(pool, "calibrating", len(missing)), strict=True):
            parts.put(f"calibration {part}", write_calibration(found))
    kept = (parts.get(f"calibration {part}") for part in range(count))
    return merge_calibrations(read_calibration(bytes(data)) for data in kept if data is not None)


class _Calibrator:
    """A checkpoint's model on its device, and the windows that it is calibrated on."""

    def __init__(self, path: str, text: Text, device: str) -> None:
        import torch

        from tokenbound.models.build import trained_form
        from tokenbound.models.checkpoint import read_checkpoint

        torch.set_num_threads(1)
        checkpoint = read_checkpoint(local_copy(path), dense=True)
        self.names, self.text = set(checkpoint.tensors), text
        self.model = trained_form(checkpoint.architecture, checkpoint.tensors)
        cast(torch.nn.Module, self.model).to(device)

    def __call__(self, job: tuple[int, list[int]]) -> Calibration:
        """Calibrate on the windows of one part."""
        import torch

        from tokenbound.compression.calibration import CALIBRATION_SEED, collect_calibration

        part, windows = job
        corpus, plan = open_plan(self.text.corpus_root, self.text.spec)
        batch = gather(corpus, plan.windows(windows), self.text.spec.length)
        rows = max(1, CALIBRATION_BATCH_TOKENS // self.text.spec.length)
        batches = (
            (torch.from_numpy(batch.inputs[i : i + rows]), torch.from_numpy(batch.mask[i : i + rows]))
            for i in range(0, len(batch.inputs), rows)
        )
        return collect_calibration(self.model, batches, names=self.names, seed=CALIBRATION_SEED + part)


def _best_setting(
    encode: Callable[[CompressionMethod], ArtifactFile],
    space: SearchSpace,
    text: Text,
    base: str | None,
    place: str,
    folder: str | None,
) -> CompressionMethod:
    """Golden section on the freedman bound that each candidate would have on this corpus.

    Args:
        encode: writes a candidate to `place`.
        space: what is searched.
        text: the corpus.
        base: where the base of a delta is.
        place: of the candidates, one after the other.
        folder: `how.local_folder`.
    """
    from tokenbound.compression.rate import choose_rate

    windows = text.windows(CANDIDATE_TOKENS, skip=math.ceil(CALIBRATION_TOKENS / text.spec.length))
    tried: list[float] = []

    def bound_at(value: float) -> float:
        tried.append(value)
        made = encode(space.method(value))
        losses = score_artifact(ArtifactPlace(place, made.sha256, base, folder), text, windows)
        bound = bound_if_all(losses, made.num_bytes, text.num_tokens)
        logger.info("%s %.3g: %d bytes, predicted bound %.4f bits/token", space.setting, value, made.num_bytes, bound)
        return bound

    best = choose_rate(bound_at, space.low, space.high, max_tries=space.tries).rate
    if best in (min(tried), max(tried)):
        cure = f"; compress.{space.limits[best != min(tried)]} widens the search" if space.limits else ""
        logger.info("the best lies at an end of what was tried, %.3g to %.3g%s", min(tried), max(tried), cure)
    return space.method(best)


def compress_checkpoint(
    path: str, settings: CompressionMethod, run: RunConfig | None, base: str | None = None, *, out: str
) -> ArtifactFile:
    """Encode a checkpoint, or its change of a base, as a command; the run config names the corpus to calibrate on.

    Args:
        path: Hugging Face checkpoint; beside a base also the directory of a LoRA adapter.
        settings: a method of compression with its settings.
        run: its corpus and windows are what calibrates.
        base: as in `encode_checkpoint`.
        out: as in `encode_checkpoint`.

    Raises:
        InputError: the checkpoint cannot be read or encoded, or a method lacks its calibration text.
    """
    architecture = check_encoding(path, settings, base=base, has_text=run is not None)
    if run is not None:
        require_fit(architecture, check_corpus(run.what.corpus).max_id, run.what.windows.length)
    joined = () if run is None else (run.how.ray_address, run.how.ray_timeout_s)
    with executor().session(*joined), plain_errors():
        if run is None:
            return encode_checkpoint(path, settings, out=out, base=base)
        corpus = open_corpus(run.what.corpus, output=run.how.output, cache=run.how.cache)
        text, folder = text_of(corpus, run.what.windows), run.how.local_folder
        return encode_checkpoint(path, settings, out=out, base=base, corpus=run.what.corpus, text=text, folder=folder)
