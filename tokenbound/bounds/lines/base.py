'''What a bound is to the rest of the package, and how to add one.

A bound is a class with a `name`. Config, command line, claims, the reduction, certificates and reports find it by that
name, so that adding one takes one file in this folder, or one class in a package of your own that declares an entry
point of the group `tokenbound.bounds`:

    [project.entry-points."tokenbound.bounds"]
    hoeffding = "my_package:Hoeffding"

Then `what.bound.methods: [freedman, hoeffding]` prints it, charges it as one of the K lines, and records your package
and its version among the certificate's declarations.

Most bounds average one value z_i per token. They derive from :class:`TokenBound`, share one pass over the losses, and
say five things: which line to print, the grid point, the length of its code word, z_i, and the value from its mean.
This is a whole one, for the top-1 error e with m fixed before the data: e <= e^ + sqrt(kappa / (2m)).

    import math

    from tokenbound.bounds import Tuning
    from tokenbound.bounds.lines.base import LineValue, TokenBound, line_kappa
    from tokenbound.bounds.lines.topk import CountErrors


    class Hoeffding(TokenBound):
        """Hoeffding's inequality for the top-1 error, m fixed beforehand."""

        name = "hoeffding"
        bounds_risk = False  # an error is no loss: it is never the bound that a certificate quotes
        columns = ("rank",)

        def rows(self, claim):
            return (1,)  # one line, of the top-1 error

        def choose(self, evidence, claim, slack, top_k):
            return Tuning(self.name, claim.vocab_size, top_k=top_k)

        def code_bits(self, tuning):
            return 0.0  # nothing is chosen on the losses, so nothing is paid

        def evaluator(self, tuning):
            return CountErrors(tuning.top_k)

        def value(self, tuning, measured, claim):
            kappa = line_kappa(tuning.tune_bits, claim, sampled=measured.sampled)
            gap = math.sqrt(kappa / (2 * claim.num_tokens))
            return LineValue(measured.value + measured.slack + gap, gap / 2, gap / 2, tuning.tune_bits)

Three rules make a bound valid, and no code can check them for you. Whatever is chosen after seeing the losses is a
word of a prefix-free code and is charged in `code_bits`; `require_coded` refuses every other tuning. z_i depends on the
losses of token i and on what came before it, not on the mean or the largest loss of the data. The value is computed
from the exact sums, never from the evidence, which only guides the choice.

A bound that needs other columns, or sums that are no mean over tokens, derives from :class:`SeparateBound`.
'''

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

from tokenbound.bounds.blocks import Evaluator
from tokenbound.bounds.claim import AlphaKind, Claim, Line, SamplingPlan, Tuning
from tokenbound.bounds.codes import budget_bits
from tokenbound.bounds.columns import Floats, Piece
from tokenbound.bounds.curves import EvidenceView, LineCurves, fixed_point_at
from tokenbound.bounds.evidence import Evidence
from tokenbound.bounds.lines import find_bound
from tokenbound.bounds.printing import (
    LineValue,
    Measured,
    budget_sentences,
    line_kappa,
    line_terms,
    notes_of,
    random_guess,
)
from tokenbound.bounds.rounding import arithmetic_guard, round_up
from tokenbound.bounds.sampling import SamplingPath
from tokenbound.bounds.search import SlackModel
from tokenbound.errors import InputError

__all__ = ["Bound", "LineValue", "Measured", "SeparateBound", "Setting", "TokenBound", "line_kappa", "token_bound"]

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Setting:
    """What decides, before anything is scored, whether a bound can be used."""

    context: str
    """`packed` or `document`: whether a window may cross documents."""
    sampled: bool
    """Whether windows are sampled."""
    times_grown: int = 0
    """How often the corpus has grown since it was first scored."""


