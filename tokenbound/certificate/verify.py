"""Checking a certificate: everything that losses and artifact determine is made again and compared."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenbound.bounds.claim import SamplingPlan
from tokenbound.bounds.columns import Floats
from tokenbound.bounds.constants import SAMPLING_DELTA_SHARE
from tokenbound.bounds.decisions import DecisionTable, DecisionTree
from tokenbound.bounds.evidence import Evidence, merge_evidence
from tokenbound.bounds.lines import LINES, bound_named, counts_documents, find_bound, scores_decisions
from tokenbound.bounds.lines.base import Setting
from tokenbound.certificate.control_variates import stored_features, with_controls
from tokenbound.certificate.decisions import check_decisions
from tokenbound.certificate.derived import code_split, derived_fields
from tokenbound.certificate.identity import (
    SOFTWARE_DECLARATIONS,
    applied_protocol,
    claim_identity,
    differences,
    fingerprint,
    scoring_identity,
)
from tokenbound.certificate.record import CertificateRecord, possible_tokens
from tokenbound.certificate.reduce import RunLedger, reduce_ledger, reduced_columns, shard_evidence
from tokenbound.compression.artifact_file import ArtifactFile, as_artifact, file_sha256, open_artifact
from tokenbound.compression.container import ArtifactError
from tokenbound.corpus.sources import SOURCES
from tokenbound.errors import IncompleteError, InputError, MismatchError
from tokenbound.store.losses import Losses
from tokenbound.store.run import (
    ARTIFACT,
    CommitRecord,
    RunDirectory,
    canonical_json,
    losses_sha256,
    scoring_environments,
    sha256_hex,
)
from tokenbound.store.strict_json import shortened
from tokenbound.store.uri import base_name, is_uri, join, split

if TYPE_CHECKING:
    from numpy.typing import NDArray

RELATIVE_TOLERANCE = 1e-9
"""Recomputed floats may differ by this much between NumPy versions; integers, texts and digests not at all."""


def verify_record(
    certificate: CertificateRecord, *, losses: str | Path, artifact: str | Path | bytes | ArtifactFile
) -> None:
    """Recompute everything that losses and artifact determine and compare.

    The corpus is not read: that its tokens have these losses is what re-scoring checks.

    Args:
        certificate: what is checked.
        losses: the run directory, or its `losses` folder.
        artifact: the artifact's file, open or not, or its bytes.

    Raises:
        IncompleteError: losses or artifact are not there.
        MismatchError: a byte of either changed, or a printed number does not follow from them.

    """
    _verify_identities(certificate)
    _verify_artifact(
        certificate, artifact if isinstance(artifact, bytes | ArtifactFile) else _open(certificate, str(artifact))
    )
    ledger = verified_ledger(certificate, _run_folder(str(losses)))
    assert ledger.records is not None
    _verify_growth(certificate, ledger.records)
    shapes = [(record.batch, record.windows) for record in ledger.records]
    _require_equal("protocol", certificate.protocol, applied_protocol(certificate.scoring_identity["protocol"], shapes))
    evidence = _verify_windows(certificate, ledger)
    try:
        sampling = sampling_plan_beside(certificate, ledger.uri)
        reduction = reduce_ledger(
            replace(ledger, columns=reduced_columns(certificate.claim())),
            certificate.claim(),
            sampling,
            evidence=evidence,
        )
    except InputError as error:
        raise MismatchError(f"the certificate claims what cannot be claimed: {error}") from None
    for name, value in derived_fields(
        reduction, certificate.claim(), certificate.corpus.get("bytes_per_token")
    ).items():
        _require_equal(name, getattr(certificate, name), value)


def verify_beside(
    path: str | Path, *, losses: str | None = None, artifact: str | None = None
) -> tuple[CertificateRecord, str, str]:
    """Verify a certificate with the losses and artifact that lie beside it, unless told otherwise.

    Args:
        path: certificate, file or URI.
        losses: run directory, or its `losses` folder.
        artifact: file or URI.

    Returns:
        The certificate, its run directory and where its artifact is.

    Raises:
        IncompleteError: certificate, losses or artifact are not there; arithmetic alone is no verification.
        MismatchError: something does not follow.

    >>> verify_beside("nowhere/certificate.json")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    tokenbound.errors.IncompleteError: nowhere/certificate.json does not exist
    """
    certificate = CertificateRecord.load(path)
    folder = split(str(path))[0]
    run = _run_folder(losses or folder)
    if not RunDirectory(run).exists("shards"):
        raise IncompleteError(
            f"no losses at {run}; give the run directory with --losses (arithmetic alone verifies nothing)"
        )
    place = artifact or join(folder, ARTIFACT)
    verify_record(certificate, losses=run, artifact=place)
    return certificate, run, place


def verified_ledger(certificate: CertificateRecord, uri: str) -> RunLedger:
    """The losses of a certificate whose commit records are read once, and are its own.

    Losses read through it have the digests of these records, so they are the losses that were verified even if the
    run directory changes meanwhile.

    Args:
        certificate: whose.
        uri: the run directory.

    Raises:
        IncompleteError: a shard is not committed.
        MismatchError: the committed losses are not those of the certificate.

    >>> from tokenbound.demo import demo_certificate
    >>> verified_ledger(demo_certificate(), "nowhere")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    tokenbound.errors.IncompleteError: nowhere: shard 0 is not committed
    """
    ledger = certificate.ledger(uri)
    records = tuple(ledger.record(shard) for shard in range(certificate.num_shards))
    _require_equal("losses_sha256", certificate.losses_sha256, losses_sha256(records))
    if any(record.environment for record in records):  # records of older versions do not say
        scored_by = scoring_environments(records)
        _require_equal("environment.scored_by", certificate.environment.get("scored_by"), scored_by)
    return replace(ledger, records=records)


def _verify_identities(certificate: CertificateRecord) -> None:
    """Both identities are made again from the certificate's own fields, and nothing else may be in them."""
    missing = {"protocol", "seed"} - certificate.scoring_identity.keys()
    if missing:
        raise MismatchError(f"scoring_identity.{min(missing)} is missing")
    _verify_declarations(certificate)
    _verify_sampling(certificate)
    identity = scoring_identity(
        artifact_sha256=certificate.artifact_sha256,
        corpus_sha256=certificate.corpus_sha256,
        tokens_sha256=certificate.tokens_sha256,
        protocol={**certificate.protocol, "batch": certificate.scoring_identity["protocol"]["batch"]},
        sample=_Draw(certificate),
        base=certificate.scoring_identity.get("base"),
        tree=certificate.scoring_identity.get("tree"),
    )
    _require_same("scoring_identity", certificate.scoring_identity, identity)
    _require_equal("scoring_fingerprint", certificate.scoring_fingerprint, fingerprint(identity))
    claimed = claim_identity(
        certificate.scoring_fingerprint, certificate, certificate.declarations, certificate.sampling
    )
    _require_same("claim_identity", certificate.claim_identity, claimed)
    _require_equal("claim_fingerprint", certificate.claim_fingerprint, fingerprint(claimed))
    grown = bool(certificate.earlier_fingerprints) or certificate.corpus.get("segments", 1) > 1
    _verify_methods(certificate)
    if certificate.declared_tokens is not None and grown:
        raise MismatchError("a number of tokens declared beforehand, of a corpus that has grown")
    if not isinstance(certificate.scoring_identity["protocol"]["batch"], int):
        raise MismatchError("scoring_identity.protocol.batch: a run asks for one batch; only memory may halve it")
    _verify_tree(certificate)
    _verify_corpus_section(certificate)
    _verify_source(certificate)
    _require_equal("random_guess_bits", certificate.random_guess_bits, math.log2(certificate.tokenizer_vocab_size))


