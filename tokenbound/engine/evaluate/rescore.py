"""Scoring random windows again from artifact and corpus, so that forged losses do not verify."""

from __future__ import annotations

import math
import random
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenbound.bounds.decisions import LEVEL_STEP, LEVELS, MAX_LEVEL, level_of
from tokenbound.bounds.lines import counts_documents
from tokenbound.certificate.control_variates import feature_rule
from tokenbound.certificate.decisions import DEEPEST_NLL_NATS
from tokenbound.certificate.identity import differences, fingerprint, scoring_protocol, smallest_batch
from tokenbound.certificate.record import CertificateRecord
from tokenbound.certificate.reduce import RunLedger
from tokenbound.certificate.verify import verified_ledger
from tokenbound.config.run import RunConfig
from tokenbound.corpus.ngram_features import compute_features
from tokenbound.corpus.prepare import prepare_corpus
from tokenbound.corpus.prepared import Manifest, PreparedCorpus
from tokenbound.corpus.summary import CorpusDecisions, corpus_section
from tokenbound.corpus.windows import CorpusPlan, gather
from tokenbound.engine.artifacts import named_artifact
from tokenbound.engine.evaluate.decisions import corpus_decisions
from tokenbound.engine.evaluate.stages import ReplicaSpec, ScoreShard, WindowSpec, open_plan
from tokenbound.engine.evaluate.weights_form import form_here
from tokenbound.errors import IncompleteError, MismatchError
from tokenbound.store.copies import local_copy
from tokenbound.store.filesystem import anchored
from tokenbound.store.losses import Losses
from tokenbound.store.run import RunDirectory

TOLERANCE_NATS = {"float32": 5e-3, "bfloat16": 0.25, "float16": 0.1}
"""Largest difference of one token's loss between two machines, nats, by dtype of the body; its mean over a window may
be a tenth."""

TIE_LOGITS = {"float32": 5e-3, "bfloat16": 0.25, "float16": 0.1}
"""Two logits this close may be ordered either way on another machine: a rank may differ by the logits within it of the
target's, and by no other."""

SYSTEMATIC_NATS = {"float32": 1e-5, "bfloat16": 2e-3, "float16": 5e-4}
"""Mean difference of all tokens scored again that needs no excuse: what another order of the same float additions
leaves. Means of float32 losses on other batch shapes and numbers of threads agree to 1e-7; a bound is printed to four
decimals, 1e-4 bits or 7e-5 nats."""

TYPICAL_NATS = {"float32": 1e-3, "bfloat16": 0.08, "float16": 0.02}
"""Most that the standard deviation of one token's rounding may count for: a forger may not buy room for a shift of the
mean by adding noise."""

STANDARD_ERRORS = 4.0
"""How many of its own standard errors the mean of symmetric rounding may be off: one honest check in 16,000 fails."""

CONFIDENCE = 0.95
"""With which forged windows would have been found, where `Rescored` says how many."""

UNCOMPARED_CORPUS_KEYS = frozenset({"paths", "python", "skipped"})
"""What may differ on another machine although the corpus is the same: where its files are, the build of the Python
whose library it is, and files in the same folders that are no part of it. Digests decide about the contents."""


@dataclass(frozen=True)
class Rescored:
    """What was scored again, and how well it agreed."""

    windows: int
    """Distinct windows that were scored again."""
    of_windows: int
    """Recorded windows, from which they were drawn without replacement."""
    tokens: int
    """Tokens in them."""
    largest_difference_nats: float
    """Largest difference of any recorded column from the model's, over one token."""
    detectable_share: float
    """Of the recorded windows: were this share forged beyond the tolerances, one would have been drawn with 95 %."""
    unmatched_names: tuple[str, ...] = ()
    """Names on the certificate that are not those of the config; the digests agree."""
    control_variates: bool = False
    """Whether the control variates were computed again from the corpus."""


def detectable_share(population: int, drawn: int, confidence: float = CONFIDENCE) -> float:
    """The smallest share of a population of which a draw without replacement meets one with this probability.

    Args:
        population: all windows.
        drawn: how many of them were drawn.
        confidence: the probability of meeting at least one.

    >>> detectable_share(1000, 1000), detectable_share(1000, 20), detectable_share(100, 0)
    (0.001, 0.138, 1.0)
    """
    if drawn == 0:
        return 1.0
    low, high = 1, population
    while low < high:
        middle = (low + high) // 2
        if _log_miss(population, drawn, middle) <= math.log(1 - confidence):
            high = middle
        else:
            low = middle + 1
    return low / population


