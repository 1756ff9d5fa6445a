"""Every night: what is new in the corpus or among the models is scored, certificates are extended, a history grows.

With every token scored the bound holds for all sizes of the corpus and all models at once, so a night costs no
confidence. A sample is drawn afresh from every longer corpus: the j-th draw spends 1/(j(j+1)) of the sampling's
share of delta, and each model counts as a trial. The register of draws beside the prepared corpus counts both, together
with what `evaluate` and `sweep` tried there.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tokenbound.certificate.identity import claim_identity, configuration, declarations, fingerprint
from tokenbound.certificate.record import CertificateRecord
from tokenbound.config.run import RunConfig, validate
from tokenbound.corpus.prepare import unprepared_files
from tokenbound.corpus.prepared import Manifest, load_manifest
from tokenbound.errors import InputError, WorseError
from tokenbound.gguf_file import parts_of
from tokenbound.report.history_report import PAGE as HISTORY_PAGE
from tokenbound.report.history_report import write_history
from tokenbound.report.html import report_name, write_report
from tokenbound.report.words import remarks
from tokenbound.store import filesystem as files
from tokenbound.store.copies import model_files
from tokenbound.store.history import HistoryEntry, append_history, read_history
from tokenbound.store.lease import lease
from tokenbound.store.patterns import matching_places
from tokenbound.store.run import CERTIFICATE, RunDirectory, canonical_json, claim_file, sha256_hex
from tokenbound.store.uri import base_name, is_uri, join, split

if TYPE_CHECKING:
    from tokenbound.compression.artifact_file import ArtifactFile

logger = logging.getLogger(__name__)

CONFIG = "config.json"

A = TypeVar("A")
B = TypeVar("B")


def expand_models(tree: Mapping[str, Any], *, origin: str) -> list[RunConfig]:
    """One run for every model that a config names: `what.model.artifact` or `checkpoint` may be a list, or globs.

    Raises:
        InputError: a glob that matches nothing, or a config that cannot be used.
    """
    section = tree.get("what", {}).get("model", {}) if isinstance(tree.get("what"), dict) else {}
    key = next((name for name in ("artifact", "checkpoint") if isinstance(section, dict) and section.get(name)), None)
    if key is None:
        return [validate(RunConfig, dict(tree), origin=origin)]
    named = section[key] if isinstance(section[key], list) else [section[key]]
    names = [name for pattern in named for name in _matches(str(pattern), key)]
    runs = []
    for name in dict.fromkeys(names):
        one = copy.deepcopy(dict(tree))
        one["what"]["model"][key] = name
        runs.append(validate(RunConfig, one, origin=origin))
    return runs


def _matches(pattern: str, key: str) -> list[str]:
    if not any(letter in (pattern.partition("?")[0] if is_uri(pattern) else pattern) for letter in "*?["):
        return [pattern]
    if not is_uri(pattern):
        found = sorted(glob(pattern))  # noqa: PTH207 - may be absolute
    elif key == "checkpoint":  # object stores have no folders, but every checkpoint has this file
        found = [split(place)[0] for place in matching_places(join(pattern, CONFIG))]
    else:
        found = matching_places(pattern)
    if not found:
        raise InputError(f"what.model.{key}: {pattern!r} matches nothing; give a path, a list, or another glob")
    return found


@dataclass(frozen=True)
class Night:
    """One launch: where it happens, what the config asks for, and what was there before."""

    home: RunDirectory
    runs: Sequence[RunConfig]
    corpus_root: str
    cache: str

    @classmethod
    def of(cls, runs: Sequence[RunConfig]) -> Night:
        """The launch of some runs that differ in their model alone."""
        from tokenbound.engine.corpus import cache_place, corpus_root

        how, corpus = runs[0].how, runs[0].what.corpus
        return cls(
            RunDirectory(how.output),
            runs,
            corpus_root(corpus, how.output, how.cache),
            cache_place(how.output, how.cache),
        )


def reevaluate(
    runs: Sequence[RunConfig],
    *,
    fail_if_worse: float | None = None,
    on_certificate: Callable[[CertificateRecord, str], None] | None = None,
) -> list[HistoryEntry]:
    """Certify what is new. Nothing new costs a few seconds and starts no Ray.

    Args:
        runs: one for each model (:func:`expand_models`), alike in everything else.
        fail_if_worse: bits per token by which a new bound may exceed the one before it in the history.
        on_certificate: told each new certificate and its path.

    Returns:
        The new entries of the history, in order.

    Raises:
        InputError, MismatchError: as for `evaluate`; a corpus file that changed under its name is a mismatch.
        IncompleteError: another launch is at work in the same place.
        WorseError: a new bound is worse than allowed; everything has been written by then.
    """
    night = Night.of(runs)
    with lease(night.home):
        files.remove_abandoned(night.home.uri)
        before = read_history(night.home)
        known = {entry.claim_fingerprint for entry in before}
        entries = []
        for certificate, path in _certificates(night):
            _complete_report(certificate, path)
            if certificate.claim_fingerprint in known:
                continue
            place = night.home.relative(path)
            entries.append(HistoryEntry.of(certificate.model_dump(mode="json"), place, " ".join(remarks(certificate))))
            append_history(night.home, entries[-1])
            if on_certificate is not None:
                on_certificate(certificate, path)
        if entries or (before and not night.home.exists(HISTORY_PAGE)):
            write_history(night.home, read_history(night.home))
    _require_no_worse(before, entries, fail_if_worse)
    return entries


def _complete_report(certificate: CertificateRecord, path: str) -> None:
    """Write the page of a certificate that has none, because its run was killed between the two."""
    from tokenbound.report.details import run_details

    run = RunDirectory(split(path)[0])
    if not run.exists(report_name(base_name(path))):
        write_report(run, certificate, run_details(run, certificate))


def _certificates(night: Night) -> Iterator[tuple[CertificateRecord, str]]:
    """The present certificate of every model, made where it is not there yet."""
    if not unprepared_files(night.runs[0].what.corpus, night.corpus_root, run=_threads):
        manifest = load_manifest(night.corpus_root)
        found = [None if manifest is None else _present(night, run, manifest) for run in night.runs]
        if all(item is not None for item in found):
            yield from (item for item in found if item is not None)
            return
    yield from _made(night)


def _made(night: Night) -> Iterator[tuple[CertificateRecord, str]]:
    from tokenbound.engine.cluster.executor import executor
    from tokenbound.engine.corpus import open_corpus
    from tokenbound.engine.evaluate.preparation import check_run
    from tokenbound.engine.evaluate.run import evaluate

    for run in night.runs:
        if run.what.model.artifact is not None or _artifact(night, run) is None:
            check_run(run)
    how = night.runs[0].how
    with executor().session(how.ray_address, how.ray_timeout_s):
        corpus = open_corpus(night.runs[0].what.corpus, output=night.home.uri, cache=night.cache)
        for run in night.runs:
            artifact = _artifact(night, run) or _encode(night, run)
            present = _present(night, run, corpus.manifest)
            if present is not None:
                yield present
                continue
            found: list[tuple[CertificateRecord, str]] = []
            placed = _placed(night, run, artifact.sha256, corpus.manifest)
            evaluate(placed, on_certificate=lambda certificate, path: found.append((certificate, path)))  # noqa: B023
            yield from found


def _present(night: Night, run: RunConfig, manifest: Manifest) -> tuple[CertificateRecord, str] | None:
    """The certificate of a model on the corpus as it is, and its path; None where there is none yet."""
    from tokenbound.corpus.prepared import PreparedCorpus
    from tokenbound.engine.evaluate.preparation import (
        artifact_plugins,
        base_identity,
        identities,
        register_of,
        tree_choice,
    )

    artifact = _artifact(night, run)
    if artifact is None:
        return None
    placed = _placed(night, run, artifact.sha256, manifest)
    what, place = placed.what, RunDirectory(placed.how.output)
    tree = tree_choice(what, PreparedCorpus(night.corpus_root), artifact.architecture)
    known = identities(what, artifact.sha256, manifest, base_identity(artifact, what.model), tree)
    selection = register_of(night.corpus_root, manifest).look_up(configuration(what, known), what.bound.trial)
    if selection is None:
        return None
    bound = what.bound.numbered(selection.ordinal)
    declared = declarations(what, artifact_plugins(artifact))
    claim = fingerprint(claim_identity(fingerprint(known[-1]), bound, declared, what.sample))
    for name in (CERTIFICATE, claim_file(claim)):
        if place.exists(name) and place.read_json(name).get("claim_fingerprint") == claim:
            return CertificateRecord.load(place.place(name)), place.place(name)
    return None


def _placed(night: Night, run: RunConfig, artifact_sha256: str, manifest: Manifest) -> RunConfig:
    """The run of one model: its own directory, and of a sample the ordinal of the draw."""
    from tokenbound.engine.evaluate.preparation import register_of

    what, output = run.what, _place(night.home, artifact_sha256)
    if not what.sample.is_full:
        draw = register_of(night.corpus_root, manifest).evaluation()
        what = what.model_copy(update={"sample": what.sample.model_copy(update={"evaluation": draw})})
        output = night.home.place(f"models/{artifact_sha256[:16]}/draw-{draw:05d}")
    if what.model.checkpoint is not None:
        kept = {"artifact": _encoded_path(night, run), "checkpoint": None, "compress": None}
        what = what.model_copy(update={"model": what.model.model_copy(update=kept)})
    how = run.how.model_copy(update={"output": output, "cache": night.cache})
    return RunConfig(what=what, how=how)


def _place(home: RunDirectory, artifact_sha256: str) -> str:
    """Where a model is scored: the place itself if `evaluate` has begun there with this model, else a folder of it."""
    if home.exists("plan.json"):
        identity = home.plan().get("scoring_identity", {})
        if identity.get("artifact_sha256") == artifact_sha256:
            return home.uri
    return home.place(f"models/{artifact_sha256[:16]}")


def _artifact(night: Night, run: RunConfig) -> ArtifactFile | None:
    """The artifact of a model; None for a checkpoint that has not been encoded yet."""
    from tokenbound.engine.artifacts import named_artifact

    folder = run.how.local_folder
    if run.what.model.artifact is not None:
        return named_artifact(run.what.model.artifact, folder=folder)
    place = _encoded_path(night, run)
    return named_artifact(place, folder=folder, field="artifact") if files.exists(*files.resolve(place)) else None


def _encode(night: Night, run: RunConfig) -> ArtifactFile:
    """Encode a checkpoint once, on the corpus as it is, and keep the artifact: it is one hypothesis for all nights."""
    from tokenbound.corpus.prepared import PreparedCorpus
    from tokenbound.engine.corpus import text_of
    from tokenbound.engine.evaluate.preparation import load_artifact

    text = text_of(PreparedCorpus(night.corpus_root), run.what.windows)
    return load_artifact(run, text, out=_encoded_path(night, run))


def _encoded_path(night: Night, run: RunConfig) -> str:
    """Where the artifact of a checkpoint is kept; the name tells checkpoints and ways of encoding apart."""
    model = run.what.model
    assert model.checkpoint is not None
    asked = model.model_dump(mode="json", include={"compress", "base", "dtype"})
    key = sha256_hex(canonical_json([_checkpoint_digest(model.checkpoint_place), asked, run.what.corpus.tokenizer_is]))
    return night.home.place(f"artifacts/{base_name(model.checkpoint)}-{key[:16]}.tokenbound")


def _checkpoint_digest(checkpoint: str) -> str:
    """Digest of a checkpoint's files, in a store of their names, sizes and times; a hub id stands for itself."""
    if is_uri(checkpoint):
        infos = [[base_name(info.path), info.size, info.mtime_ns] for info in model_files(checkpoint)]
        return sha256_hex(canonical_json(infos))
    folder = Path(checkpoint)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.is_file())
    elif folder.is_file():
        files = parts_of(folder)
    else:
        return checkpoint
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _require_no_worse(before: Sequence[HistoryEntry], new: Sequence[HistoryEntry], allowed: float | None) -> None:
    """Compare each new bound with the one before it.

    Raises:
        WorseError: one is worse than allowed, or there is none any more.
    """
    previous = before[-1] if before else None
    for entry in new:
        if allowed is not None and previous is not None and previous.bound_bits is not None:
            if entry.bound_bits is None:
                raise WorseError(f"{entry.model}: no bound on the loss; before it was {previous.bound_bits:.4f} bits")
            worse = entry.bound_bits - previous.bound_bits
            if worse > allowed:
                raise WorseError(
                    f"{entry.model}: the bound rose by {worse:.4f} bits/token to {entry.bound_bits:.4f}; "
                    f"--fail-if-worse allows {allowed:g}"
                )
        previous = entry


def _threads(function: Callable[[A], B], items: Iterable[A]) -> Iterable[B]:
    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(function, items)