def _verify_tree(certificate: CertificateRecord) -> None:
    """A tree is named exactly where a bound takes its decisions for steps, and it is one over the model's ids."""
    tree, claimed = certificate.tree, scores_decisions(certificate.methods)
    if claimed != (tree is not None):
        raise MismatchError(
            f"scoring_identity.tree: {'no tree is' if claimed else 'a tree is'} named, but the methods "
            f"{', '.join(certificate.methods)} {'need one' if claimed else 'have no use for it'}"
        )
    sampled = tree is not None and certificate.sampling is not None
    for name in ("num_decisions", "max_window_decisions"):
        found = certificate.corpus.get(name)
        if sampled != (found is not None):
            raise MismatchError(
                f"corpus.{name}: the certificate says {found}; a sample whose decisions are bounded has it, no other "
                "certificate"
            )
    if tree is not None:
        try:
            tree.over(certificate.vocab_size)
        except InputError as error:
            raise MismatchError(f"scoring_identity.tree: {error}") from None


def _verify_declarations(certificate: CertificateRecord) -> None:
    """What this kind of claim rests on is declared, and nothing that it does not rest on."""
    declared = certificate.declarations
    _require_equal("prior", certificate.prior, declared["prior"])
    _require_equal("declared_tokens", certificate.declared_tokens, declared.get("declared_tokens"))
    first, *later = SOFTWARE_DECLARATIONS
    needed = {first: True, **dict.fromkeys(later, certificate.selection is not None)}
    needed["holdout_declaration"] = certificate.prior == "holdout"
    needed |= dict.fromkeys(("base_is_independent", "num_bases"), "base" in certificate.scoring_identity)
    for name, wanted in needed.items():
        if wanted and name not in declared:
            raise MismatchError(f"declarations.{name} is missing; the bound does not hold without it")
        if not wanted and name in declared:
            raise MismatchError(f"declarations.{name} is given, but this certificate does not rest on it")