def _log_miss(population: int, drawn: int, forged: int) -> float:
    """Logarithm of the hypergeometric probability that a draw meets none of the forged windows."""
    honest = population - forged
    if drawn > honest:
        return -math.inf
    return (
        math.lgamma(honest + 1)
        - math.lgamma(honest - drawn + 1)
        - math.lgamma(population + 1)
        + math.lgamma(population - drawn + 1)
    )


def rescore(
    certificate: CertificateRecord,
    config: RunConfig,
    *,
    losses: str,
    artifact: str,
    windows: int,
    base: str | None = None,
    device: str = "cpu",
    seed: int | None = None,
) -> Rescored:
    """Prepare the corpus again, draw windows that nobody could foresee, score them and compare.

    Args:
        certificate: one whose losses and artifact have been verified.
        config: its run config: where the corpus is, and how it is read, cut and scored.
        losses: its run directory.
        artifact: its artifact, a path or URI.
        windows: how many windows to draw, without replacement; more than there are means all.
        base: where a delta's base is; default where the config says.
        device: where to score.
        seed: of the draw, for a check that is to be repeated; default unpredictable.

    Returns:
        How much was scored again, and how well it agreed.

    Raises:
        IncompleteError: the model is a delta and nothing says where its base is, or there is no plan of the run.
        MismatchError: artifact, losses, corpus or protocol are not the certificate's, or a recorded loss is not what
            the model gives.
    """
    ledger = verified_ledger(certificate, losses)
    base = base or config.what.model.base
    if base is None and "base" in certificate.scoring_identity:
        raise IncompleteError("the certificate is of a delta; give its base with --base to score windows again")
    _require_protocol(certificate, config)
    with tempfile.TemporaryDirectory() as cache:
        corpus = prepare_corpus(config.what.corpus, cache, segments=_segments(certificate, losses))
        protocol = certificate.protocol
        cut = WindowSpec(protocol["length"], protocol["context"], protocol["stride"], len(corpus.manifest.segments))
        plan = open_plan(cache, cut)[1]
        _require_corpus(certificate, config, corpus, plan)
        has_controls = _require_controls(certificate, config, corpus)
        shape = protocol["dtype"], smallest_batch(protocol), protocol["length"]
        found = _base_of(certificate, base)
        digest, folder = certificate.artifact_sha256, config.how.local_folder
        opened = named_artifact(artifact, sha256=digest, folder=folder, field="artifact")
        form = "dense" if found is not None else form_here(config.how, opened)
        spec = ReplicaSpec(artifact, *shape, device, threads=1, base=found, tree=certificate.tree, weights=form)
        score = ScoreShard(replace(spec, artifact_sha256=digest, local_folder=folder))
        drawn, total = _draw(ledger, windows, seed)
        check = _Comparison(certificate)
        for recorded, rows in drawn:
            for some in np.split(rows, range(shape[1], len(rows), shape[1])):
                check.compare(score, gather(corpus, plan.windows(recorded.window_id[some]), cut.length), recorded, some)
        check.finish()
    count = sum(len(rows) for _, rows in drawn)
    return Rescored(
        windows=count,
        of_windows=total,
        tokens=check.tokens,
        largest_difference_nats=check.largest,
        detectable_share=detectable_share(total, count),
        unmatched_names=_unmatched_names(certificate, config, corpus, plan),
        control_variates=has_controls,
    )


# --- what is named -----------------------------------------------------------------------------------------------


def _require_protocol(certificate: CertificateRecord, config: RunConfig) -> None:
    """The config scores as the certificate says, and declares the same tokenizer.

    Raises:
        MismatchError: it does not.
    """
    what = config.what
    protocol = scoring_protocol(what.model, what.corpus, what.windows)
    claimed = certificate.scoring_identity.get("protocol", {})
    if protocol != claimed:
        raise MismatchError(
            f"protocol: the config scores otherwise than the certificate says: {differences(claimed, protocol)}; give "
            "the config of this run with --corpus"
        )
    kind = certificate.declarations.get("tokenizer_is")
    if kind != what.corpus.tokenizer_is:
        raise MismatchError(
            f"declarations.tokenizer_is: the certificate says {kind!r}, the config {what.corpus.tokenizer_is!r}"
        )


