"""The main job: a config in, a certificate out; resumable at every shard."""

from __future__ import annotations

import logging
import math
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any

import ray

from tokenbound.bounds.claim import Claim, SamplingPlan
from tokenbound.bounds.sampling import first_prefix
from tokenbound.certificate.control_variates import feature_rule, with_controls
from tokenbound.certificate.derived import claim_of, derived_fields
from tokenbound.certificate.identity import applied_protocol, claim_identity, declarations, fingerprint, smallest_batch
from tokenbound.certificate.record import CertificateRecord, ControlVariatesRecord, SamplingRecord, SelectionRecord
from tokenbound.certificate.reduce import Reduction, RunLedger, reduce_ledger, reduced_columns
from tokenbound.config.run import RunConfig
from tokenbound.corpus.summary import corpus_section
from tokenbound.engine.cluster.executor import executor
from tokenbound.engine.cluster.metrics import count_halving, count_shard
from tokenbound.engine.cluster.progress import TokenProgress
from tokenbound.engine.cluster.ray_map import ray_map
from tokenbound.engine.cluster.session import plain_errors
from tokenbound.engine.evaluate.graph import Placement, Shard, score_shards
from tokenbound.engine.evaluate.preparation import (
    Prepared,
    artifact_plugins,
    check_place,
    check_run,
    prepare,
    sample_size,
)
from tokenbound.engine.evaluate.stages import CommitShard, ReadShard, ReplicaSpec
from tokenbound.engine.evaluate.weights_form import place_replicas_in_form
from tokenbound.errors import IncompleteError, MismatchError, ReplicaOutOfMemory, TokenboundError
from tokenbound.models.quantized.schemes import arithmetic_of, scheme_of
from tokenbound.report.details import run_details
from tokenbound.report.html import write_report
from tokenbound.store.filesystem import anchored
from tokenbound.store.run import (
    ARTIFACT,
    CERTIFICATE,
    CommitRecord,
    RunDirectory,
    claim_file,
    losses_sha256,
    missing_shards,
    scoring_environments,
)

if TYPE_CHECKING:
    from tokenbound.compression.artifact_file import ArtifactFile
    from tokenbound.models.forms import Form

logger = logging.getLogger(__name__)

SERIAL_SHARDS = 4
"""So few shards are reduced faster in one process than by starting others."""

SLACK_GROWTH = 1.5
"""A run that scores until its slack is small grows its sample by this factor between looks."""


def evaluate(
    config: RunConfig, *, on_certificate: Callable[[CertificateRecord, str], None] | None = None
) -> CertificateRecord:
    """Score what is not yet scored, reduce, and write the certificate and its report.

    Args:
        config: the run.
        on_certificate: told the certificate and its path.

    Raises:
        InputError: config, corpus or model cannot be used.
        IncompleteError: planned shards are missing afterwards.
        MismatchError: the run directory belongs to other inputs, or windows could not be scored.
    """
    given = check_run(config)
    check_place(config, given)
    with executor().session(config.how.ray_address, config.how.ray_timeout_s):
        prepared = prepare(config, given)
        with _failure_noted(prepared.run):
            count = _score_all(prepared)
            certificate = _certify(prepared, prepared.shards(count), count)
    path = _publish(prepared.run, certificate)
    if on_certificate is not None:
        on_certificate(certificate, path)
    return certificate


@contextmanager
def _failure_noted(run: RunDirectory) -> Iterator[None]:
    """Keep why a run ended without a certificate, for `tokenbound status`."""
    try:
        yield
    except TokenboundError as error:
        with suppress(OSError, IncompleteError):  # the store itself may be what failed
            run.log_progress(event="failed", reason=str(error))
        raise


def _score_all(prepared: Prepared) -> int | None:
    """Score what the config asks for; the size of the sample, None where it is everything."""
    target_bits = prepared.config.what.sample.until_slack_bits
    if target_bits is not None:
        return _score_until(prepared, target_bits)
    count = sample_size(prepared)
    _score_pending(prepared, prepared.shards(count))
    return count