class Bound(ABC):
    """One bound: what it prints, what it needs, what it costs and how a report shows it."""

    name: ClassVar[str]
    """As in `bound.methods`, in `--method` and on certificates."""
    is_method: ClassVar[bool] = True
    """Whether `bound.methods` may name it; otherwise its lines are printed wherever :meth:`rows` gives any."""
    bounds_risk: ClassVar[bool] = True
    """Whether its lines bound the risk that a certificate quotes, in bits per token."""
    stands_alone: ClassVar[bool] = True
    """Whether it may be the only bound of a claim; a baseline may not."""
    shares_pass: ClassVar[bool]
    """Whether it is evaluated in the pass over the losses that bounds share."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Columns of the losses that it cannot do without, besides `nll`."""
    counts_documents: ClassVar[bool] = False
    """Whether its claim needs `num_documents`, the number of documents with a scored token."""
    smooths_by_head: ClassVar[bool] = False
    """Whether it can smooth with the per-token alphas of a smoothing head."""

    def rows(self, claim: Claim) -> tuple[int | None, ...]:
        """The lines that it prints: k of a top-k error, None for a loss. Each counts in K."""
        return (None,) if self.name in claim.methods else ()

    def compared_alphas(self, claim: Claim) -> tuple[AlphaKind, ...]:
        """Of a model with a smoothing head: the other smoothings at which the bound is printed for comparison."""
        return ()

    def objection(self, setting: Setting) -> str | None:
        """Why it cannot be used in this setting, to be read behind its name; None where it can."""
        return None

    def check_claim(self, claim: Claim) -> None:
        """Refuse a claim in which it has lines to print and cannot.

        Raises:
            InputError: a field of the claim does not fit; the message names it.
        """
        return None

    def random_guess(self, claim: Claim, top_k: int | None) -> float:
        """What guessing achieves: from here on a line is vacuous."""
        return random_guess(claim, top_k)

    def printed_line(
        self,
        top_k: int | None,
        found: LineValue,
        measured: Measured,
        claim: Claim,
        *,
        guess: float | None = None,
        rounding: Callable[[float], float] = round_up,
    ) -> Line:
        """The line with its value rounded up, and whether it says anything: whether it lies below ``guess``."""
        printed = rounding(found.value + (arithmetic_guard(found.value) if found.guard is None else found.guard))
        guess = self.random_guess(claim, top_k) if guess is None else guess
        return Line(
            method=self.name,
            top_k=top_k,
            value=printed,
            empirical=measured.empirical,
            kappa_nats=line_kappa(found.tune_bits, claim, sampled=measured.sampled),
            tune_bits=found.tune_bits,
            vacuous=printed >= guess,
            random_guess=guess,
            terms=line_terms(found, measured, claim),
            parameters={**found.parameters, **measured.parameters},
            note="; ".join([*found.notes, *notes_of(claim, printed, guess)]),
        )

    def row_name(self, line: Line) -> str:
        """What tables and plots call a line of it."""
        return plain_row_name(line)

    def sentences(self, line: Line) -> tuple[str, ...]:
        """What a reader of the certificate must be told about a line, in full sentences."""
        return budget_sentences(line)

    def curves(self, line: Line, view: EvidenceView) -> LineCurves:
        """How the value of a printed line would move with m, the smoothing weight or the stake."""
        return LineCurves(fixed_point_at(line, view.claim.num_tokens))

    def forecast_bits(self, line: Line, entropy_bits: Floats, vocab_size: int) -> Floats | None:
        """[E] the losses that a line of it forecasts at these entropies; None where it makes no forecast."""
        return None