def _require_corpus(
    certificate: CertificateRecord, config: RunConfig, corpus: PreparedCorpus, plan: CorpusPlan
) -> None:
    """All that the certificate says of the corpus and of the model's source is what is found.

    Raises:
        MismatchError: a digest, a count or a name differs.
    """
    manifest = corpus.manifest
    if (manifest.corpus_sha256, manifest.tokens_sha256) != (certificate.corpus_sha256, certificate.tokens_sha256):
        raise MismatchError("this corpus is not the certificate's: files, tokenizer or BOS/EOS rule differ")
    planned: dict[str, Any] = {
        "num_tokens": plan.num_tokens,
        "num_windows": plan.num_windows,
        "tokenizer_vocab_size": manifest.vocab_size,
    }
    if certificate.sampling is not None:
        planned["max_window_tokens"] = plan.max_window_tokens
    claimed = {**certificate.model_dump(), **(certificate.sampling.model_dump() if certificate.sampling else {})}
    for name, value in planned.items():
        if claimed[name] != value:
            raise MismatchError(f"{name}: the certificate says {claimed[name]}, the corpus has {value}")
    summary = _corpus_section(certificate, config, corpus, plan)
    for name in sorted({*summary, *certificate.corpus} - UNCOMPARED_CORPUS_KEYS):
        if not _same(certificate.corpus.get(name), summary.get(name)):
            raise MismatchError(
                f"corpus.{name}: the certificate says {certificate.corpus.get(name)!r}, the config and corpus give "
                f"{summary.get(name)!r}"
            )
    source = config.what.model.artifact or config.what.model.checkpoint_place
    for name, value in (("source", source), ("base", config.what.model.base)):
        if name in certificate.model and certificate.model[name] != value:
            raise MismatchError(
                f"model.{name}: the certificate says {certificate.model[name]!r}, the config {value!r}; a name is only "
                "declared: give it to the config as it is on the certificate"
            )
    _require_growth(certificate, manifest)


def _require_controls(certificate: CertificateRecord, config: RunConfig, corpus: PreparedCorpus) -> bool:
    """The control variates of a sample are those of this corpus; whether there are any.

    Raises:
        MismatchError: they are others.
    """
    record = None if certificate.sampling is None else certificate.sampling.control_variates
    if record is None:
        return False
    rule = feature_rule(corpus.manifest, config.what.windows)
    found = compute_features(corpus.root, rule).sha256
    if (record.features, record.sha256) != (list(rule.names), found):
        raise MismatchError(
            f"control_variates: the certificate says {record.sha256[:12]}..., the corpus gives {found[:12]}...; its "
            "sampling error was not computed from this corpus"
        )
    return True


def _same(left: object, right: object) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-9)
    return type(left) is type(right) and bool(left == right)


def _require_growth(certificate: CertificateRecord, manifest: Manifest) -> None:
    """The earlier fingerprints are those of this corpus while it was shorter, in order.

    Raises:
        MismatchError: one is not.
    """
    known = [
        fingerprint(
            {
                **certificate.scoring_identity,
                "corpus_sha256": shorter.corpus_sha256,
                "tokens_sha256": shorter.tokens_sha256,
            }
        )
        for shorter in [*manifest.prefixes()][:-1]
    ]
    left = iter(known)
    for earlier in certificate.earlier_fingerprints:
        if earlier not in left:  # consumes what comes before it, so the order counts
            raise MismatchError(
                f"earlier_fingerprints: {earlier} is not this corpus at an earlier size; shards scored under it belong "
                "to another model, corpus or protocol"
            )


def _corpus_section(
    certificate: CertificateRecord, config: RunConfig, corpus: PreparedCorpus, plan: CorpusPlan
) -> dict[str, Any]:
    """What the certificate would say of this corpus."""
    return corpus_section(
        config.what.corpus,
        corpus.manifest,
        plan,
        context=config.what.windows.context,
        skipped=corpus.skipped,
        num_documents=plan.num_sequences if counts_documents(certificate.methods) else None,
        decisions=_decisions(certificate, corpus),
    )


def _decisions(certificate: CertificateRecord, corpus: PreparedCorpus) -> CorpusDecisions | None:
    if certificate.tree is None or certificate.sampling is None:
        return None
    protocol = certificate.protocol
    spec = WindowSpec(protocol["length"], protocol["context"], protocol["stride"], len(corpus.manifest.segments))
    return corpus_decisions(corpus.root, spec, certificate.tree, certificate.vocab_size)


