"""The risk certificate: what is claimed, from what, and how anyone can check it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenbound.bounds.claim import Claim, Line, SamplingPlan
from tokenbound.bounds.codes import artifact_code_length_bits
from tokenbound.bounds.constants import SAMPLING_DELTA_SHARE
from tokenbound.bounds.evidence import Evidence, merge_evidence
from tokenbound.bounds.lines import LINES, bound_named, counts_documents, find_bound
from tokenbound.bounds.lines.base import Setting
from tokenbound.config import BoundConfig
from tokenbound.errors import IncompleteError, InputError, MismatchError
from tokenbound.identity import (
    SOFTWARE_DECLARATIONS,
    applied_protocol,
    claim_identity,
    differences,
    fingerprint,
    protocol_bits,
    scoring_identity,
)
from tokenbound.ledger import Reduction, RunLedger, reduce_ledger, reduced_columns, shard_evidence
from tokenbound.sections import (
    ClaimIdentityDict,
    CodeSplitDict,
    CorpusDict,
    Count,
    DeclarationsDict,
    Digest,
    EnvironmentDict,
    LineDict,
    ModelDict,
    Moment,
    Positive,
    ProtocolDict,
    ScoringIdentityDict,
    Seed,
    Version,
    first_problem,
)
from tokenbound.store.losses import LIST_COLUMNS
from tokenbound.store.run import (
    ARTIFACT,
    CommitRecord,
    RunDirectory,
    canonical_json,
    losses_sha256,
    scoring_environments,
    sha256_hex,
)
from tokenbound.store.uri import base_name, join, split

SCHEMA_VERSION = 1
SCHEMA_ID = f"urn:tokenbound:certificate:{SCHEMA_VERSION}"
"""Name of the JSON schema that is published as `tokenbound/data/certificate.schema.json`."""
RELATIVE_TOLERANCE = 1e-9
"""Recomputed floats may differ by this much between NumPy versions; integers, texts and digests not at all."""


class SamplingRecord(BaseModel):
    """How a sample of windows was drawn; null in a certificate where every token was scored."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    seed: Seed
    num_windows: Positive
    """N: windows of the corpus."""
    max_window_tokens: Positive
    scored_windows: Positive
    """n: length of the prefix of the hashed order that was scored."""
    pilot_windows: Positive
    until_slack_bits: float | None
    evaluation: Positive | None = None


class SelectionRecord(BaseModel):
    """Where the ordinal of a configuration comes from. It is declared: a register knows what this machine tried."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    counted_by: Literal["register", "config"]
    """`register`: counted beside the prepared corpus. `config`: given there, and not below the register's."""
    shipped: Count
    """Ordinals that the package's authors had used on this corpus; the count goes on from there."""


