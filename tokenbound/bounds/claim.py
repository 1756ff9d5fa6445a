"""What is claimed, what was tuned, and what is printed: plain frozen records with JSON forms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from tokenbound.bounds.codes import elias_delta_bits, shared_tune_bits
from tokenbound.bounds.constants import PILOT_TARGET_RATIO, SAMPLING_DELTA_SHARE
from tokenbound.bounds.controls import ControlVariates
from tokenbound.bounds.decisions import TreeName
from tokenbound.bounds.lines import automatic_bounds, bound_named, require_method
from tokenbound.bounds.smoothing import check_vocab_size
from tokenbound.errors import InputError

if TYPE_CHECKING:
    from tokenbound.bounds.lines.base import Bound

AlphaKind = Literal["constant", "entropy"]
DEFAULT_METHODS = ("freedman", "azuma", "kl")
"""The bounds that are printed unless others are named; they can be had of any losses."""

PROTOCOL = "protocol"
"""Name of the protocol's bits in `code_split`."""


@dataclass(frozen=True)
class Claim:
    """Everything about a certificate that is fixed before scoring, and the number of tokens.

    Raises:
        InputError: a field is out of range; the message names it.
    """

    vocab_size: int
    """V: width of the logits, padding rows included."""
    tokenizer_vocab_size: int
    """V_tok <= V: ids that the tokenizer can emit; decides what is vacuous."""
    code_length_bits: float
    """L(h): artifact, protocol and tokenizer together. Under the prior `holdout` it is recorded and not paid."""
    delta: float
    """Probability that any printed line fails."""
    num_tokens: int
    """m: scored positions of the whole corpus, counted exactly."""
    methods: tuple[str, ...] = DEFAULT_METHODS
    """Bounds to print, named before scoring."""
    top_k: tuple[int, ...] = (1, 10, 100)
    """Top-k errors that `kl` bounds."""
    trial: int = 1
    """Ordinal of this configuration among all tried on these tokens."""
    declared_tokens: int | None = None
    """m declared before the data was seen; if it equals `num_tokens`, Azuma's fixed-m form is used."""
    prior: Literal["code", "holdout", "online"] = "code"
    """`code` pays L(h). `holdout`: no scored token was used to choose the hypothesis, L(h) = 0. `online`: each token
    was predicted by a model made from earlier tokens alone, L(h) = 0; the risk is that of the sequence of models."""
    has_entropy: bool = True
    """Whether entropies were stored; without, forecasts are constant."""
    has_rank: bool = True
    """Whether ranks were stored; without, errors cannot be bounded."""
    has_alpha: bool = False
    """Whether the model has a smoothing head: per-token alphas, nothing about alpha is tuned."""
    alpha_min: float | None = None
    """With a smoothing head: the lower limit of its alphas, a constant of the hypothesis."""
    code_split: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Bits of `code_length_bits` by what they pay for, e.g. artifact, protocol, tokenizer. What stands under `protocol`
    is paid by the base of a delta too."""
    what_if: bool = False
    """`num_tokens` is hypothetical: the same losses, a larger m. Never a certificate."""
    num_bases: int = 0
    """M: of a model that is a delta on a base, among how many bases that base was picked after seeing the tokens (1: it
    was fixed before); such a claim prints the line `relative` too. 0: the model is no delta."""
    num_documents: int | None = None
    """Documents with a scored token, counted exactly; needed by `document`."""

    tree: TreeName | None = None
    """The tree of decisions along which tokens were scored, which `bits` needs; null where they were not."""
    tree_lengths: bytes | None = None
    """Of a tree from counts: the code length of each id, which `bits` pays for."""

    head_alpha_min: float | None = None
    """Of a model with a smoothing head: the lower limit of the head's alphas, a constant of the hypothesis. Its
    `companions` are then printed too."""
    alphas: Literal["any"] | AlphaKind = "any"
    """What `freedman` may choose from: a constant alpha, alpha(H), or whichever is better."""
    beside_lines: int = 0
    """Lines that another claim about the same losses prints beside these; they count in K."""

    def __post_init__(self) -> None:
        """Refuse what cannot be claimed."""
        check_vocab_size(self.vocab_size)
        if not 2 <= self.tokenizer_vocab_size <= self.vocab_size:
            raise InputError(
                f"tokenizer_vocab_size must lie in 2..{self.vocab_size}, got {self.tokenizer_vocab_size!r}"
            )
        if not 0 < self.delta < 1:
            raise InputError(f"delta is a probability in (0, 1), got {self.delta!r}")
        if self.num_tokens < 1:
            raise InputError(f"num_tokens must be positive, got {self.num_tokens!r}")
        if not (math.isfinite(self.code_length_bits) and self.code_length_bits >= 0):
            raise InputError(f"code_length_bits must be finite and >= 0, got {self.code_length_bits!r}")
        if self.num_bases < 0:
            raise InputError(f"num_bases counts the bases tried, from 1; got {self.num_bases!r}")
        self._check_methods()
        if self.prior not in ("code", "holdout", "online"):
            raise InputError(f"prior is `code`, `holdout` or `online`, got {self.prior!r}")
        if self.has_alpha != (self.alpha_min is not None):
            raise InputError("a model with an `alpha` column needs `alpha_min`, and only such a model")
        if self.alpha_min is not None and not 0 < self.alpha_min < 1:
            raise InputError(f"alpha_min must lie in (0, 1), got {self.alpha_min!r}")
        if self.code_split and not math.isclose(
            math.fsum(self.code_split.values()), self.code_length_bits, abs_tol=1e-6
        ):
            raise InputError(
                f"code_split {dict(self.code_split)} does not add up to code_length_bits {self.code_length_bits}"
            )
        elias_delta_bits(self.trial)

    def _check_methods(self) -> None:
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise InputError(f"methods must name some bounds, each once, got {self.methods!r}")
        baselines = [name for name in self.methods if not bound_named(require_method(name)).stands_alone]
        if len(baselines) == len(self.methods):
            raise InputError(
                f"methods: `{baselines[0]}` does not bound the risk of a token; name freedman or azuma beside it"
            )
        for bound in self.bounds:
            bound.check_claim(self)

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """Those that may have lines in this claim: what comes with it by itself, then what `methods` names."""
        return (*automatic_bounds(), *map(bound_named, self.methods))

    @property
    def lines(self) -> tuple[tuple[str, int | None], ...]:
        """(method, top_k) of the lines that :func:`~tokenbound.bounds.certify.certify` prints, in order.

        Those that bound the risk come first.
        """
        shared = sorted((bound for bound in self.bounds if bound.shares_pass), key=lambda bound: not bound.bounds_risk)
        return tuple((bound.name, top_k) for bound in shared for top_k in bound.rows(self))

    @property
    def num_lines(self) -> int:
        """K, unavailable lines included: they were named before scoring."""
        return sum(len(bound.rows(self)) for bound in self.bounds) + self.head_lines + self.beside_lines

    @property
    def head_lines(self) -> int:
        """How many lines a smoothing head adds: one for each bound that knows it, and those to compare with."""
        return 0 if self.head_alpha_min is None else self._smoothed_by_head + len(self._compared)

    @property
    def _smoothed_by_head(self) -> int:
        return sum(len(bound.rows(self)) for bound in self.bounds if bound.smooths_by_head)

    @property
    def _compared(self) -> tuple[tuple[str, AlphaKind], ...]:
        return tuple((bound.name, kind) for bound in self.bounds for kind in bound.compared_alphas(self))

    @property
    def companions(self) -> tuple[Claim, ...]:
        """Of a model with a smoothing head: freedman at a constant alpha, and at alpha(H), and all as the head smooths.

        They hold together with this claim, and with each other.
        """
        if not self.head_lines:
            return ()
        alone = replace(self, head_alpha_min=None, beside_lines=self.num_lines - 1)
        compared = (replace(alone, methods=(name,), alphas=kind) for name, kind in self._compared)
        return (*compared, self.head_claim)

    @property
    def head_claim(self) -> Claim:
        """What is claimed of the model as its own head smooths it; it holds together with this claim."""
        return replace(
            self,
            methods=tuple(bound.name for bound in self.bounds if bound.smooths_by_head),
            has_alpha=True,
            alpha_min=self.head_alpha_min,
            head_alpha_min=None,
            beside_lines=self.num_lines - self._smoothed_by_head,
        )

    @property
    def paid_code_bits(self) -> float:
        """L(h) as paid: 0 under a holdout prior, and where losses are those of a training run."""
        return self.code_length_bits if self.prior == "code" else 0.0

    @property
    def shared_bits(self) -> float:
        """log2 K + L_E(trial), paid by every line."""
        return shared_tune_bits(self.num_lines, self.trial)

    def with_larger_corpus(self, num_tokens: int) -> Claim:
        """The what-if claim: these losses, as if the corpus had ``num_tokens`` tokens. Lines are labelled so.

        Raises:
            InputError: ``num_tokens`` is smaller than the real number.
        """
        if num_tokens < self.num_tokens:
            raise InputError(f"a what-if corpus must be larger than {self.num_tokens} tokens, got {num_tokens}")
        return replace(self, num_tokens=num_tokens, what_if=True)


@dataclass(frozen=True)
class SamplingPlan:
    """How a sample of windows stands for the corpus.

    The units are windows in the hashed order fixed by artifact, corpus, fingerprint and seed. The share of delta
    spent on the sampling is the package's constant; trials and evaluations divide it further.
    """

    num_units: int
    """N: windows of the whole corpus."""
    max_unit_tokens: int
    """s_max: scored tokens of the largest window."""
    pilot_units: int
    """First windows of the order; they choose the grid point and stay outside the sequence."""
    trial: int = 1
    """Ordinal of this artifact, seed or configuration among all tried on this corpus."""
    evaluation: int | None = None
    """In a growing corpus: the ordinal j of this draw; it spends 1/(j(j+1)) of the share. Null: not growing."""
    max_unit_decisions: int | None = None
    """Decisions of the window that has most of them; needed by `bits`."""
    num_decisions: int | None = None
    """Decisions of all windows together; needed by `bits`."""
    controls: ControlVariates | None = None
    """What is known of every window before any is drawn; null: nothing is taken from the windows' sums."""
    unexplained: float = 1.0
    """Share of the standard deviation of a window's loss that the control variates leave in the pilot. It guides the
    choice of grid points alone."""

    def __post_init__(self) -> None:
        """Refuse impossible plans."""
        if self.num_units < 1 or self.max_unit_tokens < 1:
            raise InputError(
                f"num_units and max_unit_tokens must be positive, got {self.num_units}, {self.max_unit_tokens}"
            )
        if not 1 <= self.pilot_units <= self.num_units:
            raise InputError(f"pilot_units must lie in 1..{self.num_units}, got {self.pilot_units}")
        if self.evaluation is not None and self.evaluation < 1:
            raise InputError(f"evaluation counts from 1, got {self.evaluation}")
        elias_delta_bits(self.trial)
        known = self.controls
        if known is not None and (known.num_units, known.max_unit_tokens) != (self.num_units, self.max_unit_tokens):
            raise InputError(
                f"control variates are of {known.num_units} windows of at most {known.max_unit_tokens} tokens, the "
                f"plan says {self.num_units} and {self.max_unit_tokens}"
            )

    def log_inverse_delta(self, claim: Claim) -> float:
        """ln(1 / delta_s) of one line: the share of delta, over trials, evaluations and the K lines."""
        evaluations = 0.0 if self.evaluation is None else math.log(self.evaluation * (self.evaluation + 1))
        trials = math.log(2) * elias_delta_bits(self.trial)
        return math.log(1 / (claim.delta * SAMPLING_DELTA_SHARE)) + trials + evaluations + math.log(claim.num_lines)

    @property
    def target_units(self) -> int:
        """The sample size that the pilot's choice and the stakes have in view: a fixed multiple of the pilot."""
        return min(self.num_units, PILOT_TARGET_RATIO * self.pilot_units)

    @property
    def target_draws(self) -> int:
        """Those of `target_units` that are drawn beyond the pilot, at least one."""
        return max(self.target_units - self.pilot_units, 1)