def _verify_corpus_section(certificate: CertificateRecord) -> None:
    """What the section says twice is said alike; the corpus itself is read when windows are scored again."""
    corpus = certificate.corpus
    for name in ("add_bos", "add_eos"):
        if name in corpus:
            _require_equal(f"corpus.{name}", corpus[name], certificate.protocol[name])
    if certificate.tokenizer_vocab_size > certificate.vocab_size:
        raise MismatchError(
            f"tokenizer_vocab_size {certificate.tokenizer_vocab_size} exceeds vocab_size {certificate.vocab_size}: "
            f"the model "
            "could not predict every id"
        )
    if "tokens" in corpus:
        _verify_contexts(certificate, corpus["tokens"])
    if corpus.get("scored_documents", 0) > corpus["documents"]:
        raise MismatchError(
            f"corpus.scored_documents {corpus['scored_documents']} exceeds corpus.documents {corpus['documents']}"
        )
    scored_bytes = corpus.get("scored_text_bytes", corpus.get("text_bytes"))
    if (scored_bytes or 0) > (corpus.get("text_bytes") or 0):
        raise MismatchError(
            f"corpus.scored_text_bytes {scored_bytes} exceeds corpus.text_bytes {corpus.get('text_bytes')}"
        )
    per_token = scored_bytes / certificate.num_tokens if scored_bytes else None
    _require_equal("corpus.bytes_per_token", corpus.get("bytes_per_token"), per_token)


def _verify_contexts(certificate: CertificateRecord, ids: int) -> None:
    """Every id of the corpus is predicted but the first of each context: of a document, or of a packed segment.

    Where answers alone are scored, how many ids they have is known from the corpus only.
    """
    packed, segments = certificate.protocol["context"] == "packed", certificate.corpus.get("segments", ids)
    most = segments if packed else certificate.corpus["documents"]
    fewest = 1 if "targets" in certificate.corpus else ids - most
    if not fewest <= certificate.num_tokens <= ids - 1:
        raise MismatchError(
            f"num_tokens: {certificate.num_tokens:,} cannot be predicted of the {ids:,} of corpus.tokens in "
            f"{certificate.corpus['documents']:,} documents"
        )


