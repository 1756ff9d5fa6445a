"""From a config to everything that is known before the first token is scored.

All that can be refused without paying for a replica is refused here.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenbound.bounds.decisions import TreeChoice
from tokenbound.bounds.lines import counts_documents
from tokenbound.certificate.control_variates import FEATURES, feature_rule, stored_features
from tokenbound.certificate.identity import (
    configuration,
    differences,
    drawing,
    fingerprint,
    scoring_identity,
    scoring_protocol,
)
from tokenbound.config.run import (
    BoundConfig,
    CorpusConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    WhatConfig,
    dump_config,
)
from tokenbound.corpus.ngram_features import Features, corpus_features
from tokenbound.corpus.prepared import Manifest, PreparedCorpus
from tokenbound.corpus.summary import CorpusDecisions
from tokenbound.corpus.windows import CorpusPlan, auto_shard_tokens, hashed_order, shard_slices, whole_batches
from tokenbound.engine.artifacts import named_artifact
from tokenbound.engine.cluster.executor import executor
from tokenbound.engine.cluster.session import plain_errors
from tokenbound.engine.compress.run import check_encoding, counted_tokenizer, encode_checkpoint, require_fit
from tokenbound.engine.corpus import Text, check_corpus, open_corpus, text_of
from tokenbound.engine.evaluate.decisions import corpus_decisions, counted_lengths
from tokenbound.engine.evaluate.graph import Shard
from tokenbound.engine.evaluate.stages import WindowSpec, open_plan
from tokenbound.engine.evaluate.weights_form import check_form
from tokenbound.errors import InputError, MismatchError
from tokenbound.models.quantized.schemes import require_package
from tokenbound.store import filesystem as files
from tokenbound.store.copies import local_copy
from tokenbound.store.draws import Register, Selection
from tokenbound.store.filesystem import anchored
from tokenbound.store.run import ARTIFACT, PLAN, RunDirectory
from tokenbound.store.uri import join, split

if TYPE_CHECKING:
    from tokenbound.compression.artifact_file import ArtifactFile

logger = logging.getLogger(__name__)

ENCODING = "encoding"
"""Folder of the run directory where an artifact is made."""

SAMPLED_SHARD_TOKENS = 1 << 15
"""Scored tokens of a sampled run's shard under `auto`: small, so that a sample stops close to its target."""

COUNTED_TOKENS_PER_ID = 10_000
"""From so many tokens of a corpus for each id on, the tree of decisions is made from counts: its code lengths, about
five bits for each id, then add a thousandth of a bit per token or less to what the tree saves."""

BYTES_PER_TOKEN = 10
"""Disk to ask for before scoring; real losses take about 8.4 bytes per token."""

TABLE_BYTES = 1024
"""Disk to ask for beside them for the table of a window's decisions; those of the demo take 220 bytes."""


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the first token is scored."""

    config: RunConfig
    run: RunDirectory
    corpus: PreparedCorpus
    plan: CorpusPlan
    spec: WindowSpec
    artifact: ArtifactFile
    architecture: dict[str, Any]
    protocol: dict[str, Any]
    identity: dict[str, Any]
    shard_tokens: int
    shard_batch: int
    """Windows of which a shard takes whole multiples where it can."""
    earlier: tuple[str, ...] = ()
    """Scoring fingerprints of this run when its corpus was shorter; shards that were committed then stand."""
    other_weights: tuple[str, ...] = ()
    """Weight files beside those of the checkpoint, which were not read."""
    tree: TreeChoice | None = None
    """Along which decisions are scored; None where they are not."""
    features: Features | None = None
    """Of every window of the corpus, where a sample has control variates."""
    selection: Selection | None = None
    """The run's place in the register of draws, which it has before anything is scored."""

    @property
    def bound(self) -> BoundConfig:
        """The claim with its ordinal."""
        assert self.selection is not None, "the run was not entered in the register of draws"
        return self.config.what.bound.numbered(self.selection.ordinal)

    @property
    def fingerprint(self) -> str:
        """The scoring fingerprint."""
        return fingerprint(self.identity)

    @property
    def num_documents(self) -> int | None:
        """Documents with a scored token, where the claim has a line for documents."""
        return self.plan.num_sequences if counts_documents(self.config.what.bound.methods) else None

    def decisions(self, vocab_size: int) -> CorpusDecisions | None:
        """How many decisions the windows have, where a sample is drawn that needs to know."""
        if self.tree is None or self.config.what.sample.is_full:
            return None
        return corpus_decisions(self.corpus.root, self.spec, self.tree, vocab_size)

    def shards(self, num_windows: int | None) -> list[Shard]:
        """The shards of the whole corpus, or of the first windows of the draw."""
        if num_windows is None:
            slices = shard_slices(self.plan, self.shard_tokens, self.shard_batch)
            return [Shard(i, np.arange(start, stop)) for i, (start, stop) in enumerate(slices)]
        order = self.drawn(num_windows)
        step = sampled_shard_windows(self.plan, self.shard_tokens, self.shard_batch)
        return [Shard(i, order[start : start + step]) for i, start in enumerate(range(0, len(order), step))]

    def drawn(self, num_windows: int) -> NDArray[np.int64]:
        """The first windows of the draw, in its order."""
        return hashed_order(
            self.plan.num_windows,
            artifact_sha256=self.identity["artifact_sha256"],
            corpus_sha256=self.identity["corpus_sha256"],
            fingerprint=self.fingerprint,
            seed=self.config.what.sample.seed,
            first=num_windows,
        )