def _score_pending(prepared: Prepared, shards: Sequence[Shard]) -> None:
    """Score the shards that have no commit record of this run, with half the batch whenever memory runs out.

    Every replica begins with a full-size batch of fixed ids, so that a batch which does not fit shows before a shard
    is read; and with the causality probe, which so is made again at each new shape.

    Raises:
        ReplicaOutOfMemory: the batch cannot be halved any more.
    """
    records = _records(prepared, shards)
    batch = smallest_batch(_applied_protocol(prepared, records))
    while True:
        try:
            return _score(prepared, shards, records, batch)
        except ReplicaOutOfMemory as error:
            batch, records = _halved(prepared, batch, error), _records(prepared, shards)


def _halved(prepared: Prepared, batch: int, error: ReplicaOutOfMemory) -> int:
    """Half the batch, for the shards that are not committed.

    The choice is part of the protocol, and so paid for (`applied_protocol`). A sample is drawn for one hypothesis:
    its batch may change only while no loss of it is known.

    Raises:
        ReplicaOutOfMemory: there is nothing to halve, or windows of a sample are committed.
    """
    what = str(error).partition(";")[0]
    if batch == 1:
        raise ReplicaOutOfMemory(f"{what}; not even one window fits: shorten what.windows.length") from None
    if not prepared.config.what.sample.is_full and prepared.run.committed():
        raise ReplicaOutOfMemory(
            f"{what}; a sample keeps the batch of its first windows: set what.windows.batch: {batch // 2} and "
            "another how.output"
        ) from None
    logger.warning("%s; going on with batches of %d windows", what, batch // 2)
    prepared.run.log_progress(event="out_of_memory", batch=batch // 2)
    count_halving(prepared.run.uri)
    return batch // 2


def _named_base(artifact: ArtifactFile) -> dict[str, str]:
    """The base that an adapter says it was trained on, where that is another one."""
    from tokenbound.compression.weight_delta import NAMED_BASE, named_base

    named = named_base(artifact.base)
    return {} if named is None else {NAMED_BASE: named}


def _applied_protocol(prepared: Prepared, records: Mapping[int, CommitRecord]) -> dict[str, Any]:
    """The protocol of the shards that are committed."""
    shapes = [(record.batch, record.windows) for _, record in sorted(records.items())]
    return applied_protocol(prepared.protocol, shapes)


def _score(prepared: Prepared, shards: Sequence[Shard], records: Mapping[int, CommitRecord], batch: int) -> None:
    """Score the shards that have no commit record of this run, so many windows at once."""
    what, how = prepared.config.what, prepared.config.how
    pending, done_tokens = _pending(prepared, shards, records)
    if not pending:
        return
    form, placement = place_replicas_in_form(
        how, what, prepared.artifact, batch, shards=len(pending), shard_tokens=prepared.shard_tokens
    )
    total = sum(_tokens(prepared, shard) for shard in shards)
    prepared.run.log_progress(
        event="start", pending_shards=len(pending), replicas=placement.replicas, device=placement.device
    )
    rows = score_shards(
        pending,
        read=ReadShard(prepared.corpus.root, prepared.spec),
        replica=_replica_spec(prepared, placement, batch, form),
        commit=CommitShard(
            prepared.run.uri,
            prepared.fingerprint,
            tuple(what.bound.top_k),
            how.store_tokens,
            batch if batch != what.windows.batch else None,
            prepared.tree,
        ),
        placement=placement,
    )
    logger.info("scoring %d shards on %d %s replicas", len(pending), placement.replicas, placement.device)
    told = TokenProgress(
        total, done_tokens=done_tokens, interval_s=how.progress_interval_s, on_event=prepared.run.log_progress
    )
    with closing(rows), told as progress:
        for row in rows:
            progress.advance(row["tokens"])
            count_shard(prepared.run.uri, row["tokens"], progress.speed)


def _pending(
    prepared: Prepared, shards: Sequence[Shard], records: Mapping[int, CommitRecord]
) -> tuple[list[Shard], int]:
    """Shards to score, and the tokens of those that are committed.

    A last shard that was committed for a shorter prefix of the draw is scored again; one for a longer prefix serves.

    Raises:
        MismatchError: a record belongs to another run.
    """
    ours = {prepared.fingerprint, *prepared.earlier}
    foreign = [number for number, record in records.items() if record.scoring_fingerprint not in ours]
    if foreign:
        raise MismatchError(
            f"{prepared.run.uri}: shard {foreign[0]} was scored for another model, corpus or protocol; use another "
            "run directory"
        )
    done = {number: record for number, record in records.items() if record.windows >= len(shards[number].windows)}
    prepared.run.check_committed(done.values())
    return [shard for shard in shards if shard.number not in done], sum(record.tokens for record in done.values())


def _tokens(prepared: Prepared, shard: Shard) -> int:
    return int(prepared.plan.windows(shard.windows).num_targets.sum())


def _replica_spec(prepared: Prepared, placement: Placement, batch: int, form: Form) -> ReplicaSpec:
    what = prepared.config.what
    return ReplicaSpec(
        artifact=prepared.run.place(ARTIFACT),
        artifact_sha256=prepared.artifact.sha256,
        run=prepared.run.uri,
        dtype=what.model.dtype,
        batch=batch,
        length=what.windows.length,
        device=placement.device,
        threads=placement.threads,
        base=None if what.model.base is None else anchored(what.model.base),
        compile=prepared.config.how.compile,
        local_folder=prepared.config.how.local_folder,
        session=uuid.uuid4().hex,
        retries=prepared.config.how.retries,
        share=placement.replicas > 1,
        gpus=placement.gpus,
        tree=prepared.tree,
        weights=form,
    )


def _score_until(prepared: Prepared, target_bits: float) -> int:
    """Grow the sample until every loss line's slack is small enough; returns the size of the first such prefix."""
    sample = prepared.config.what.sample
    limit = min(sample.windows or prepared.plan.num_windows, prepared.plan.num_windows)
    size = min(limit, 2 * sample.pilot_windows)
    while True:
        shards = prepared.shards(size)
        _score_pending(prepared, shards)
        reduction = _reduce(prepared, shards, _records(prepared, shards), size)
        found = first_prefix(reduction.loss_paths, target_bits)
        if found is not None or size >= limit:
            return found or size
        size = min(limit, math.ceil(size * SLACK_GROWTH))


def _records(prepared: Prepared, shards: Sequence[Shard]) -> dict[int, CommitRecord]:
    """Commit records of those shards that have one."""
    return prepared.run.committed(shard.number for shard in shards)


def _claim(prepared: Prepared, records: Mapping[int, CommitRecord], vocab_size: int) -> Claim:
    from tokenbound.models.smoothing_head import alpha_min_of

    return claim_of(
        prepared.bound,
        artifact_bytes=prepared.artifact.num_bytes,
        protocol=_applied_protocol(prepared, records),
        vocab_size=vocab_size,
        tokenizer_vocab_size=prepared.corpus.manifest.vocab_size,
        num_tokens=prepared.plan.num_tokens,
        num_bases=prepared.config.what.model.bases_tried,
        head_alpha_min=alpha_min_of(prepared.architecture),
        num_documents=prepared.num_documents,
        tree=prepared.tree,
    )


def _sampling_plan(prepared: Prepared, count: int | None, vocab_size: int) -> SamplingPlan | None:
    if count is None:
        return None
    sample, features = prepared.config.what.sample, prepared.features
    decisions = prepared.decisions(vocab_size)
    plan = SamplingPlan(
        num_units=prepared.plan.num_windows,
        max_unit_tokens=prepared.plan.max_window_tokens,
        pilot_units=sample.pilot_windows,
        trial=prepared.bound.ordinal,
        evaluation=sample.evaluation,
        max_unit_decisions=None if decisions is None else decisions.max_window_decisions,
        num_decisions=None if decisions is None else decisions.num_decisions,
    )
    return plan if features is None else with_controls(plan, features, prepared.drawn(count))


def _reduce(
    prepared: Prepared, shards: Sequence[Shard], records: Mapping[int, CommitRecord], count: int | None
) -> Reduction:
    """Run the reducer as a task; its maps over shards are tasks of their own.

    Raises:
        IncompleteError: shards are missing.
        MismatchError: unscored windows that the claim does not count at the worst case.
    """
    run, bound = prepared.run, prepared.bound
    missing = list(missing_shards(len(shards), records))
    if missing:
        some = ", ".join(map(str, missing[:8]))
        raise IncompleteError(
            f"{run.uri}: {len(missing)} of {len(shards)} shards are not scored "
            f"({some}{', ...' if len(missing) > 8 else ''}); run the same command again"
        )
    unscored = sum(record.unscored_windows for record in records.values())
    if unscored and bound.unscorable == "refuse":
        raise MismatchError(
            f"{run.uri}: {unscored} windows have no finite loss (see quarantine/); repair the model, "
            "or set what.bound.unscorable: worst_case in a fresh claim"
        )
    vocab_size = int(records[0].evidence["vocab_size"])
    ledger = RunLedger(run.uri, len(shards), prepared.fingerprint, vocab_size, earlier_fingerprints=prepared.earlier)
    if count is not None:
        ledger = ledger.first_windows(count)
    claim, plan = _claim(prepared, records, vocab_size), _sampling_plan(prepared, count, vocab_size)
    ledger = replace(ledger, columns=reduced_columns(claim))
    with plain_errors():
        reduction: Reduction = ray.get(ray.remote(num_cpus=0)(_reduce_task).remote(ledger, claim, plan))
        return reduction


def _reduce_task(ledger: RunLedger, claim: Claim, sampling: SamplingPlan | None) -> Reduction:
    run = ray_map if ledger.num_shards > SERIAL_SHARDS else map
    return reduce_ledger(ledger, claim, sampling, run=run)


def _warn_of_a_wrong_tokenizer(loss_bits: float, guess_bits: float) -> None:
    """A model that predicts worse than a uniform guess has most often met ids that mean something else to it."""
    if loss_bits > guess_bits:
        logger.warning(
            "the model's own loss, %.2f bits, is above guessing, %.2f: is what.corpus.tokenizer the model's own?",
            loss_bits,
            guess_bits,
        )


def _certify(prepared: Prepared, shards: Sequence[Shard], count: int | None) -> CertificateRecord:
    what, corpus, plan = prepared.config.what, prepared.corpus, prepared.plan
    started, records = time.monotonic(), _records(prepared, shards)
    reduction = _reduce(prepared, shards, records, count)
    logger.info("reduced %d tokens in %.1f s", reduction.sums.num_tokens, time.monotonic() - started)
    claim = _claim(prepared, records, reduction.evidence.vocab_size)
    declared = declarations(what, artifact_plugins(prepared.artifact))
    claimed = claim_identity(prepared.fingerprint, prepared.bound, declared, what.sample)
    _warn_of_a_wrong_tokenizer(reduction.sums.mean_nll_nats / math.log(2), math.log2(claim.tokenizer_vocab_size))
    manifest = corpus.manifest
    corpus_summary = corpus_section(
        what.corpus,
        manifest,
        plan,
        context=what.windows.context,
        skipped=corpus.skipped,
        num_documents=claim.num_documents,
        decisions=prepared.decisions(claim.vocab_size),
    )
    return CertificateRecord(
        **derived_fields(reduction, claim, corpus_summary["bytes_per_token"]),
        random_guess_bits=math.log2(claim.tokenizer_vocab_size),
        delta=claim.delta,
        num_tokens=plan.num_tokens,
        num_scored_tokens=reduction.sums.num_tokens,
        num_windows=plan.num_windows,
        vocab_size=claim.vocab_size,
        tokenizer_vocab_size=claim.tokenizer_vocab_size,
        code_length_bits=claim.paid_code_bits,
        code_split=dict(claim.code_split),
        artifact_bytes=prepared.artifact.num_bytes,
        head_alpha_min=claim.head_alpha_min,
        num_worst_case_tokens=reduction.sums.worst_case_tokens,
        prior=what.bound.prior,
        trial=prepared.bound.ordinal,
        methods=list(what.bound.methods),
        top_k=list(what.bound.top_k),
        declared_tokens=what.bound.declared_tokens,
        unscorable=what.bound.unscorable,
        protocol=_applied_protocol(prepared, records),
        sampling=_sampling_record(prepared, count),
        selection=_selection_record(prepared),
        declarations=declared,
        corpus=corpus_summary,
        model={
            "architecture": prepared.architecture.get("model_type"),
            **({} if (arithmetic := arithmetic_of(prepared.architecture)) is None else {"arithmetic": arithmetic}),
            "source": what.model.artifact or what.model.checkpoint_place,
            **({} if what.model.base is None else {"base": what.model.base}),
            **_named_base(prepared.artifact),
            **({"other_weights": list(prepared.other_weights)} if prepared.other_weights else {}),
        },
        environment={
            **_environment(prepared.architecture),
            "scored_by": scoring_environments(records[shard.number] for shard in shards),
        },
        scoring_identity=prepared.identity,
        claim_identity=claimed,
        scoring_fingerprint=prepared.fingerprint,
        earlier_fingerprints=_borne(prepared.earlier, records),
        claim_fingerprint=fingerprint(claimed),
        artifact_sha256=prepared.identity["artifact_sha256"],
        corpus_sha256=manifest.corpus_sha256,
        tokens_sha256=manifest.tokens_sha256,
        losses_sha256=losses_sha256(records[shard.number] for shard in shards),
        num_shards=len(shards),
        tokenbound_version=metadata.version("tokenbound"),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _borne(earlier: Sequence[str], records: Mapping[int, CommitRecord]) -> list[str]:
    """The earlier names of a run under which shards were scored; a run that began on the grown corpus has none."""
    names = {record.scoring_fingerprint for record in records.values()}
    return [name for name in earlier if name in names]


def _sampling_record(prepared: Prepared, count: int | None) -> SamplingRecord | None:
    if count is None:
        return None
    sample = prepared.config.what.sample
    return SamplingRecord(
        seed=sample.seed,
        num_windows=prepared.plan.num_windows,
        max_window_tokens=prepared.plan.max_window_tokens,
        scored_windows=count,
        pilot_windows=sample.pilot_windows,
        until_slack_bits=sample.until_slack_bits,
        evaluation=sample.evaluation,
        control_variates=_controls_record(prepared),
    )


def _controls_record(prepared: Prepared) -> ControlVariatesRecord | None:
    if prepared.features is None:
        return None
    rule = feature_rule(prepared.corpus.manifest, prepared.config.what.windows)
    return ControlVariatesRecord(kind=rule.kind, features=list(rule.names), sha256=prepared.features.sha256)


def _selection_record(prepared: Prepared) -> SelectionRecord | None:
    selection = prepared.selection
    if selection is None:
        return None
    return SelectionRecord(counted_by=selection.counted_by, shipped=selection.shipped)


def _environment(architecture: dict[str, Any]) -> dict[str, Any]:
    method = scheme_of(architecture)
    packages = ["torch", "transformers", "numpy", "ray", "pyarrow"]
    packages += [method.name] if method is not None and method.package is not None else []
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: metadata.version(name) for name in packages},
    }


def _publish(run: RunDirectory, certificate: CertificateRecord) -> str:
    """Write the certificate under a name that no other claim has, then its report; returns the certificate's path.

    The certificate of a grown corpus takes the place of the one it extends, which is kept beside it.
    """
    name = run.certificate_name(certificate.claim_fingerprint)
    if name != CERTIFICATE:
        current = CertificateRecord.load(run.place(CERTIFICATE))
        if certificate.extends(current):
            run.write_json(claim_file(current.claim_fingerprint), current.model_dump(mode="json"))
            name = CERTIFICATE
    run.write_json(name, certificate.model_dump(mode="json"))
    write_report(run, certificate, run_details(run, certificate))
    return run.place(name)