def _verify_methods(certificate: CertificateRecord) -> None:
    """Every bound is installed, could be used in this run, and is declared where it comes from a plugin."""
    declared = certificate.declarations.get("plugins", {}).get(LINES.group, {})
    times_grown = max(len(certificate.earlier_fingerprints), certificate.corpus.get("segments", 1) - 1)
    setting = Setting(certificate.protocol["context"], certificate.sampling is not None, times_grown)
    for name in certificate.methods:
        if find_bound(name) is None:
            package = declared.get(name, "the package that provides it")
            raise IncompleteError(f"the bound `{name}` is not installed here; install {package} to verify its line")
        objection = bound_named(name).objection(setting)
        if objection is not None:
            raise MismatchError(f"method `{name}` {objection}")
    _require_equal("plugins", sorted(declared), [name for name in sorted(certificate.methods) if LINES.origin(name)])


def _verify_source(certificate: CertificateRecord) -> None:
    """The plugin that read the corpus is declared, and no other; only scoring again needs it installed."""
    declared = certificate.declarations.get("plugins", {}).get(SOURCES.group, {})
    source = str(certificate.corpus["source"])
    _require_equal(
        f"declarations.plugins.{SOURCES.group}", sorted(declared), [] if source in SOURCES.built_in else [source]
    )


def _verify_sampling(certificate: CertificateRecord) -> None:
    """What decided the draw was fixed before it: pilot and seed name the run, the ordinal of the draw the claim."""
    identity, record = certificate.scoring_identity, certificate.sampling
    _require_equal("sampling", record is not None, identity.get("sampled"))
    _require_equal("sampling_delta_share", SAMPLING_DELTA_SHARE, certificate.claim_identity.get("sampling_delta_share"))
    _require_equal("evaluation", record and record.evaluation, certificate.claim_identity.get("evaluation"))
    if record is None:
        return
    _require_equal("seed", record.seed, identity.get("seed"))
    _require_equal("pilot_windows", record.pilot_windows, identity.get("pilot_windows"))
    _require_equal("num_windows", certificate.num_windows, record.num_windows)
    if not record.pilot_windows < record.scored_windows <= record.num_windows:
        raise MismatchError(
            f"sampling: {record.scored_windows} windows were scored, not more than the pilot's "
            f"{record.pilot_windows} or more than all {record.num_windows}"
        )
    if record.max_window_tokens > certificate.protocol["length"]:
        raise MismatchError(
            f"sampling.max_window_tokens {record.max_window_tokens} exceeds protocol.length "
            f"{certificate.protocol['length']}"
        )
    # The register counts draws over all lengths of a corpus; certificates older than it numbered them by length.
    if certificate.selection is None and certificate.corpus.get("segments", 1) > 1 and record.evaluation is None:
        raise MismatchError("sampling.evaluation: the corpus grew, so the ordinal of this draw must be given")


def _verify_growth(certificate: CertificateRecord, records: tuple[CommitRecord, ...]) -> None:
    """Every earlier fingerprint is borne by a shard, each once; whose they were is known from the corpus alone."""
    earlier = certificate.earlier_fingerprints
    if len({*earlier, certificate.scoring_fingerprint}) != 1 + len(earlier):
        raise MismatchError("earlier_fingerprints: a fingerprint is given twice")
    if earlier and certificate.sampling is not None:
        raise MismatchError("earlier_fingerprints: a sample is drawn afresh from a corpus that grew")
    unused = set(earlier) - {record.scoring_fingerprint for record in records}
    if unused:
        raise MismatchError(f"earlier_fingerprints: no shard was scored under {min(unused)}")
    if len(earlier) >= certificate.corpus.get("segments", len(earlier) + 1):
        raise MismatchError(
            f"earlier_fingerprints: {len(earlier)} of a corpus of {certificate.corpus['segments']} segments, "
            f"which grew "
            f"{certificate.corpus['segments'] - 1} times"
        )