class Certificate(BaseModel):
    """An upper bound on a model's risk and all it depends on. Rates are bits per token unless named otherwise."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        json_schema_extra={"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID},
    )

    schema_version: Literal[1] = 1
    bound_bits: float | None
    """The smallest loss line; null if only errors are bounded."""
    method: str | None
    """Its method."""
    empirical_risk_bits: float | None
    """Its mean smoothed loss on the scored tokens."""
    gap_bits: float | None
    """bound - empirical risk."""
    random_guess_bits: float
    """log2 of the tokenizer's vocabulary: the loss of guessing."""
    vacuous: bool
    """Whether no loss line is below random guessing."""
    delta: float
    """Probability that any line of `bounds` fails."""
    num_tokens: Positive
    """m: tokens that the bound speaks of."""
    num_scored_tokens: Positive
    """Tokens scored; smaller than m where windows were sampled."""
    num_windows: Positive
    """Windows of the whole corpus."""
    vocab_size: Positive
    """V: width of the logits."""
    tokenizer_vocab_size: Positive
    """V_tok: ids that the tokenizer can emit."""
    code_length_bits: float
    """L(h) as paid (0 under a holdout prior)."""
    code_split: CodeSplitDict
    """L(h) by what it pays for."""
    artifact_bytes: Count
    tune_bits: float | None
    """L_tune of the loss line quoted above."""
    alpha: float | None
    """Smoothing weight of the loss line quoted above."""
    bounds: list[LineDict]
    """Every line: method, top_k, value, empirical, kappa_nats, tune_bits, terms."""
    mean_nll_nats: float
    """Unsmoothed mean loss of the scored tokens, nats per token."""
    mean_nll_bits: float
    perplexity: float
    """exp of the unsmoothed mean."""
    bound_bits_per_byte: float | None
    """bound_bits per UTF-8 byte of the source text, where the source was text. Divided by the bytes of scored tokens
    alone: a first token without a context is not predicted, and its bytes are not counted."""
    mean_nll_bits_per_byte: float | None
    head_alpha_min: float | None = None
    """Of a model with a smoothing head: the lower limit of its alphas, a constant in the artifact."""
    num_worst_case_tokens: Count
    """Tokens without a finite loss, counted at the worst case."""
    prior: Literal["code", "holdout"]
    trial: Positive
    methods: list[str]
    top_k: list[Positive]
    declared_tokens: Positive | None
    unscorable: Literal["refuse", "worst_case"]
    protocol: ProtocolDict
    """How the model is applied to the corpus; paid for in L(h)."""
    sampling: SamplingRecord | None
    """How windows were drawn; null where every token was scored."""
    selection: SelectionRecord | None = None
    """How `trial` was counted; null in certificates made before it was recorded."""
    declarations: DeclarationsDict
    """What the user vouches for."""
    corpus: CorpusDict
    """Source, files, documents, tokens, bytes of text."""
    model: ModelDict
    """Architecture and source; of a quantized model the arithmetic that was scored; `adapter_base` where an adapter
    says that it was trained on another base; `other_weights` of the checkpoint that were not scored."""
    environment: EnvironmentDict
    """Versions that reduced; under `scored_by` those that scored, the device, and how many shards each scored."""
    scoring_identity: ScoringIdentityDict
    claim_identity: ClaimIdentityDict
    scoring_fingerprint: Digest
    earlier_fingerprints: list[Digest] = []
    """Scoring fingerprints while the corpus was shorter: shards scored then are part of these losses."""
    claim_fingerprint: Digest
    artifact_sha256: Digest
    corpus_sha256: Digest
    tokens_sha256: Digest
    losses_sha256: Digest
    num_shards: Positive
    tokenbound_version: Version
    created_at: Moment

    @property
    def ordinal(self) -> int:
        """`trial`, by the name that it has in a numbered config."""
        return self.trial

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a certificate.

        Args:
            path: file or URI.

        Raises:
            IncompleteError: there is none.
            MismatchError: it is damaged or of another schema version.

        >>> from importlib.resources import files
        >>> certificate = Certificate.load(str(files("tokenbound") / "data" / "demo.certificate.json"))
        >>> certificate.method, certificate.vacuous
        ('freedman', False)
        """
        folder, name = split(str(path))
        tree = RunDirectory(folder).read_json(name)
        if not isinstance(tree, dict) or type(tree.get("schema_version")) is not int:
            raise MismatchError(f"{path} is not a certificate: it has no field 'schema_version' with a number")
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise MismatchError(
                f"{path} is not a certificate of schema version {SCHEMA_VERSION}: {first_problem(error)}"
            ) from None

    def save(self, path: str | Path) -> None:
        """Write the certificate as JSON, atomically.

        Args:
            path: file or URI.

        >>> import tempfile
        >>> from tokenbound.demo import demo_certificate
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     demo_certificate().save(f"{folder}/certificate.json")
        ...     Certificate.load(f"{folder}/certificate.json") == demo_certificate()
        True
        """
        folder, name = split(str(path))
        RunDirectory(folder).write_json(name, self.model_dump(mode="json"))

    def table(self) -> str:
        """The certificate as text for a terminal of 100 columns.

        >>> from tokenbound.demo import demo_certificate
        >>> demo_certificate().table().splitlines()[0].strip("╭─╮ ")
        'risk certificate'
        """
        from tokenbound.report.terminal import certificate_text

        return certificate_text(self)

    def claim(self) -> Claim:
        """The claim that this certificate makes, for the bounds.

        >>> from tokenbound.demo import demo_certificate
        >>> demo_certificate().claim().methods
        ('freedman', 'azuma', 'kl')
        """
        return Claim(
            vocab_size=self.vocab_size,
            tokenizer_vocab_size=self.tokenizer_vocab_size,
            code_length_bits=math.fsum(self.code_split.values()),
            delta=self.delta,
            num_tokens=self.num_tokens,
            methods=tuple(self.methods),
            top_k=tuple(self.top_k),
            trial=self.trial,
            declared_tokens=self.declared_tokens,
            prior=self.prior,
            code_split=self.code_split,
            num_bases=self.declarations.get("num_bases", 0),
            head_alpha_min=self.head_alpha_min,
            num_documents=self.corpus.get("scored_documents"),
        )

    def sampling_plan(self) -> SamplingPlan | None:
        """The sampling plan, for the bounds; None where every token was scored.

        >>> from tokenbound.demo import demo_certificate
        >>> sample = SamplingRecord(
        ...     seed=0,
        ...     num_windows=5000,
        ...     max_window_tokens=512,
        ...     scored_windows=1000,
        ...     pilot_windows=256,
        ...     until_slack_bits=None,
        ... )
        >>> demo_certificate().model_copy(update={"sampling": sample}).sampling_plan().pilot_units
        256
        """
        if self.sampling is None:
            return None
        record = self.sampling
        return SamplingPlan(
            num_units=record.num_windows,
            max_unit_tokens=record.max_window_tokens,
            pilot_units=record.pilot_windows,
            trial=self.trial,
            evaluation=record.evaluation,
        )

    def ledger(self, uri: str) -> RunLedger:
        """The losses of this certificate inside a run directory, with every column.

        Args:
            uri: the run directory.

        Raises:
            IncompleteError: a shard is not committed.
            MismatchError: it was committed by another run, or the shards hold other windows than were sampled.

        >>> from tokenbound.demo import demo_certificate
        >>> demo_certificate().ledger("nowhere")  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        tokenbound.errors.IncompleteError: nowhere: shard 0 is not committed
        """
        ledger = RunLedger(
            uri,
            self.num_shards,
            self.scoring_fingerprint,
            self.vocab_size,
            tuple(LIST_COLUMNS),
            earlier_fingerprints=tuple(self.earlier_fingerprints),
        )
        return ledger if self.sampling is None else ledger.first_windows(self.sampling.scored_windows)

    def extends(self, other: Certificate) -> bool:
        """Whether this is the same claim as an earlier one, on a corpus that has grown since.

        Args:
            other: the earlier certificate.

        >>> from tokenbound.demo import demo_certificate
        >>> demo_certificate().extends(demo_certificate())
        False
        """
        same = {**other.claim_identity, "scoring_fingerprint": self.scoring_fingerprint} == self.claim_identity
        return same and other.scoring_fingerprint in self.earlier_fingerprints

    def verify(self, *, losses: str | Path, artifact: str | Path | bytes) -> None:
        """Recompute everything that losses and artifact determine and compare.

        The corpus is not read: that its tokens have these losses is what re-scoring checks.

        Args:
            losses: the run directory, or its `losses` folder.
            artifact: the artifact's file, or its bytes.

        Raises:
            IncompleteError: losses or artifact are not there.
            MismatchError: a byte of either changed, or a printed number does not follow from them.

        >>> from tokenbound.demo import demo_artifact, demo_certificate
        >>> forged = demo_artifact() + b"x"
        >>> demo_certificate().verify(losses="runs/demo", artifact=forged)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        tokenbound.errors.MismatchError: artifact_sha256: the certificate says 69f8.., but losses and artifact give ..
        """
        self._verify_identities()
        self._verify_artifact(artifact if isinstance(artifact, bytes) else _read(str(artifact)))
        ledger = verified_ledger(self, _run_folder(str(losses)))
        assert ledger.records is not None
        self._verify_growth(ledger.records)
        shapes = [(record.batch, record.windows) for record in ledger.records]
        _require_equal("protocol", self.protocol, applied_protocol(self.scoring_identity["protocol"], shapes))
        evidence = self._verify_windows(ledger)
        try:
            reduction = reduce_ledger(
                replace(ledger, columns=reduced_columns(self.claim())),
                self.claim(),
                self.sampling_plan(),
                evidence=evidence,
            )
        except InputError as error:
            raise MismatchError(f"the certificate claims what cannot be claimed: {error}") from None
        for name, value in derived_fields(reduction, self.claim(), self.corpus.get("bytes_per_token")).items():
            _require_equal(name, getattr(self, name), value)

    def _verify_identities(self) -> None:
        """Both identities are made again from the certificate's own fields, and nothing else may be in them."""
        missing = {"protocol", "seed"} - self.scoring_identity.keys()
        if missing:
            raise MismatchError(f"scoring_identity.{min(missing)} is missing")
        self._verify_declarations()
        self._verify_sampling()
        identity = scoring_identity(
            artifact_sha256=self.artifact_sha256,
            corpus_sha256=self.corpus_sha256,
            tokens_sha256=self.tokens_sha256,
            protocol={**self.protocol, "batch": self.scoring_identity["protocol"]["batch"]},
            sample=_Draw(self),
            base=self.scoring_identity.get("base"),
        )
        _require_same("scoring_identity", self.scoring_identity, identity)
        _require_equal("scoring_fingerprint", self.scoring_fingerprint, fingerprint(identity))
        evaluation = None if self.sampling is None else self.sampling.evaluation
        claimed = claim_identity(self.scoring_fingerprint, self, self.declarations, evaluation)
        _require_same("claim_identity", self.claim_identity, claimed)
        _require_equal("claim_fingerprint", self.claim_fingerprint, fingerprint(claimed))
        grown = bool(self.earlier_fingerprints) or self.corpus.get("segments", 1) > 1
        self._verify_methods()
        if self.declared_tokens is not None and grown:
            raise MismatchError("a number of tokens declared beforehand, of a corpus that has grown")
        if not isinstance(self.scoring_identity["protocol"]["batch"], int):
            raise MismatchError("scoring_identity.protocol.batch: a run asks for one batch; only memory may halve it")
        self._verify_corpus_section()
        _require_equal("random_guess_bits", self.random_guess_bits, math.log2(self.tokenizer_vocab_size))

    def _verify_declarations(self) -> None:
        """What this kind of claim rests on is declared, and nothing that it does not rest on."""
        declared = self.declarations
        _require_equal("prior", self.prior, declared["prior"])
        _require_equal("declared_tokens", self.declared_tokens, declared.get("declared_tokens"))
        first, *later = SOFTWARE_DECLARATIONS
        needed = {first: True, **dict.fromkeys(later, self.selection is not None)}
        needed["holdout_declaration"] = self.prior == "holdout"
        needed |= dict.fromkeys(("base_is_independent", "num_bases"), "base" in self.scoring_identity)
        for name, wanted in needed.items():
            if wanted and name not in declared:
                raise MismatchError(f"declarations.{name} is missing; the bound does not hold without it")
            if not wanted and name in declared:
                raise MismatchError(f"declarations.{name} is given, but this certificate does not rest on it")

    def _verify_corpus_section(self) -> None:
        """What the section says twice is said alike; the corpus itself is read when windows are scored again."""
        corpus = self.corpus
        for name in ("add_bos", "add_eos"):
            if name in corpus:
                _require_equal(f"corpus.{name}", corpus[name], self.protocol[name])
        if self.tokenizer_vocab_size > self.vocab_size:
            raise MismatchError(
                f"tokenizer_vocab_size {self.tokenizer_vocab_size} exceeds vocab_size {self.vocab_size}: the model "
                "could not predict every id"
            )
        if "tokens" in corpus:
            self._verify_contexts(corpus["tokens"])
        if corpus.get("scored_documents", 0) > corpus["documents"]:
            raise MismatchError(
                f"corpus.scored_documents {corpus['scored_documents']} exceeds corpus.documents {corpus['documents']}"
            )
        scored_bytes = corpus.get("scored_text_bytes", corpus.get("text_bytes"))
        if (scored_bytes or 0) > (corpus.get("text_bytes") or 0):
            raise MismatchError(
                f"corpus.scored_text_bytes {scored_bytes} exceeds corpus.text_bytes {corpus.get('text_bytes')}"
            )
        per_token = scored_bytes / self.num_tokens if scored_bytes else None
        _require_equal("corpus.bytes_per_token", corpus.get("bytes_per_token"), per_token)

    def _verify_contexts(self, ids: int) -> None:
        """Every id of the corpus is predicted but the first of each context: of a document, or of a packed segment."""
        packed, segments = self.protocol["context"] == "packed", self.corpus.get("segments", ids)
        most = segments if packed else self.corpus["documents"]
        if not ids - most <= self.num_tokens <= ids - 1:
            raise MismatchError(
                f"num_tokens: {self.num_tokens:,} cannot be predicted of the {ids:,} of corpus.tokens in "
                f"{self.corpus['documents']:,} documents"
            )

    def _verify_methods(self) -> None:
        """Every bound is installed, could be used in this run, and is declared where it comes from a plugin."""
        declared = self.declarations.get("plugins", {}).get(LINES.group, {})
        times_grown = max(len(self.earlier_fingerprints), self.corpus.get("segments", 1) - 1)
        setting = Setting(self.protocol["context"], self.sampling is not None, times_grown)
        for name in self.methods:
            if find_bound(name) is None:
                package = declared.get(name, "the package that provides it")
                raise IncompleteError(f"the bound `{name}` is not installed here; install {package} to verify its line")
            objection = bound_named(name).objection(setting)
            if objection is not None:
                raise MismatchError(f"method `{name}` {objection}")
        _require_equal("plugins", sorted(declared), [name for name in sorted(self.methods) if LINES.origin(name)])

    def _verify_sampling(self) -> None:
        """What decided the draw was fixed before it: pilot and seed name the run, the ordinal of the draw the claim."""
        identity, record = self.scoring_identity, self.sampling
        _require_equal("sampling", record is not None, identity.get("sampled"))
        _require_equal("sampling_delta_share", SAMPLING_DELTA_SHARE, self.claim_identity.get("sampling_delta_share"))
        _require_equal("evaluation", record and record.evaluation, self.claim_identity.get("evaluation"))
        if record is None:
            return
        _require_equal("seed", record.seed, identity.get("seed"))
        _require_equal("pilot_windows", record.pilot_windows, identity.get("pilot_windows"))
        _require_equal("num_windows", self.num_windows, record.num_windows)
        if not record.pilot_windows < record.scored_windows <= record.num_windows:
            raise MismatchError(
                f"sampling: {record.scored_windows} windows were scored, not more than the pilot's "
                f"{record.pilot_windows} or more than all {record.num_windows}"
            )
        if record.max_window_tokens > self.protocol["length"]:
            raise MismatchError(
                f"sampling.max_window_tokens {record.max_window_tokens} exceeds protocol.length "
                f"{self.protocol['length']}"
            )
        # The register counts draws over all lengths of a corpus; certificates older than it numbered them by length.
        if self.selection is None and self.corpus.get("segments", 1) > 1 and record.evaluation is None:
            raise MismatchError("sampling.evaluation: the corpus grew, so the ordinal of this draw must be given")

    def _verify_growth(self, records: tuple[CommitRecord, ...]) -> None:
        """Every earlier fingerprint is borne by a shard, each once; whose they were is known from the corpus alone."""
        earlier = self.earlier_fingerprints
        if len({*earlier, self.scoring_fingerprint}) != 1 + len(earlier):
            raise MismatchError("earlier_fingerprints: a fingerprint is given twice")
        if earlier and self.sampling is not None:
            raise MismatchError("earlier_fingerprints: a sample is drawn afresh from a corpus that grew")
        unused = set(earlier) - {record.scoring_fingerprint for record in records}
        if unused:
            raise MismatchError(f"earlier_fingerprints: no shard was scored under {min(unused)}")
        if len(earlier) >= self.corpus.get("segments", len(earlier) + 1):
            raise MismatchError(
                f"earlier_fingerprints: {len(earlier)} of a corpus of {self.corpus['segments']} segments, which grew "
                f"{self.corpus['segments'] - 1} times"
            )

    def _verify_artifact(self, data: bytes) -> None:
        from tokenbound.compression.artifact import parse_artifact
        from tokenbound.compression.methods import METHODS, plugins_of
        from tokenbound.models.quantized.methods import arithmetic_of
        from tokenbound.models.smoothing import alpha_min_of

        _require_equal("artifact_sha256", self.artifact_sha256, sha256_hex(data))
        _require_equal("artifact_bytes", self.artifact_bytes, len(data))
        try:
            parsed = parse_artifact(data)
        except InputError as error:
            raise MismatchError(f"artifact: {error}") from None
        self._verify_base(parsed.base)
        if self.declarations["tokenizer_is"] == "counted" and not parsed.tokenizer:
            raise MismatchError(
                "declarations.tokenizer_is: the certificate says 'counted', but the artifact holds no tokenizer"
            )
        plugins = self.declarations.get("plugins", {})
        if unknown := plugins.keys() - {LINES.group, METHODS.group}:
            raise MismatchError(f"declarations.plugins: there is no group {min(unknown)!r}")
        encoded_by = {group: names for group, names in plugins.items() if group == METHODS.group}
        _require_equal("declarations.plugins", encoded_by, plugins_of(parsed.settings))
        architecture = parsed.architecture
        _require_equal("head_alpha_min", self.head_alpha_min, alpha_min_of(architecture))
        _require_equal("model.architecture", self.model["architecture"], architecture.get("model_type"))
        _require_equal("model.arithmetic", self.model.get("arithmetic"), arithmetic_of(architecture))
        width = architecture.get("vocab_size")
        if isinstance(width, int) and self.vocab_size < width:
            raise MismatchError(f"vocab_size: the certificate says {self.vocab_size}, the model predicts {width} ids")
        split = code_split(len(data), self.protocol)
        _require_equal("code_split", self.code_split, split)
        _require_equal(
            "code_length_bits", self.code_length_bits, 0.0 if self.prior == "holdout" else math.fsum(split.values())
        )

    def _verify_base(self, named: dict[str, Any] | None) -> None:
        """A delta's base is the one that the artifact names, and is declared; a whole model has none."""
        from tokenbound.compression.delta import NAMED_BASE

        _require_equal(f"model.{NAMED_BASE}", self.model.get(NAMED_BASE), (named or {}).get(NAMED_BASE))
        recorded = self.scoring_identity.get("base") or {}
        _require_equal("base sha256", recorded.get("sha256"), None if named is None else named.get("sha256"))
        _require_equal("model.base", "base" in self.model, named is not None)

    def _verify_windows(self, ledger: RunLedger) -> Evidence:
        """The recorded windows are those planned, each once, in order; and they hold the tokens that are claimed.

        Returns:
            The evidence of these losses, whatever the commit records say.
        """
        expected, parts = self._planned_windows(), []
        documents: set[int] = set()
        by_document = self.sampling is None and counts_documents(self.methods)
        seen = tokens = worst = largest = 0
        for shard in range(self.num_shards):
            losses = ledger.losses(shard)
            parts.append(shard_evidence(losses, self.vocab_size, tuple(self.top_k)))
            ids = losses.window_id
            if seen + len(ids) > len(expected) or not (ids == expected[seen : seen + len(ids)]).all():
                raise MismatchError(
                    f"shard {shard} holds other windows than planned: missing, duplicate or re-ordered ones"
                )
            if int(losses.window_lengths.min(initial=1)) < 1:
                raise MismatchError(f"shard {shard} holds a window without a token")
            if by_document:
                documents.update(losses.document.tolist())
            seen += len(ids)
            tokens += losses.num_tokens
            worst += int(losses.window_lengths[losses.unscored].sum())
            largest = max(largest, int(losses.window_lengths.max(initial=0)))
        _require_equal("scored windows", len(expected), seen)
        _require_equal("num_scored_tokens", self.num_scored_tokens, tokens)
        _require_equal("num_worst_case_tokens", self.num_worst_case_tokens, worst)
        _require_equal("corpus.scored_documents", self.corpus.get("scored_documents"), len(documents) or None)
        if worst and self.unscorable != "worst_case":
            raise MismatchError(
                f"{worst} tokens have no finite loss and the claim does not count them at the worst case"
            )
        self._verify_num_tokens(tokens, largest)
        return merge_evidence(parts)

    def _verify_num_tokens(self, scored: int, largest: int) -> None:
        """The corpus has as many tokens as its windows can hold: all of a full run, some range of a sample."""
        if largest > self.protocol["length"]:
            raise MismatchError(f"a window has {largest} tokens, more than protocol.length {self.protocol['length']}")
        if self.sampling is None:
            _require_equal("num_tokens", self.num_tokens, scored)
            return
        limit = self.sampling.max_window_tokens
        if largest > limit:
            raise MismatchError(f"a window has {largest} tokens, more than max_window_tokens {limit}")
        lowest, highest = possible_tokens(self)
        if not lowest <= self.num_tokens <= highest:
            raise MismatchError(
                f"num_tokens: the certificate says {self.num_tokens:,}, but {self.num_windows:,} windows of at most "
                f"{limit:,} tokens, of which {scored:,} were seen, hold {lowest:,} to {highest:,}"
            )

    def _planned_windows(self) -> Any:
        import numpy as np

        from tokenbound.corpus.windows import hashed_order

        if self.sampling is None:
            return np.arange(self.num_windows)
        _require_equal("num_windows", self.num_windows, self.sampling.num_windows)
        return hashed_order(
            self.num_windows,
            artifact_sha256=self.artifact_sha256,
            corpus_sha256=self.corpus_sha256,
            fingerprint=self.scoring_fingerprint,
            seed=self.sampling.seed,
            first=self.sampling.scored_windows,
        )


