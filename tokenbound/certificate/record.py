"""The risk certificate as data: what is claimed and from what. `tokenbound.api` makes the public class of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenbound.bounds.claim import Claim, SamplingPlan
from tokenbound.bounds.decisions import TreeChoice
from tokenbound.certificate.reduce import RunLedger
from tokenbound.errors import MismatchError
from tokenbound.store.losses import ALL_COLUMNS
from tokenbound.store.run import (
    RunDirectory,
)
from tokenbound.store.sections import (
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
    Words,
    first_problem,
)
from tokenbound.store.uri import split

SCHEMA_VERSION = 1
SCHEMA_ID = f"urn:tokenbound:certificate:{SCHEMA_VERSION}"
"""Name of the JSON schema that is published as `tokenbound/data/certificate.schema.json`."""


class ControlVariatesRecord(BaseModel):
    """What was known of every window of the corpus before any was drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: Literal["ngrams-1"]
    """How the features are computed from the corpus."""
    features: list[Words]
    """Their names; the factor of each is in the lines' parameters."""
    sha256: Digest
    """Of the features of all windows, `features.npy` of the run directory."""


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
    control_variates: ControlVariatesRecord | None = None
    """Null where the sampling error was computed on the windows' sums as they are."""
    window_budgets: bool = False
    """Whether windows have a budget, behind which they are predicted uniformly; false in older certificates."""

    @property
    def has_controls(self) -> bool:
        """Whether control variates are used."""
        return self.control_variates is not None

    @property
    def has_budgets(self) -> bool:
        """`window_budgets`, by the name that it has in a config."""
        return self.window_budgets


class SelectionRecord(BaseModel):
    """Where the ordinal of a configuration comes from. It is declared: a register knows what this machine tried."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    counted_by: Literal["register", "config"]
    """`register`: counted beside the prepared corpus. `config`: given there, and not below the register's."""
    shipped: Count
    """Ordinals that the package's authors had used on this corpus; the count goes on from there."""


class CertificateRecord(BaseModel):
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

    @property
    def tree(self) -> TreeChoice | None:
        """The tree along which decisions were scored; None where they were not.

        Raises:
            MismatchError: it is no tree.
        """
        named = self.scoring_identity.get("tree")
        return None if named is None else TreeChoice.from_dict(named)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a certificate.

        Args:
            path: file or URI.

        Raises:
            IncompleteError: there is none.
            MismatchError: it is damaged or of another schema version.

        >>> from importlib.resources import files
        >>> certificate = CertificateRecord.load(str(files("tokenbound") / "data" / "demo.certificate.json"))
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
        ...     CertificateRecord.load(f"{folder}/certificate.json").claim() == demo_certificate().claim()
        True
        """
        folder, name = split(str(path))
        RunDirectory(folder).write_json(name, self.model_dump(mode="json"))

    def claim(self) -> Claim:
        """The claim that this certificate makes, for the bounds.

        >>> from tokenbound.demo import demo_certificate
        >>> demo_certificate().claim().methods
        ('freedman', 'azuma', 'kl', 'bits')
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
            tree=None if self.tree is None else self.tree.name,
            tree_lengths=None if self.tree is None else self.tree.lengths,
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
            max_unit_decisions=self.corpus.get("max_window_decisions"),
            num_decisions=self.corpus.get("num_decisions"),
            has_budgets=record.window_budgets,
        )

    def ledger(self, uri: str) -> RunLedger:
        """The losses of this certificate inside a run directory, with every column.

        Args:
            uri: the run directory.

        Raises:
            IncompleteError: a shard is not committed.
            MismatchError: it was committed by another run, or the shards hold other windows than were sampled.

        >>> from tokenbound.demo import demo_certificate
        >>> demo_certificate().ledger("nowhere").record(0)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        tokenbound.errors.IncompleteError: nowhere: shard 0 is not committed
        """
        ledger = RunLedger(
            uri,
            self.num_shards,
            self.scoring_fingerprint,
            self.vocab_size,
            ALL_COLUMNS,
            earlier_fingerprints=tuple(self.earlier_fingerprints),
        )
        return ledger if self.sampling is None else ledger.first_windows(self.sampling.scored_windows)

    def extends(self, other: CertificateRecord) -> bool:
        """Whether this is the same claim as an earlier one, on a corpus that has grown since.

        Args:
            other: the earlier certificate.

        >>> from tokenbound.demo import demo_certificate
        >>> demo_certificate().extends(demo_certificate())
        False
        """
        same = {**other.claim_identity, "scoring_fingerprint": self.scoring_fingerprint} == self.claim_identity
        return same and other.scoring_fingerprint in self.earlier_fingerprints


def possible_tokens(certificate: CertificateRecord) -> tuple[int, int]:
    """How few and how many tokens the windows of the corpus can hold, as far as it shows without the corpus.

    >>> from tokenbound.demo import demo_certificate
    >>> low, high = possible_tokens(demo_certificate())
    >>> low <= demo_certificate().num_tokens <= high, high - low
    (True, 0)
    """
    if certificate.sampling is None:
        return certificate.num_tokens, certificate.num_tokens
    sample, protocol = certificate.sampling, certificate.protocol
    left = sample.num_windows - sample.scored_windows
    lowest, highest = (
        certificate.num_scored_tokens + left,
        certificate.num_scored_tokens + left * sample.max_window_tokens,
    )
    every_id = "targets" not in certificate.corpus
    if protocol["context"] == "packed" and certificate.corpus.get("segments") == 1 and every_id:
        # One stream: every window but the last is full.
        full = max(0, sample.num_windows - 2) * protocol["stride"]
        first = protocol["length"] if sample.num_windows > 1 else 0
        step = protocol["stride"] if sample.num_windows > 1 else protocol["length"]
        lowest, highest = max(lowest, first + full + 1), min(highest, first + full + step)
    return lowest, highest