def corpus_delta(claim: Claim, *, sampled: bool) -> float:
    """The share of delta left for the bound on the full corpus."""
    return claim.delta * (1 - SAMPLING_DELTA_SHARE) if sampled else claim.delta


@dataclass(frozen=True)
class Tuning:
    """The grid point of one line. Everything here is coded in `tune_bits`, or fixed by the hypothesis."""

    method: str
    """Name of the bound."""
    vocab_size: int
    """V."""
    top_k: int | None = None
    """k of a `kl` line."""
    alpha: float | None = None
    """Constant smoothing weight, or alpha_min of alpha(H), or of the smoothing head."""
    alpha_slope: int = 0
    """Slope of alpha(H) in octaves; 0 is a constant alpha."""
    alpha_column: bool = False
    """The alphas come from the model's smoothing head."""
    t: float | None = None
    """freedman: lambda * (B - y0')."""
    budget: float | None = None
    """In a sample: bits that a window may lose before the rest of it is predicted uniformly."""
    lam: float | None = None
    """lambda per bit: derived from t (freedman), from the grid (azuma with a smoothing head)."""
    degree: int = 0
    """Degree of the forecast's polynomial."""
    coefficients: tuple[float, ...] = ()
    """float16 coefficients, bits as a function of the entropy in bits, constant first."""
    y0: float | None = None
    """float16 floor of the forecasts, bits."""
    tune_bits: float = 0.0
    """L_tune of this line except for azuma's m0 (see the line): grid, shared cost of K lines and trials included."""
    unavailable: str | None = None
    """Why the line cannot be computed."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tuning:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**data, "coefficients": tuple(data["coefficients"])})


@dataclass(frozen=True)
class Line:
    """One printed line of a certificate."""

    __pydantic_config__: ClassVar = {"use_attribute_docstrings": True}  # the published schema describes each field

    method: str
    """Name of the bound: `freedman`, `azuma`, `kl`, `relative`, `document`, or that of a plugin."""
    top_k: int | None
    """k of an error line; null for a loss line."""
    value: float | None
    """The bound, rounded up: bits per token, or an error rate. Null where it could not be computed."""
    empirical: float | None
    """What was measured: mean smoothed loss or mean error over the scored tokens."""
    kappa_nats: float
    """kappa of this line."""
    tune_bits: float
    """L_tune of this line."""
    vacuous: bool
    """Not below a random guess."""
    random_guess: float
    """log2 V_tok bits, or 1 - k / V_tok."""
    terms: Mapping[str, float]
    """Additive parts of the value, and yardsticks (`oracle_gap`, `gap_over_oracle`)."""
    parameters: Mapping[str, Any]
    """The grid point in words."""
    note: str = ""
    """Warnings: what-if, unavailable, vacuous, forecasts without entropies."""

    @property
    def bounds_risk(self) -> bool:
        """Whether it bounds the risk per token that a certificate quotes: no error, and no risk of documents."""
        return self.top_k is None and bound_named(self.method).bounds_risk

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            **asdict(replace(self, terms={}, parameters={})),
            "terms": dict(self.terms),
            "parameters": dict(self.parameters),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`."""
        return cls(**{each.name: data[each.name] for each in fields(cls)})