def verified_ledger(certificate: Certificate, uri: str) -> RunLedger:
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
    if certificate.selection is not None:
        scored_by = scoring_environments(records)
        _require_equal("environment.scored_by", certificate.environment.get("scored_by"), scored_by)
    return replace(ledger, records=records)


def possible_tokens(certificate: Certificate) -> tuple[int, int]:
    """How few and how many tokens the windows of the corpus can hold, as far as it shows without the corpus.

    >>> from tokenbound.demo import demo_certificate
    >>> low, high = possible_tokens(demo_certificate())
    >>> low <= demo_certificate().num_tokens <= high, high - low
    (True, 511)
    """
    if certificate.sampling is None:
        return certificate.num_tokens, certificate.num_tokens
    sample, protocol = certificate.sampling, certificate.protocol
    left = sample.num_windows - sample.scored_windows
    lowest, highest = (
        certificate.num_scored_tokens + left,
        certificate.num_scored_tokens + left * sample.max_window_tokens,
    )
    if protocol["context"] == "packed" and certificate.corpus.get("segments") == 1:
        # One stream: every window but the last is full.
        full = max(0, sample.num_windows - 2) * protocol["stride"]
        first = protocol["length"] if sample.num_windows > 1 else 0
        step = protocol["stride"] if sample.num_windows > 1 else protocol["length"]
        lowest, highest = max(lowest, first + full + 1), min(highest, first + full + step)
    return lowest, highest