def _unmatched_names(
    certificate: CertificateRecord, config: RunConfig, corpus: PreparedCorpus, plan: CorpusPlan
) -> tuple[str, ...]:
    summary = _corpus_section(certificate, config, corpus, plan)
    keys = sorted(UNCOMPARED_CORPUS_KEYS & certificate.corpus.keys())
    return tuple(f"corpus.{key}" for key in keys if certificate.corpus[key] != summary.get(key))


def _base_of(certificate: CertificateRecord, base: str | None) -> str | None:
    """Where the base of a delta is, after checking that it is the certificate's; None for a whole model."""
    from tokenbound.models.weights import read_base

    recorded = certificate.scoring_identity.get("base")
    if recorded is None or base is None:
        return None
    found = read_base(local_copy(anchored(base))).identity
    if found != recorded:
        raise MismatchError(f"base {base} is not the certificate's: digests {found}, not {recorded}")
    return anchored(base)


def _segments(certificate: CertificateRecord, losses: str) -> list[list[str]] | None:
    """How the corpus grew, as the run noted; only a hint: the digests of the certificate decide."""
    found = RunDirectory(losses).plan().get("segments")
    return None if found is None else found[: int(certificate.corpus.get("segments", len(found)))]


# --- what is scored ----------------------------------------------------------------------------------------------


def _draw(ledger: RunLedger, count: int, seed: int | None = None) -> tuple[list[tuple[Losses, NDArray[Any]]], int]:
    """Recorded windows drawn without replacement, from the system's entropy unless a seed is given.

    Returns:
        Of each shard that was met its losses and the rows drawn; and how many windows there were to draw from.
    """
    sizes = np.cumsum([0, *(ledger.record(shard).windows for shard in range(ledger.num_shards))])
    sizes[-1] = sizes[-1] if ledger.last_windows is None else sizes[-2] + ledger.last_windows
    total = int(sizes[-1])
    generator = random.SystemRandom() if seed is None else random.Random(seed)
    drawn = np.sort(np.array(generator.sample(range(total), min(count, total)), np.int64))
    shards = np.searchsorted(sizes, drawn, side="right") - 1
    found = [(ledger.losses(int(shard)), drawn[shards == shard] - sizes[shard]) for shard in np.unique(shards)]
    return found, total