def _verify_artifact(certificate: CertificateRecord, source: bytes | ArtifactFile) -> None:
    from tokenbound.compression.methods import METHODS, plugins_of
    from tokenbound.models.quantized.schemes import arithmetic_of
    from tokenbound.models.smoothing_head import alpha_min_of

    if isinstance(source, bytes):  # what is no artifact at all is another one
        _require_equal("artifact_sha256", certificate.artifact_sha256, sha256_hex(source))
    try:
        parsed = as_artifact(source)
    except InputError as error:
        raise MismatchError(f"artifact: {error}") from None
    _require_equal("artifact_sha256", certificate.artifact_sha256, parsed.sha256)
    _require_equal("artifact_bytes", certificate.artifact_bytes, parsed.num_bytes)
    _verify_base(certificate, parsed.base)
    if certificate.declarations["tokenizer_is"] == "counted" and not parsed.tokenizer:
        raise MismatchError(
            "declarations.tokenizer_is: the certificate says 'counted', but the artifact holds no tokenizer"
        )
    plugins = certificate.declarations.get("plugins", {})
    if unknown := plugins.keys() - {LINES.group, METHODS.group, SOURCES.group}:
        raise MismatchError(f"declarations.plugins: there is no group {min(unknown)!r}")
    encoded_by = {group: names for group, names in plugins.items() if group == METHODS.group}
    _require_equal("declarations.plugins", encoded_by, plugins_of(parsed.settings))
    architecture = parsed.architecture
    _require_equal("head_alpha_min", certificate.head_alpha_min, alpha_min_of(architecture))
    _require_equal("model.architecture", certificate.model["architecture"], architecture.get("model_type"))
    _require_equal("model.arithmetic", certificate.model.get("arithmetic"), arithmetic_of(architecture))
    width = architecture.get("vocab_size")
    if isinstance(width, int) and certificate.vocab_size < width:
        raise MismatchError(
            f"vocab_size: the certificate says {certificate.vocab_size}, the model predicts {width} ids"
        )
    split = code_split(parsed.num_bytes, certificate.protocol)
    _require_equal("code_split", certificate.code_split, split)
    _require_equal(
        "code_length_bits",
        certificate.code_length_bits,
        0.0 if certificate.prior == "holdout" else math.fsum(split.values()),
    )


def _verify_base(certificate: CertificateRecord, named: dict[str, Any] | None) -> None:
    """A delta's base is the one that the artifact names, and is declared; a whole model has none."""
    from tokenbound.compression.weight_delta import NAMED_BASE

    _require_equal(f"model.{NAMED_BASE}", certificate.model.get(NAMED_BASE), (named or {}).get(NAMED_BASE))
    recorded = certificate.scoring_identity.get("base") or {}
    _require_equal("base sha256", recorded.get("sha256"), None if named is None else named.get("sha256"))
    _require_equal("model.base", "base" in certificate.model, named is not None)


def _verify_windows(certificate: CertificateRecord, ledger: RunLedger) -> Evidence:
    """The recorded windows are those planned, each once, in order; and they hold the tokens that are claimed.

    Returns:
        The evidence of these losses, whatever the commit records say.
    """
    expected, parts, sizes = _planned_windows(certificate), [], []
    tree = None if certificate.tree is None else certificate.tree.over(certificate.vocab_size)
    documents: set[int] = set()
    by_document = certificate.sampling is None and counts_documents(certificate.methods)
    seen = tokens = worst = largest = 0
    for shard in range(certificate.num_shards):
        losses = ledger.losses(shard)
        parts.append(shard_evidence(losses, certificate.vocab_size, tuple(certificate.top_k)))
        _verify_decisions(certificate, tree, losses, ledger.record(shard), parts[-1])
        ids = losses.window_id
        if seen + len(ids) > len(expected) or not (ids == expected[seen : seen + len(ids)]).all():
            raise MismatchError(
                f"shard {shard} holds other windows than planned: missing, duplicate or re-ordered ones"
            )
        if int(losses.window_lengths.min(initial=1)) < 1:
            raise MismatchError(f"shard {shard} holds a window without a token")
        if by_document:
            documents.update(losses.document.tolist())
        if losses.tables is not None and certificate.sampling is not None:
            sizes.append(np.stack([losses.tables.window_sums(losses.tables.count), losses.window_lengths]))
        seen += len(ids)
        tokens += losses.num_tokens
        worst += int(losses.window_lengths[losses.unscored].sum())
        largest = max(largest, int(losses.window_lengths.max(initial=0)))
    _require_equal("scored windows", len(expected), seen)
    _require_equal("num_scored_tokens", certificate.num_scored_tokens, tokens)
    _require_equal("num_worst_case_tokens", certificate.num_worst_case_tokens, worst)
    _require_equal("corpus.scored_documents", certificate.corpus.get("scored_documents"), len(documents) or None)
    if worst and certificate.unscorable != "worst_case":
        raise MismatchError(f"{worst} tokens have no finite loss and the claim does not count them at the worst case")
    _verify_num_tokens(certificate, tokens, largest)
    if sizes:
        _verify_num_decisions(certificate, *np.concatenate(sizes, axis=1))
    return merge_evidence(parts)