def code_split(artifact_bytes: int, protocol: dict[str, Any]) -> dict[str, float]:
    """L(h) by what it pays for, bits. A counted tokenizer and a delta's base digest are inside the artifact."""
    return {
        "artifact": float(artifact_code_length_bits(artifact_bytes)),
        "protocol": float(protocol_bits(protocol)),
    }


def claim_of(
    bound: BoundConfig,
    *,
    artifact_bytes: int,
    protocol: dict[str, Any],
    vocab_size: int,
    tokenizer_vocab_size: int,
    num_tokens: int,
    num_bases: int = 0,
    head_alpha_min: float | None = None,
    num_documents: int | None = None,
) -> Claim:
    """What a run's config claims about a model of this size on a corpus of this size."""
    split = code_split(artifact_bytes, protocol)
    return Claim(
        vocab_size=vocab_size,
        tokenizer_vocab_size=tokenizer_vocab_size,
        code_length_bits=math.fsum(split.values()),
        delta=bound.delta,
        num_tokens=num_tokens,
        methods=bound.methods,
        top_k=bound.top_k,
        trial=bound.ordinal,
        declared_tokens=bound.declared_tokens,
        prior=bound.prior,
        code_split=split,
        num_bases=num_bases,
        head_alpha_min=head_alpha_min,
        num_documents=num_documents,
    )