@dataclass(frozen=True)
class Given:
    """An artifact that a config names."""

    artifact: ArtifactFile
    base: dict[str, str] | None
    """Digests of the base that it changes; None for a whole model."""


def _given(artifact: ArtifactFile, what: WhatConfig) -> Given:
    require_tokenizer(artifact, what.corpus)
    return Given(artifact, base_identity(artifact, what.model))


def check_run(config: RunConfig) -> Given | None:
    """Refuse what can be refused without Ray; reads neither the corpus nor the tensors of a checkpoint.

    Returns:
        The artifact; None where one is to be made from a checkpoint.

    Raises:
        InputError: corpus, tokenizer or model cannot be used.
        MismatchError: another base than the artifact was made on.
    """
    what, given = config.what, None
    rule = check_corpus(what.corpus)
    if what.model.artifact is not None:
        given = _given(named_artifact(what.model.artifact, folder=config.how.local_folder), what)
        architecture = given.artifact.architecture
    else:
        assert what.model.checkpoint is not None
        architecture = check_encoding(what.model.checkpoint_place, what.model.compress, base=what.model.base)
    check_model(architecture, rule.max_id, what.windows.length)
    check_form(config.how, what, architecture)
    return given


def check_place(config: RunConfig, given: Given | None) -> None:
    """Refuse an output that cannot be written or holds another run, as far as it shows without the corpus.

    Raises:
        InputError: it cannot be written.
        MismatchError: the run there has another artifact or protocol.
    """
    files.require_writable(config.how.output, field="how.output")
    files.remove_abandoned(config.how.output)
    what, run = config.what, RunDirectory(config.how.output)
    if not run.exists("plan.json"):
        return
    known = {"protocol": scoring_protocol(what.model, what.corpus, what.windows), **drawing(what.sample)}
    if what.bound.tree in ("zipf", "balanced") or not what.bound.scores_decisions:
        known["tree"] = {"name": what.bound.tree} if what.bound.scores_decisions else None
    if given is not None:
        known["artifact_sha256"] = given.artifact.sha256
    found = run.plan().get("scoring_identity", {})
    _require_same_run(run, {name: found.get(name) for name in known}, known)


def _require_same_run(run: RunDirectory, found: dict[str, Any], ours: dict[str, Any]) -> None:
    if found != ours:
        raise MismatchError(
            f"{run.uri} holds another run: {differences(found, ours)} differs; choose another how.output"
        )


