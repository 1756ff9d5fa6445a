"""From a checkpoint to an artifact on Ray: calibration over windows of the corpus, one task per tensor to encode."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import ray

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
from tokenbound.engine.compress.predicted_bound import CALIBRATION_TOKENS, CANDIDATE_TOKENS, _score, bound_if_all
from tokenbound.engine.corpus import SEED, Text, check_corpus, open_corpus, text_of
from tokenbound.engine.evaluate.stages import open_plan
from tokenbound.errors import InputError
from tokenbound.models.quantized.schemes import scheme_of
from tokenbound.store.copies import local_copy
from tokenbound.store.filesystem import anchored

if TYPE_CHECKING:
    import torch

    from tokenbound.compression.calibration import Calibration
    from tokenbound.compression.tensor import CodedTensor
    from tokenbound.models.weights import Weights

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
    base: str | None = None,
    corpus: CorpusConfig | None = None,
    text: Text | None = None,
    work: str | None = None,
) -> bytes:
    """Encode a checkpoint; runs inside a Ray session.

    Args:
        path: Hugging Face checkpoint; beside a base also the directory of a LoRA adapter.
        settings: a method of compression with its settings; None means lossless.
        base: encode what the checkpoint changes of this one; checkpoint or artifact.
        corpus: its tokenizer goes into the artifact where it is `counted`.
        text: tokens to calibrate on, for the methods that need them.
        work: folder of finished calibrations and tensors, for the next start after a kill; None keeps none.

    Raises:
        InputError: the checkpoint cannot be read or encoded, does not fit the text, or a method lacks that.
    """
    from tokenbound.compression.artifact import assemble_artifact
    from tokenbound.compression.weight_delta import tensors_sha256

    chosen, path = settings or LosslessSettings(), anchored(path)
    content = _content(path, None if base is None else anchored(base), chosen)
    tensors, reference = content.tensors, content.reference
    if text is not None:
        require_fit(content.architecture, PreparedCorpus(text.corpus_root).manifest.rule.max_id, text.spec.length)
    tokenizer = None if corpus is None else counted_tokenizer(corpus)
    if text is None:
        _require_text(chosen)
    seen = None if text is None else [text.corpus_root, asdict(text.spec), text.num_tokens, CALIBRATION_TOKENS, SEED]
    identity = [version("tokenbound"), tensors_sha256(tensors), content.architecture, reference, seen]
    parts = Parts(work, identity)
    is_calibrated = chosen.needs_calibration and text is not None and not content.is_adapter
    calibration = _calibration(path, text, parts) if is_calibrated and text is not None else None
    task = partial(_encode_one, ray.put(tensors), ray.put(calibration))

    def encode(tried: CompressionMethod) -> bytes:
        coded = _encode(tensors, partial(task, tried), tried, parts)
        return assemble_artifact(content.architecture, coded, tried, tokenizer=tokenizer, base=reference)

    if not isinstance(chosen, SearchMethod):
        return encode(chosen)
    assert text is not None
    return _best_setting(encode, chosen.space(of_adapter=content.is_adapter), text, content)


def counted_tokenizer(corpus: CorpusConfig) -> bytes | None:
    """The tokenizer's bytes where an artifact must hold them."""
    if corpus.tokenizer_is == "given" or corpus.tokenizer is None:
        return None
    return load_tokenizer(corpus.tokenizer).files()


@dataclass(frozen=True)
class _Content:
    """What is encoded."""

    architecture: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    reference: dict[str, Any] | None = None
    """What a delta says of its base."""
    base: Weights | None = None

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
        checkpoint = read_checkpoint(local_copy(path), dense=not method.is_exact)
        _require_exact(checkpoint.architecture, method, path)
        return _Content(checkpoint.architecture, checkpoint.tensors)
    weights = read_base(local_copy(base))
    source = local_copy(path)
    architecture, delta = read_delta(source, weights, base_name=base)
    content = _Content(architecture, delta.tensors, delta.reference, weights, is_adapter(source))
    if content.is_adapter:
        _require_factors(method)
    return content