def derived_fields(reduction: Reduction, claim: Claim, bytes_per_token: float | None) -> dict[str, Any]:
    """Every number of a certificate that the losses and the claim determine."""
    best = best_loss_line(reduction.lines)
    mean = reduction.sums.mean_nll_nats
    per_byte = None if not bytes_per_token else 1 / bytes_per_token
    return {
        "bound_bits": best.value if best else None,
        "method": best.method if best else None,
        "empirical_risk_bits": best.empirical if best else None,
        "gap_bits": best.value - best.empirical
        if best and best.value is not None and best.empirical is not None
        else None,
        "vacuous": best is None or bool(best.vacuous),
        "tune_bits": best.tune_bits if best else None,
        "alpha": best.parameters.get("alpha") if best else None,
        "bounds": [plain(line.to_dict()) for line in reduction.lines],
        "mean_nll_nats": mean,
        "mean_nll_bits": mean / math.log(2),
        "perplexity": math.exp(min(mean, 700.0)),
        "bound_bits_per_byte": best.value * per_byte if best and best.value is not None and per_byte else None,
        "mean_nll_bits_per_byte": mean / math.log(2) * per_byte if per_byte else None,
    }


def best_loss_line(lines: tuple[Line, ...]) -> Line | None:
    """The loss line with the smallest value; all lines hold together, so the smallest may be quoted."""
    known = [(line.value, i) for i, line in enumerate(lines) if line.bounds_risk and line.value is not None]
    return lines[min(known)[1]] if known else None