def prepare(config: RunConfig, given: Given | None = None) -> Prepared:
    """Tokenise what is new, encode the model, plan, and open or create the run directory.

    Args:
        config: the run.
        given: the artifact, as `check_run` read it; None where it is to be read or made.

    Raises:
        InputError: something cannot be used; found before anything is paid for.
        MismatchError: the run directory belongs to other inputs.
    """
    run = RunDirectory(config.how.output)
    config = _as_begun(config, run)
    what = config.what
    corpus = open_corpus(what.corpus, output=config.how.output, cache=config.how.cache)
    text = text_of(corpus, what.windows)
    spec = text.spec
    plan = open_plan(corpus.root, spec)[1]
    require_tokens(plan)
    given = given or _given(load_artifact(config, text, out=encoding_place(config)), what)
    artifact, architecture, base = given.artifact, given.artifact.architecture, given.base
    check_model(architecture, corpus.manifest.rule.max_id, what.windows.length)
    protocol = scoring_protocol(what.model, what.corpus, what.windows)
    tree = tree_choice(what, corpus, architecture)
    *earlier, identity = identities(what, artifact.sha256, corpus.manifest, base, tree)
    check_growth(what, len(corpus.manifest.segments) - 1)
    register, wanted = register_of(corpus.root, corpus.manifest), configuration(what, [*earlier, identity])
    register.check(wanted, what.bound.trial)
    prepared = Prepared(
        config,
        run,
        corpus,
        plan,
        spec,
        artifact,
        architecture,
        protocol,
        identity,
        shard_tokens_of(config, plan),
        what.windows.batch,
        tuple(map(fingerprint, earlier)),
        _other_weights(what.model),
        tree,
    )
    prepared = replace(prepared, features=_features(prepared))
    try:
        prepared = _open_run(prepared)
    except MismatchError:
        _remove_encoding(config)
        raise
    _remove_encoding(config)
    return replace(prepared, selection=register.assign(wanted, what.bound.trial))


def _as_begun(config: RunConfig, run: RunDirectory) -> RunConfig:
    """The config, without control variates where the run there was begun without: its certificate keeps its form."""
    sample = config.what.sample
    if not (sample.has_controls and run.exists(PLAN)) or "features_sha256" in run.plan():
        return config
    without = sample.model_copy(update={"control_variates": "none"})
    return config.model_copy(update={"what": config.what.model_copy(update={"sample": without})})


def _features(prepared: Prepared) -> Features | None:
    """The features of the windows, where a sample has control variates: of the run there, or computed."""
    if not prepared.config.what.sample.has_controls:
        return None
    run = prepared.run
    begun = run.plan().get("features_sha256") if run.exists(PLAN) else None
    if begun is not None:
        return stored_features(run, begun)
    rule = feature_rule(prepared.corpus.manifest, prepared.config.what.windows)
    started = time.monotonic()
    with plain_errors():
        found = corpus_features(prepared.corpus.root, rule, executor().map)
    logger.info("computed control variates of %d windows in %.1f s", len(found.table), time.monotonic() - started)
    return found


def register_of(corpus_root: str, manifest: Manifest) -> Register:
    """The register of draws of a corpus, beside its prepared form: whatever names these tokens, it is one corpus."""
    return Register(split(corpus_root)[0], [corpus.stream_sha256 for corpus in manifest.prefixes()])


def identities(
    what: WhatConfig,
    artifact_sha256: str,
    manifest: Manifest,
    base: dict[str, str] | None,
    tree: TreeChoice | None = None,
) -> list[dict[str, Any]]:
    """The scoring identity of a run, behind those it had while its corpus was shorter.

    Windows and shards restart at every segment, so what was scored of a shorter corpus is part of the longer one's
    ledger. A sample is drawn afresh from a longer corpus and has no earlier identity.
    """
    protocol = scoring_protocol(what.model, what.corpus, what.windows)
    corpora = manifest.prefixes() if what.sample.is_full else [manifest]
    return [
        scoring_identity(
            artifact_sha256=artifact_sha256,
            corpus_sha256=corpus.corpus_sha256,
            tokens_sha256=corpus.tokens_sha256,
            protocol=protocol,
            sample=what.sample,
            base=base,
            tree=None if tree is None else tree.to_dict(),
        )
        for corpus in corpora
    ]


def tree_choice(what: WhatConfig, corpus: PreparedCorpus, architecture: Mapping[str, Any]) -> TreeChoice | None:
    """The tree along which a run scores decisions; None where no bound asks for them.

    A tree from counts is that of the corpus's first segment, so that it stays the same when the corpus grows. `auto`
    takes one where its code lengths, some bits for each id, weigh little against the tokens.

    Raises:
        InputError: a tree from counts for a model whose config does not say how many ids it predicts.
    """
    if not what.bound.scores_decisions:
        return None
    size, asked = architecture.get("vocab_size"), what.bound.tree
    if asked == "auto":
        tokens = corpus.manifest.segments[0].tokens
        asked = "counts" if isinstance(size, int) and tokens >= COUNTED_TOKENS_PER_ID * size else "zipf"
    if asked != "counts":
        return TreeChoice(asked)
    if not isinstance(size, int):
        raise InputError(
            "what.bound.tree: counts: the model's config has no `vocab_size` up to which to count ids; choose zipf or "
            "balanced"
        )
    return TreeChoice("counts", counted_lengths(corpus, size))