class TokenBound(Bound):
    """A bound on the mean of one value z_i per token."""

    shares_pass = True
    has_budget: ClassVar[bool] = False
    """Whether the windows of a sample have a budget (:mod:`~tokenbound.bounds.budgets`): its z_i must not be below 0,
    and be log2 V where the prediction is uniform."""

    @abstractmethod
    def choose(self, evidence: Evidence, claim: Claim, slack: SlackModel, top_k: int | None) -> Tuning:
        """The grid point of a line, before it is charged.

        Args:
            evidence: of all shards; of the pilot in a sampled run. Nothing else may guide the choice.
            claim: what is claimed.
            slack: the sampling slack to expect.
            top_k: which of its :meth:`rows`.
        """

    @abstractmethod
    def code_bits(self, tuning: Tuning) -> float:
        """Length in bits of the code word that names a tuning; also of a line that cannot be computed."""

    def require_coded(self, tuning: Tuning, claim: Claim) -> None:
        """Refuse a tuning that the code cannot name. Its length is checked elsewhere.

        Raises:
            MismatchError: the field that is outside the code.
        """

    @abstractmethod
    def evaluator(self, tuning: Tuning) -> Evaluator:
        """Sums z_i over blocks of losses."""

    @abstractmethod
    def value(self, tuning: Tuning, measured: Measured, claim: Claim) -> LineValue:
        """The bound from the mean of z_i over the corpus, and its parts."""

    def missing(self, claim: Claim) -> str | None:
        """Why a line cannot be computed from the columns that were recorded; None where it can."""
        if "rank" in self.columns and not claim.has_rank:
            return "the losses have no `rank` column: which tokens ranked higher is not known"
        if "entropy" in self.columns and not claim.has_entropy:
            return "the losses have no `entropy` column: how sure the model was is not known"
        return None

    def tuned(self, evidence: Evidence, claim: Claim, slack: SlackModel, top_k: int | None) -> Tuning:
        """The charged grid point of a line, or why it cannot be computed."""
        reason = self.missing(claim)
        if reason is None:
            return self.charged(self.choose(evidence, claim, slack, top_k), claim)
        return self.charged(Tuning(self.name, claim.vocab_size, top_k=top_k, unavailable=reason), claim)

    def charged(self, tuning: Tuning, claim: Claim) -> Tuning:
        """A grid point with the cost of its code word, of the K - 1 other lines and of earlier trials."""
        return replace(tuning, tune_bits=self.word_bits(tuning) + claim.shared_bits)

    def word_bits(self, tuning: Tuning) -> float:
        """Length in bits of a tuning's code word, that of its budget included."""
        return self.code_bits(tuning) + budget_bits(has_budget=tuning.budget is not None)

    def unavailable_line(self, tuning: Tuning, claim: Claim, *, sampled: bool) -> Line:
        """The line of a bound that cannot be computed: it was named before scoring, so it is printed and counted."""
        return Line(
            method=self.name,
            top_k=tuning.top_k,
            value=None,
            empirical=None,
            kappa_nats=line_kappa(tuning.tune_bits, claim, sampled=sampled),
            tune_bits=tuning.tune_bits,
            vacuous=True,
            random_guess=self.random_guess(claim, tuning.top_k),
            terms={},
            parameters={},
            note=f"not computed: {tuning.unavailable}",
        )


class SeparateBound(Bound, Generic[T, S]):
    """A bound with a tuning (T) and sums (S) of its own, which passes over the losses by itself. Both are picklable."""

    shares_pass = False

    @abstractmethod
    def choose(self, evidence: Evidence, claim: Claim, sampling: SamplingPlan | None) -> T:
        """The charged grid point of its line.

        Raises:
            InputError: the bound cannot be had of a sample.
            MismatchError: a column that it needs was not recorded.
        """

    @abstractmethod
    def sums(self, tuning: T, piece: Piece) -> S:
        """Its sums over consecutive windows of one shard."""

    @abstractmethod
    def merge(self, parts: Sequence[S]) -> S:
        """The sums of all parts together, which are in order."""

    def collapse(self, sums: S) -> S:
        """The same sums as of one part, each total rounded once."""
        return sums

    @abstractmethod
    def certify(self, tuning: T, sums: S, claim: Claim, sampling: SamplingPlan | None) -> Line:
        """The printed line.

        Raises:
            MismatchError: the tuning is not paid for, or tokens are missing or counted twice.
        """

    def path(self, tuning: T, sums: S, claim: Claim, sampling: SamplingPlan) -> SamplingPath | None:
        """What its line could say after every window of a sample; None where it does not bound the risk."""
        return None


AnySeparateBound = SeparateBound[Any, Any]


def token_bound(name: str) -> TokenBound:
    """The bound of this name that shares the pass over the losses.

    Raises:
        InputError: there is none.

    >>> token_bound("kl").bounds_risk
    False
    """
    found = find_bound(name)
    if not isinstance(found, TokenBound):
        raise InputError(
            f"unknown method {name!r}: no bound that is evaluated token by token has this name; install its package"
        )
    return found


def separate_bound(name: str) -> AnySeparateBound:
    """The bound of this name that passes over the losses by itself.

    Raises:
        InputError: there is none.

    >>> separate_bound("document").columns
    ('document',)
    """
    found = find_bound(name)
    if not isinstance(found, SeparateBound):
        raise InputError(f"unknown method {name!r}: no bound with a pass of its own has this name; install its package")
    return found


def plain_row_name(line: Line) -> str:
    """What a line is called whose bound has no better name for it, or is not installed.

    >>> plain_row_name(Line("hoeffding", 1, 0.1, 0.1, 3.0, 0.0, False, 0.9, {}, {}))
    'hoeffding, top-1 error'
    """
    return line.method if line.top_k is None else f"{line.method}, top-{line.top_k} error"