def plain(tree: Any) -> Any:
    """As it will look after a round trip through JSON."""
    return json.loads(json.dumps(tree, allow_nan=False))


@dataclass(frozen=True)
class _Draw:
    """How a certificate says that its windows were drawn, in the words of the config."""

    certificate: Certificate

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


def _require_equal(name: str, printed: Any, recomputed: Any) -> None:
    if not _agree(printed, recomputed):
        raise MismatchError(
            f"{name}: the certificate says {_short(printed)}, but losses and artifact give {_short(recomputed)}"
        )


def _agree(left: Any, right: Any) -> bool:
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


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _run_folder(path: str) -> str:
    return split(path)[0] if base_name(path) == "losses" else path


def verify_beside(
    path: str | Path, *, losses: str | None = None, artifact: str | None = None
) -> tuple[Certificate, str, bytes]:
    """Verify a certificate with the losses and artifact that lie beside it, unless told otherwise.

    Args:
        path: certificate, file or URI.
        losses: run directory, or its `losses` folder.
        artifact: file or URI.

    Returns:
        The certificate, its run directory and the artifact's bytes.

    Raises:
        IncompleteError: certificate, losses or artifact are not there; arithmetic alone is no verification.
        MismatchError: something does not follow.

    >>> verify_beside("nowhere/certificate.json")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    tokenbound.errors.IncompleteError: nowhere/certificate.json does not exist
    """
    certificate = Certificate.load(path)
    folder = split(str(path))[0]
    run = _run_folder(losses or folder)
    if not RunDirectory(run).exists("shards"):
        raise IncompleteError(
            f"no losses at {run}; give the run directory with --losses (arithmetic alone verifies nothing)"
        )
    data = _read(artifact or join(folder, ARTIFACT))
    certificate.verify(losses=run, artifact=data)
    return certificate, run, data


def _read(path: str) -> bytes:
    folder, name = split(path)
    return RunDirectory(folder).read(name)