def _verify_num_decisions(certificate: CertificateRecord, decisions: Floats, tokens: Floats) -> None:
    """The corpus has about as many decisions per token as the windows that were drawn from it.

    The exact number takes the corpus. A claim is refused that windows drawn at random contradict at eight standard
    errors, and beyond what ten of the largest windows could make up for.

    Args:
        certificate: of a sample.
        decisions: [W] of each window.
        tokens: [W] of each window.
    """
    claimed, most = certificate.corpus["num_decisions"], certificate.corpus["max_window_decisions"]
    excess = decisions - claimed / certificate.num_tokens * tokens
    left = 1 - len(excess) / certificate.num_windows
    if abs(float(excess.sum())) > 8 * math.sqrt(left * float(excess @ excess)) + 10 * most * (left > 0):
        raise MismatchError(
            f"corpus.num_decisions: the certificate says {claimed}, {claimed / certificate.num_tokens:.2f} per token; "
            f"the windows drawn have {decisions.sum() / tokens.sum():.2f}"
        )


def _verify_decisions(
    certificate: CertificateRecord,
    tree: DecisionTree | None,
    losses: Losses,
    record: CommitRecord,
    evidence: Evidence,
) -> None:
    """The tables of a shard are those of its tokens, and the commit record's is their sum where all of it counts."""
    origin = f"shard {record.shard}"
    if tree is None:
        if losses.tables is not None:
            raise MismatchError(f"{origin} holds tables of decisions, of which the certificate says nothing")
        return
    if losses.tables is None:
        raise MismatchError(f"{origin} holds no tables of decisions, which the methods of the certificate need")
    check_decisions(losses, tree, origin)
    try:
        committed = DecisionTable.from_dict(record.evidence["decisions"])
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise MismatchError(f"{origin}: the commit record has no sound table of decisions: {error}") from None
    whole = len(losses.window_id) == record.windows  # a sample may stop inside its last shard
    if whole and committed != evidence.decisions:
        raise MismatchError(f"{origin}: the commit record's table of decisions is not the sum of its windows'")
    most = int(losses.tables.window_sums(losses.tables.count).max(initial=0))
    limit = certificate.corpus.get("max_window_decisions", most)
    if most > limit:
        raise MismatchError(
            f"corpus.max_window_decisions: the certificate says {limit}, but a window of {origin} has {most}"
        )


def _verify_num_tokens(certificate: CertificateRecord, scored: int, largest: int) -> None:
    """The corpus has as many tokens as its windows can hold: all of a full run, some range of a sample."""
    if largest > certificate.protocol["length"]:
        raise MismatchError(
            f"a window has {largest} tokens, more than protocol.length {certificate.protocol['length']}"
        )
    if certificate.sampling is None:
        _require_equal("num_tokens", certificate.num_tokens, scored)
        return
    limit = certificate.sampling.max_window_tokens
    if largest > limit:
        raise MismatchError(f"a window has {largest} tokens, more than max_window_tokens {limit}")
    lowest, highest = possible_tokens(certificate)
    if not lowest <= certificate.num_tokens <= highest:
        raise MismatchError(
            f"num_tokens: the certificate says {certificate.num_tokens:,}, but {certificate.num_windows:,} windows "
            f"of at most "
            f"{limit:,} tokens, of which {scored:,} were seen, hold {lowest:,} to {highest:,}"
        )