class _Comparison:
    """Recorded losses against those of the model, window by window and in the mean.

    Rounding differs between machines, but symmetrically: over many tokens its mean is far smaller than over one. A
    shift that hides inside the tolerance of every token is therefore found in the mean, of which nothing is left but
    `SYSTEMATIC_NATS` and a few standard errors. The bound depends on losses through means, so what passes here moves it
    by no more than that. Single tokens are not tested for signs: a few that are shifted move no mean. Ranks are
    counted, not averaged, so there the signs are tested: among the tokens that changed sides of a top-k, as many must
    have become errors as ceased to be. Of decisions only tables are recorded: the levels of each outcome, in order,
    must lie between those that the tolerance leaves at least and at most, and their summed loss must not be shifted.
    """

    def __init__(self, certificate: CertificateRecord) -> None:
        self.certificate, self.dtype = certificate, certificate.protocol["dtype"]
        self.tokens, self.largest = 0, 0.0
        self.moments: dict[str, NDArray[np.float64]] = {}
        """Of each column: number, sum and sum of squares of the differences."""
        self.flipped = {k: [0, 0] for k in certificate.top_k}
        """Of each k: tokens that are errors only for the model, and only in the record."""
        self.decisions = np.zeros(3)
        """Tokens, shift of their decisions' summed loss in nats, and the squares by which rounding may move it."""

    def compare(self, score: ScoreShard, batch: Any, recorded: Losses, rows: NDArray[Any]) -> None:
        """Score some windows of a shard again.

        Raises:
            MismatchError: one differs by more than two machines can.
        """
        found = score(
            {
                "shard": 0,
                "windows": recorded.window_id[rows].tobytes(),
                "inputs": batch.inputs,
                "targets": batch.targets,
                "mask": batch.mask,
                "document": batch.document,
                "position": batch.position,
            }
        )
        if found["vocab_size"] != self.certificate.vocab_size:
            raise MismatchError(
                f"vocab_size: the certificate says {self.certificate.vocab_size}, the model's logits have "
                f"{found['vocab_size']}"
            )
        assert score.replica is not None, "it has just scored"
        limits = score.replica.rank_limits(batch.inputs, batch.targets, batch.mask, TIE_LOGITS[self.dtype])
        scored: dict[str, Any] = {**found, "lowest_rank": limits[0][batch.mask], "highest_rank": limits[1][batch.mask]}
        if score.replica.tree is not None:
            found_odds = score.replica.decision_log_odds(batch.inputs, batch.targets, batch.mask)
            scored["log_odds"] = found_odds[batch.mask]
            scored["outcomes"] = score.replica.tree.outcomes(scored["token"])
        ends = np.cumsum([0, *scored["lengths"]])
        for row, start, stop in zip(rows, ends, ends[1:], strict=False):
            own = {name: value[start:stop] for name, value in scored.items() if _is_by_token(value, int(ends[-1]))}
            self._window(recorded, int(row), own)

    def _window(self, recorded: Losses, row: int, scored: dict[str, NDArray[Any]]) -> None:
        window = int(recorded.window_id[row])
        cut = slice(int(recorded.offsets[row]), int(recorded.offsets[row + 1]))
        if recorded.token is not None and not np.array_equal(recorded.token[cut], scored["token"]):
            raise MismatchError(f"window {window}: the recorded tokens are not the corpus's")
        for name in ("document", "position"):
            if not np.array_equal(getattr(recorded, name)[cut], scored[name]):
                raise MismatchError(f"window {window}: the recorded column {name} is not the corpus's")
        if "log_odds" in scored:
            self._decisions(recorded, row, scored)
        if bool(recorded.unscored[row]):  # counted at the worst case, whatever the model gives
            return
        if (recorded.alpha is None) != ("alpha" not in scored):
            raise MismatchError(f"window {window}: the column `alpha` and the model's smoothing head do not agree")
        if recorded.rank is None:
            raise MismatchError(f"window {window}: no ranks are recorded")
        for name in ("nll", "entropy", "alpha", "base_nll", "base_entropy"):
            if name in scored:
                self._column(recorded, cut, scored[name], name)
        self._ranks(recorded.rank[cut], scored, window)
        self.tokens += cut.stop - cut.start

    def _column(self, recorded: Losses, cut: slice, scored: NDArray[Any], name: str) -> None:
        """Compare one column over one window.

        Raises:
            MismatchError: a token, or the window's mean, differs by more than two machines can.
        """
        column = getattr(recorded, name)
        if column is None or len(column[cut]) != len(scored):
            raise MismatchError(f"a window's {name} is not recorded for every token")
        found, expected = column[cut].astype(np.float64), scored.astype(np.float64)
        # What an alpha does to a loss is at most the ratio of the two, in nats.
        with np.errstate(invalid="ignore"):
            off = np.log(found / expected) if name == "alpha" else found - expected
        size, tolerance = np.abs(off), TOLERANCE_NATS[self.dtype]
        if not (size.max(initial=0.0) <= tolerance and size.sum() <= tolerance / 10 * max(len(size), 1)):
            raise MismatchError(
                f"a window's recorded {name} differs from the model's by up to {size.max():.4f} nats (tolerance "
                f"{tolerance})"
            )
        self.largest = max(self.largest, float(size.max(initial=0.0)))
        moments = np.array([len(off), off.sum(), np.square(off).sum()])
        self.moments[name] = self.moments.get(name, np.zeros(3)) + moments

    def _ranks(self, recorded: NDArray[Any], scored: dict[str, NDArray[Any]], window: int) -> None:
        """A rank lies where the logits that tie with the target's leave it.

        Raises:
            MismatchError: one does not.
        """
        low, high = scored["lowest_rank"], scored["highest_rank"]
        outside = int(((recorded < low) | (recorded > high)).sum())
        if outside:
            at = int(np.flatnonzero((recorded < low) | (recorded > high))[0])
            top = next((k for k in self.certificate.top_k if (recorded[at] >= k) != (scored["rank"][at] >= k)), None)
            where = "" if top is None else f" at top-{top}"
            raise MismatchError(
                f"window {window}: {outside} of {len(recorded)} recorded ranks are not the model's{where}: the first "
                f"is {int(recorded[at])}, and logits closer than {TIE_LOGITS[self.dtype]} leave {int(low[at])} to "
                f"{int(high[at])}"
            )
        for k, counts in self.flipped.items():
            counts[0] += int(((scored["rank"] >= k) & (recorded < k)).sum())
            counts[1] += int(((scored["rank"] < k) & (recorded >= k)).sum())

    def _decisions(self, recorded: Losses, row: int, scored: dict[str, NDArray[Any]]) -> None:
        """Compare the table of one window with the log-odds of its decisions.

        The k-th smallest of some numbers moves by no more than the numbers do, so levels may be compared in order
        although a table does not say whose they are.

        Raises:
            MismatchError: other outcomes, or levels that the tolerance of the logits does not leave.
        """
        window, tables = int(recorded.window_id[row]), recorded.tables
        if tables is None:
            raise MismatchError(f"window {window}: no decisions are recorded")
        cut = slice(int(tables.offsets[row]), int(tables.offsets[row + 1]))
        outcome, level = np.divmod(np.repeat(tables.cell[cut], tables.count[cut]).astype(np.int64), LEVELS)
        free = np.where(scored["nll"] <= DEEPEST_NLL_NATS, 0.0, np.inf)[:, None]  # NaN and what float32 cannot resolve
        for side in (0, 1):
            own = scored["outcomes"] == side
            odds, room = scored["log_odds"][own].astype(np.float64), np.broadcast_to(free, own.shape)[own]
            tolerance = 2 * TOLERANCE_NATS[self.dtype]  # either side's mass may be off
            low, high = _levels_within(odds, tolerance + room)
            levels = level[outcome == side] - MAX_LEVEL
            if len(levels) != len(odds):
                raise MismatchError(
                    f"window {window}: {len(levels)} decisions of outcome {side} are recorded, its tokens have "
                    f"{len(odds)}"
                )
            outside = (levels < np.sort(low)) | (levels > np.sort(high))
            if outside.any():
                raise MismatchError(
                    f"window {window}: the levels of {int(outside.sum())} of {len(levels)} recorded decisions of "
                    f"outcome {side} are not the model's, to {tolerance} nats of their log-odds"
                )
            lost = np.logaddexp(0, np.arange(-MAX_LEVEL, MAX_LEVEL + 1) * (1 - 2 * side) * LEVEL_STEP)
            shift = lost[levels + MAX_LEVEL].sum() - lost[level_of(odds) + MAX_LEVEL].sum()
            low, high = _levels_within(odds, TYPICAL_NATS[self.dtype] + room)
            self.decisions[1:] += shift, np.square(lost[high + MAX_LEVEL] - lost[low + MAX_LEVEL]).sum()
        self.decisions[0] += len(scored["token"])

    def finish(self) -> None:
        """Compare the means over all windows.

        Raises:
            MismatchError: a column or an error rate is shifted as a whole.
        """
        for name, (count, total, squares) in self.moments.items():
            if count:
                self._mean(name, count, total / count, squares / count)
        count, total, squares = self.decisions
        if count:
            self._require_small("decisions", count, total / count, math.sqrt(squares) / count)
        for k, (better, worse) in self.flipped.items():
            if abs(better - worse) > STANDARD_ERRORS * math.sqrt(better + worse):
                raise MismatchError(
                    f"the recorded ranks are not the model's at top-{k}: of the tokens whose logits tie, {better} "
                    f"became right and {worse} wrong; rounding moves as many each way"
                )

    def _mean(self, name: str, count: float, mean: float, square: float) -> None:
        deviation = min(math.sqrt(max(square - mean * mean, 0.0)), TYPICAL_NATS[self.dtype])
        self._require_small(name, count, mean, deviation / math.sqrt(count))

    def _require_small(self, name: str, count: float, mean: float, standard_error: float) -> None:
        limit = SYSTEMATIC_NATS[self.dtype] + STANDARD_ERRORS * standard_error
        if abs(mean) > limit:
            raise MismatchError(
                f"the recorded {name} differs from the model by {mean:+.2e} nats in the mean of {int(count):,} tokens; "
                f"rounding would leave at most {limit:.1e}"
            )


def _levels_within(log_odds: NDArray[np.float64], room: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The lowest and highest level of log-odds that may be off by so much; no number is level 0 unless all may be."""
    known = np.where(np.isinf(room), 0.0, log_odds)
    return level_of(known - room), level_of(known + room)


def _is_by_token(value: object, tokens: int) -> bool:
    return isinstance(value, np.ndarray) and len(value) == tokens