def check_growth(what: WhatConfig, times: int) -> None:
    """Refuse what takes the corpus for fixed where it has grown.

    Raises:
        InputError: a document line, or a declared number of tokens.
    """
    if times == 0:
        return
    objection = what.objection(times_grown=times)
    if objection is not None:
        raise InputError(f"what.bound.methods: {objection}")
    if what.bound.declared_tokens is not None:
        raise InputError(
            f"what.bound.declared_tokens: the corpus grew {times} times, so its size was not fixed beforehand; leave "
            "it out"
        )


def require_tokens(plan: CorpusPlan) -> None:
    """Refuse a corpus in which nothing can be predicted.

    Raises:
        InputError: no token has a context.
    """
    if plan.num_tokens == 0:
        raise InputError(
            "the corpus has no token to score with a context to predict it from; give more text, set corpus.add_bos: "
            "true, or correct the columns of the answers"
        )


def shard_tokens_of(config: RunConfig, plan: CorpusPlan) -> int:
    """Scored tokens per shard, as the config asks or as this corpus suggests."""
    asked = config.what.windows.shard_tokens
    if asked != "auto":
        return asked
    return auto_shard_tokens(plan.num_tokens) if config.what.sample.is_full else SAMPLED_SHARD_TOKENS


def sampled_shard_windows(plan: CorpusPlan, shard_tokens: int, batch: int) -> int:
    """Windows of a sampled run's shard: so many that the longest fit, in whole batches where one does."""
    return whole_batches(shard_tokens // max(1, plan.max_window_tokens), batch)


def load_artifact(config: RunConfig, text: Text, *, out: str) -> ArtifactFile:
    """The artifact that is scored and paid for: the one that is named, or one made from a checkpoint.

    Args:
        config: the run.
        text: its corpus.
        out: where to make it.

    Raises:
        InputError: there is no such artifact or checkpoint, or it cannot be encoded.
    """
    model, corpus, folder = config.what.model, config.what.corpus, config.how.local_folder
    if model.artifact is not None:
        return named_artifact(model.artifact, folder=folder)
    assert model.checkpoint is not None
    place, settings = model.checkpoint_place, model.compress
    return encode_checkpoint(place, settings, out=out, base=model.base, corpus=corpus, text=text, folder=folder)


def encoding_place(config: RunConfig) -> str:
    """Where a run makes its artifact before it is known whether the run directory is its own."""
    return join(config.how.output, ENCODING, ARTIFACT)


def _remove_encoding(config: RunConfig) -> None:
    """Remove what is left where the artifact was made; it lies in the run directory now, or belongs to another run."""
    files.delete_folder(*files.resolve(split(encoding_place(config))[0]))


def _other_weights(model: ModelConfig) -> tuple[str, ...]:
    from tokenbound.models.checkpoint import other_weights

    if model.artifact is not None or model.checkpoint is None:
        return ()
    return tuple(other_weights(local_copy(anchored(model.checkpoint_place))))


def base_identity(artifact: ArtifactFile, model: ModelConfig) -> dict[str, str] | None:
    """Digests of the base that a delta changes; None for a whole model.

    Raises:
        InputError: a delta without its base, a base without a delta, or a base that is not there.
        MismatchError: another base than the delta was made on.
    """
    from tokenbound.models.weights import read_base

    reference = artifact.base
    if reference is None:
        if model.base is not None:
            raise InputError(f"what.model.base: {model.base} is given, but the artifact is no delta; remove `base`")
        return None
    if model.base is None:
        raise InputError(
            f"what.model.artifact is a delta on a base with digest {reference.get('sha256')}; name it in "
            "what.model.base and say in what.model.base_is_independent how it was fixed"
        )
    found = read_base(local_copy(anchored(model.base))).identity
    if found["sha256"] != reference.get("sha256"):
        raise MismatchError(
            f"what.model.base: {model.base} has digest {found['sha256']}, but the delta was made on "
            f"{reference.get('sha256')}; give that base"
        )
    return found


def require_tokenizer(artifact: ArtifactFile, corpus: CorpusConfig) -> None:
    """See that a counted tokenizer is inside an artifact.

    Raises:
        InputError: it is not.
    """
    tokenizer = counted_tokenizer(corpus)
    if tokenizer is not None and artifact.tokenizer != tokenizer:
        raise InputError(
            "corpus.tokenizer_is: counted, but the artifact does not hold this tokenizer; encode it again or "
            "declare it given"
        )


def artifact_plugins(artifact: ArtifactFile) -> dict[str, dict[str, str]]:
    """The plugin that encoded an artifact, as it is declared on a certificate; empty for the built-in methods."""
    from tokenbound.compression.methods import plugins_of

    return plugins_of(artifact.settings)


def check_model(architecture: dict[str, Any], max_id: int, length: int) -> None:
    """What the architecture alone refuses, before an actor starts.

    Raises:
        InputError: ids outside the vocabulary, windows longer than the model's positions, or a quantization whose
            package is not installed.
    """
    require_package(architecture)
    require_fit(architecture, max_id, length)


def _open_run(prepared: Prepared) -> Prepared:
    """Create the run directory, or check that it is this run's, on this corpus or an earlier part of it."""
    run, plan = prepared.run, prepared.plan
    if run.exists("plan.json"):
        found = run.plan()
        # Shards stay as they were first cut: runs whose plan names no batch did not look at it.
        prepared = replace(prepared, shard_tokens=found["shard_tokens"], shard_batch=found.get("shard_batch", 1))
        if found.get("scoring_fingerprint") == prepared.fingerprint:
            return prepared
        if found.get("scoring_fingerprint") not in prepared.earlier:
            _require_same_run(run, found.get("scoring_identity", {}), prepared.identity)
        logger.info("the corpus grew from %d to %d tokens", found["num_tokens"], plan.num_tokens)
    _require_space(prepared)
    _store_artifact(run, prepared.artifact)
    run.write("config.yaml", dump_config(prepared.config).encode())
    tree = {
        "scoring_fingerprint": prepared.fingerprint,
        "scoring_identity": prepared.identity,
        "corpus_root": prepared.corpus.root,
        "num_windows": plan.num_windows,
        "num_tokens": plan.num_tokens,
        "max_window_tokens": plan.max_window_tokens,
        "shard_tokens": prepared.shard_tokens,
        "shard_batch": prepared.shard_batch,
        "segments": [[file.name for file in segment.files] for segment in prepared.corpus.manifest.segments],
    }
    if prepared.features is not None:
        run.write(FEATURES, prepared.features.data)
        tree["features_sha256"] = prepared.features.sha256
    run.write_json(PLAN, tree)
    return prepared


def _store_artifact(run: RunDirectory, artifact: ArtifactFile) -> None:
    """Put the artifact into the run directory, as the bytes that were hashed."""
    if artifact.path is None:
        run.write(ARTIFACT, artifact.read())
        return
    target = Path(run.path(ARTIFACT))
    if files.is_local(run.filesystem) and artifact.path.is_relative_to(target.parent / ENCODING):
        artifact.move_to(target)
        return
    with artifact.stream() as source:
        files.write_stream(run.filesystem, run.path(ARTIFACT), source)


def _require_space(prepared: Prepared) -> None:
    if not files.is_local(prepared.run.filesystem):
        return
    folder = Path(prepared.run.root)
    folder.mkdir(parents=True, exist_ok=True)
    count = sample_size(prepared)
    tokens = prepared.plan.num_tokens if count is None else count * prepared.plan.max_window_tokens
    tables = 0 if prepared.tree is None else TABLE_BYTES * (prepared.plan.num_windows if count is None else count)
    needed, free = tokens * BYTES_PER_TOKEN + tables + prepared.artifact.num_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"how.output {prepared.run.uri}: {needed:,} bytes are needed for the losses and {free:,} are free; "
            "choose another disk"
        )


def sample_size(prepared: Prepared) -> int | None:
    """Windows to draw; None for all of them."""
    return drawn_windows(prepared.config.what.sample, prepared.plan.num_windows)


def drawn_windows(sample: SampleConfig, total: int) -> int | None:
    """Windows to draw of so many; None for all of them. A sample needs windows beyond its pilot.

    Raises:
        InputError: the corpus is no larger than the pilot.
    """
    if sample.is_full:
        return None
    if sample.pilot_windows >= total:
        raise InputError(
            f"sample.pilot_windows {sample.pilot_windows} leaves nothing of {total} windows to draw; score "
            "everything (sample.windows: null)"
        )
    return total if sample.windows is None else min(sample.windows, total)