def sampling_plan_beside(certificate: CertificateRecord, uri: str) -> SamplingPlan | None:
    """How windows were drawn, with the control variates that lie in the run directory; None without a sample.

    Args:
        certificate: whose.
        uri: the run directory.

    Raises:
        IncompleteError: the control variates are not there.
        InputError: they are of another corpus or draw.
        MismatchError: they are not those of the certificate.

    >>> from tokenbound.demo import demo_certificate
    >>> sampling_plan_beside(demo_certificate(), "nowhere") is None
    True
    """
    plan, record = certificate.sampling_plan(), certificate.sampling
    if plan is None or record is None or record.control_variates is None:
        return plan
    features = stored_features(RunDirectory(uri), record.control_variates.sha256)
    _require_equal("control_variates.features", len(record.control_variates.features), features.table.shape[1])
    return with_controls(plan, features, _planned_windows(certificate))


def _planned_windows(certificate: CertificateRecord) -> NDArray[np.int64]:
    import numpy as np

    from tokenbound.corpus.windows import hashed_order

    if certificate.sampling is None:
        return np.arange(certificate.num_windows)
    _require_equal("num_windows", certificate.num_windows, certificate.sampling.num_windows)
    return hashed_order(
        certificate.num_windows,
        artifact_sha256=certificate.artifact_sha256,
        corpus_sha256=certificate.corpus_sha256,
        fingerprint=certificate.scoring_fingerprint,
        seed=certificate.sampling.seed,
        first=certificate.sampling.scored_windows,
    )


@dataclass(frozen=True)
class _Draw:
    """How a certificate says that its windows were drawn, in the words of the config."""

    certificate: CertificateRecord

    @property
    def is_full(self) -> bool:
        return self.certificate.sampling is None

    @property
    def seed(self) -> int:
        # Where every window is scored nothing is drawn: the seed is only a name of the run.
        record = self.certificate.sampling
        return self.certificate.scoring_identity["seed"] if record is None else record.seed

    @property
    def pilot_windows(self) -> int:
        record = self.certificate.sampling
        return 0 if record is None else record.pilot_windows


def _require_same(name: str, printed: dict[str, Any], rebuilt: dict[str, Any]) -> None:
    """An identity is what its certificate's fields make of it, to the last key.

    Raises:
        MismatchError: it is not; the message names the keys that differ.
    """
    if canonical_json(printed) != canonical_json(rebuilt):
        raise MismatchError(f"{name} is not that of the certificate's own fields: {differences(printed, rebuilt)}")


def _require_equal(name: str, printed: object, recomputed: object) -> None:
    if not _agree(printed, recomputed):
        raise MismatchError(
            f"{name}: the certificate says {shortened(str(printed), 80)}, but losses and artifact give "
            f"{shortened(str(recomputed), 80)}"
        )


def _agree(left: object, right: object) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if (isinstance(left, float) and isinstance(right, float | int)) or (
        isinstance(right, float) and isinstance(left, int)
    ):
        return math.isclose(left, right, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-12)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_agree(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(_agree(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def _run_folder(path: str) -> str:
    return split(path)[0] if base_name(path) == "losses" else path


def _open(certificate: CertificateRecord, place: str) -> ArtifactFile:
    """The artifact at a path or URI.

    Raises:
        IncompleteError: there is none.
        MismatchError: what is there is not the certificate's.
    """
    try:
        return open_artifact(place)
    except FileNotFoundError:
        raise IncompleteError(f"{place} does not exist; is {split(place)[0]} a finished run?") from None
    except ArtifactError as error:
        if not is_uri(place):
            _require_equal("artifact_sha256", certificate.artifact_sha256, file_sha256(place))
        raise MismatchError(str(error)) from None