def _encode(
    tensors: Mapping[str, torch.Tensor],
    task: Callable[[str], CodedTensor],
    settings: CompressionMethod,
    parts: Parts,
) -> list[CodedTensor]:
    """All tensors coded, one task each; those whose parts are there are not coded again."""
    from tokenbound.compression.dtypes import dtype_code
    from tokenbound.compression.tensor import CodedTensor

    record = json.dumps(settings_record(settings))  # of a plugin its version is part of it

    def key(name: str) -> str:
        return f"tensor {name} {record}"

    kept = {name: parts.get(key(name)) for name in sorted(tensors)}
    found = {name: data for name, data in kept.items() if data is not None}
    missing = [name for name in kept if name not in found]
    with plain_errors():
        for name, coded in zip(missing, executor().map(task, missing), strict=True):
            found[name] = bytes([coded.codec]) + bytes(coded.payload)
            parts.put(key(name), found[name])
    return [
        CodedTensor(name, tuple(tensor.shape), dtype_code(tensor.dtype, name), found[name][0], found[name][1:])
        for name, tensor in tensors.items()
    ]


def _encode_one(
    tensors: ray.ObjectRef[dict[str, torch.Tensor]],
    calibration: ray.ObjectRef[Calibration | None],
    settings: CompressionMethod,
    name: str,
) -> CodedTensor:
    import torch

    from tokenbound.compression.tensor import encode_tensor

    torch.set_num_threads(1)
    return encode_tensor(name, ray.get(tensors)[name], settings, ray.get(calibration))


def _calibration(path: str, text: Text, parts: Parts) -> Calibration:
    """Second moments and Fisher factors over random windows: parts of `CALIBRATION_PART_TOKENS` on a pool of actors."""
    from tokenbound.compression.calibration import merge_calibrations, read_calibration, write_calibration

    windows = text.windows(CALIBRATION_TOKENS)
    count = min(-(-CALIBRATION_TOKENS // CALIBRATION_PART_TOKENS), len(windows))
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
    return merge_calibrations(read_calibration(data) for data in kept if data is not None)


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
    encode: Callable[[CompressionMethod], bytes], space: SearchSpace, text: Text, content: _Content
) -> bytes:
    """Golden section on the freedman bound that each candidate would have on this corpus."""
    from tokenbound.compression.rate import choose_rate

    windows = text.windows(CANDIDATE_TOKENS, skip=math.ceil(CALIBRATION_TOKENS / text.spec.length))
    base = None if content.base is None else ray.put(content.base)
    made: dict[float, bytes] = {}

    def bound_at(value: float) -> float:
        data = made[value] = encode(space.method(value))
        bound = bound_if_all(_score(data, text, windows, base), len(data), text.num_tokens)
        logger.info("%s %.3g: %d bytes, predicted bound %.4f bits/token", space.setting, value, len(data), bound)
        return bound

    best = choose_rate(bound_at, space.low, space.high, max_tries=space.tries).rate
    if best in (min(made), max(made)):
        cure = f"; compress.{space.limits[best != min(made)]} widens the search" if space.limits else ""
        logger.info("the best lies at an end of what was tried, %.3g to %.3g%s", min(made), max(made), cure)
    return made[best]


def compress_checkpoint(
    path: str,
    settings: CompressionMethod,
    run: RunConfig | None,
    base: str | None = None,
    *,
    work: str | None = None,
) -> bytes:
    """Encode a checkpoint, or its change of a base, as a command; the run config names the corpus to calibrate on.

    Args:
        path: Hugging Face checkpoint; beside a base also the directory of a LoRA adapter.
        settings: a method of compression with its settings.
        run: its corpus and windows are what calibrates.
        base: as in `encode_checkpoint`.
        work: folder of finished parts, for the next start after a kill; None keeps none.

    Raises:
        InputError: the checkpoint cannot be read or encoded, or a method lacks its calibration text.
    """
    architecture = check_encoding(path, settings, base=base, has_text=run is not None)
    if run is not None:
        require_fit(architecture, check_corpus(run.what.corpus).max_id, run.what.windows.length)
    joined = () if run is None else (run.how.ray_address, run.how.ray_timeout_s)
    with executor().session(*joined), plain_errors():
        if run is None:
            return encode_checkpoint(path, settings, base=base, work=work)
        corpus = open_corpus(run.what.corpus, output=run.how.output, cache=run.how.cache)
        text = text_of(corpus, run.what.windows)
        return encode_checkpoint(path, settings, base=base, corpus=run.what.corpus, text=text, work=work)
