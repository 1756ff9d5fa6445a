"""The plots of a report, each with its legend and a sentence that says how to read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from tokenbound.bounds.claim import Line
from tokenbound.bounds.lines import find_bound
from tokenbound.bounds.rounding import format_bound
from tokenbound.errors import InputError
from tokenbound.report.details import ArtifactPart, Curve, EntropyBins, LossDistribution, PositionBins, ReportDetails
from tokenbound.report.page import Legend, Plot
from tokenbound.report.svg import colour, inline_svg, new_figure, plain, settings, standalone_svg
from tokenbound.report.words import headline, line_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tokenbound.bounds.columns import Floats
    from tokenbound.certificate.record import CertificateRecord

COMPLEXITY_ROLES = {
    "artifact": ("artifact", "code of the artifact"),
    "code": ("artifact", "code of the model"),
    "complexity": ("artifact", "code of the model"),
    "protocol": ("protocol", "code of the protocol"),
    "tokenizer": ("tokenizer", "code of the tokenizer"),
    "tune": ("tune", "tuning paid for"),
    "delta": ("delta", "confidence"),
    "base_complexity": ("tune", "tuning of the base"),
}
"""Parts of the complexity term: role of the colour, words."""
SEGMENTS = {
    "empirical": ("measured", "measured on the tokens"),
    "variance": ("variance", "fluctuation of the losses"),
    "base_variance": ("protocol", "fluctuation of the base's losses"),
    **COMPLEXITY_ROLES,
    "sampling_slack": ("slack", "tokens not scored"),
}
"""Every additive part of a bound in the order drawn."""
YARDSTICKS = {
    "complexity": "complexity, in all",
    "oracle_gap": "gap if the variance were known",
    "gap_over_oracle": "gap over that",
    "sample_mean": "mean of what the sample estimates",
    "slack_at_2n": "slack expected at twice the windows",
    "slack_at_4n": "slack expected at four times the windows",
    "excess": "bound on the excess over the base",
    "excess_empirical": "measured excess over the base",
    "base_empirical": "measured on the base",
    "base_bound": "bound on the base",
}
"""Terms that are sums of others, or no part of the value."""
CURVE_ROLES = ("accent", "variance", "artifact", "slack", "muted")
KIND_ROLES = {
    "attention": "variance",
    "feed-forward": "artifact",
    "embedding": "slack",
    "norm": "accent",
    "other tensors": "measured",
    "no tensor": "muted",
}
CUT = 2.2
"""Bars longer than this many random guesses are cut."""


def plots(certificate: CertificateRecord, details: ReportDetails | None) -> tuple[Plot, ...]:
    """Every plot that certificate and details allow, in reading order."""
    given = details or ReportDetails()
    found: list[Plot | None] = [
        composition(certificate),
        errors(certificate),
        _size(certificate, given),
        _alpha(given),
        _stake(given),
        _distribution(certificate, given.distribution, smoothed=given.smoothed),
        _entropy(certificate, given.entropy),
        _position(given.position),
        _artifact(certificate, given.artifact),
    ]
    return tuple(plot for plot in found if plot is not None)


def additive_terms(line: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The parts of a line's value, in the order drawn; they add up to it before rounding up.

    A complexity term that is split by what it pays for appears as its parts.

    >>> additive_terms({"terms": {"empirical": 2.0, "variance": 0.1, "complexity": 0.4, "artifact": 0.3, "delta": 0.1}})
    [('empirical', 2.0), ('variance', 0.1), ('artifact', 0.3), ('delta', 0.1)]
    """
    terms = line["terms"]
    parts = [name for name in terms if name not in SEGMENTS and name not in YARDSTICKS]
    split = [name for name in terms if name in COMPLEXITY_ROLES and name not in ("complexity", "base_complexity")]
    hidden = {"complexity"} if split or parts else set()
    order = [name for name in SEGMENTS if name in terms and name not in hidden]
    at = order.index("sampling_slack") if "sampling_slack" in order else len(order)
    return [(name, float(terms[name])) for name in (*order[:at], *parts, *order[at:])]


def term_words(name: str) -> str:
    """A term in words."""
    if name in YARDSTICKS:
        return YARDSTICKS[name]
    return SEGMENTS[name][1] if name in SEGMENTS else name.replace("_", " ")


def composition(certificate: CertificateRecord) -> Plot | None:
    """The parts of every bound on the loss; None where there is none."""
    lines = _loss_lines(certificate)
    if not lines:
        return None
    figure, legend = _stacked(lines, "bits per token", _bits_words)
    price = "of confidence" if certificate.prior == "holdout" else "of having fitted these very tokens"
    caption = (
        "Each bar adds up to one bound on the expected loss. What was measured is only its start; the rest is the "
        f"price {price}. The mark is what guessing costs: a bar that reaches it says nothing."
    )
    return Plot("composition", "Where each bound comes from", caption, inline_svg(figure, "composition"), legend)


def composition_svg(certificate: CertificateRecord) -> str:
    """The parts of every bound on the loss as an SVG file of its own, with the claim above.

    Raises:
        InputError: the certificate bounds errors alone.
    """
    lines = _loss_lines(certificate)
    if not lines:
        raise InputError("this certificate has no bound on the loss to draw; the HTML report has its other plots")
    figure, legend = _stacked(lines, "bits per token", _bits_words)
    return standalone_svg(figure, legend, "composition", title=headline(certificate))


def _loss_lines(certificate: CertificateRecord) -> list[dict[str, Any]]:
    return [line for line in certificate.bounds if line["top_k"] is None and line["value"] is not None]


def errors(certificate: CertificateRecord) -> Plot | None:
    """The parts of every bound on a top-k error; None where there is none."""
    lines = [line for line in certificate.bounds if line["top_k"] is not None and line["value"] is not None]
    if not lines:
        return None
    figure, legend = _stacked(lines, "share of tokens", _share_words)
    caption = (
        "How often the right token is not among the model's k most probable ones: measured, and at most. "
        "The mark is a random choice of k tokens."
    )
    return Plot("errors", "Top-k errors", caption, inline_svg(figure, "errors"), legend)


def _bits_words(line: Mapping[str, Any]) -> tuple[str, str]:
    """The bound, and how it divides into what was measured and the rest."""
    value, measured = format_bound(line["value"], 3), f"{line['empirical']:.3f}"
    return value, f"= {measured} + {float(value) - float(measured):.3f}"


def _share_words(line: Mapping[str, Any]) -> tuple[str, str]:
    value, measured = format_bound(100 * line["value"], 2), f"{100 * line['empirical']:.2f}"
    return f"{value} %", f"= {measured} + {float(value) - float(measured):.2f}"


def _stacked(
    lines: Sequence[Mapping[str, Any]], unit: str, show: Callable[[Mapping[str, Any]], tuple[str, str]]
) -> tuple[Figure, Legend]:
    limit = _bar_limit(lines)
    legend: dict[tuple[str, str, str], None] = {}
    with settings():
        figure = new_figure(46 + 50 * len(lines))
        axes = figure.add_subplot()
        for row, line in enumerate(lines):
            left = 0.0
            for term, value in additive_terms(line):
                role, words = SEGMENTS.get(term, ("protocol", term_words(term)))
                width = min(left + value, limit) - min(left, limit)
                if value > 0:
                    legend[role, "area", words] = None
                    axes.barh(row, width, left=left, height=0.46, color=colour(role), linewidth=0)
                left += value
            _bar_words(axes, row, line_name(dict(line)), *show(line), cut=left > limit)
            if line["random_guess"] <= limit:
                axes.vlines(line["random_guess"], row - 0.3, row + 0.3, color=colour("guess"), linewidth=2.5)
                legend["guess", "line", "random guessing"] = None
        axes.yaxis.set_visible(False)
        axes.set_ylim(len(lines) - 0.7, -0.75)
        axes.set_xlim(0, limit * 1.005)
        if unit == "share of tokens":
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel(unit)
        return figure, tuple(legend)


def _bar_limit(lines: Sequence[Mapping[str, Any]]) -> float:
    """The axis ends behind the longest bar and the guess; a bar of many guesses is cut."""
    guess = max(float(line["random_guess"]) for line in lines)
    longest = max(float(line["value"]) for line in lines)
    return min(max(longest, guess) * 1.02, guess * CUT)


def _bar_words(axes: Axes, row: int, name: str, value: str, rest: str, *, cut: bool) -> None:
    """Name, bound and its division, above the bar."""
    style: dict[str, Any] = {"va": "baseline", "fontsize": 11.5}
    left = axes.text(0, row - 0.36, name, **style)
    for text, weight, role in ((value, "bold", "ink"), (rest + (", bar cut" if cut else ""), "normal", "muted")):
        left = axes.annotate(
            text,
            (1, 0),
            xycoords=left,
            xytext=(6, 0),
            textcoords="offset points",
            va="bottom",
            fontsize=11.5,
            weight=weight,
            color=colour(role),
        )


def _size(certificate: CertificateRecord, details: ReportDetails) -> Plot | None:
    if not details.size_curves:
        return None
    errors = certificate.bound_bits is None
    panel = Panel(details.size_curves, None if errors else certificate.random_guess_bits, errors=errors)
    with settings():
        figure = new_figure(270)
        axes = figure.add_subplot()
        panel.draw(axes)
        axes.axvline(certificate.num_tokens, color=colour("muted"), linewidth=1, linestyle=(0, (2, 2)), zorder=0)
        log_x(axes, counted)
        axes.set_xlabel("tokens m, this corpus at the dotted line")
        axes.set_ylabel("error bound" if errors else "bound, bits per token")
        if errors:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
        svg = inline_svg(figure, "size")
    caption = (
        "What-if: the same losses, another m. Only the dotted line is certified; with fewer tokens what is paid would "
        "weigh more, with more tokens less, if the model were as good on them."
    )
    if details.what_if:
        value = f"{100 * details.what_if.value:.2f} %" if errors else f"{details.what_if.value:.3f} bits"
        caption += (
            f" With the same losses and a larger m of {counted(details.what_if.num_tokens)} tokens (kappa/m = 0.003) "
            f"the best line would be {value}."
        )
    return Plot("size", "Bound against the number of tokens", caption, svg, panel.legend())


def _alpha(details: ReportDetails) -> Plot | None:
    if not details.alpha_curves:
        return None
    svg, legend = _choice_plot("alpha", details.alpha_curves, "smoothing weight alpha")
    caption = (
        "Mixing a little of the uniform distribution into every prediction limits the worst loss: too little leaves "
        "the range of losses wide, too much costs loss itself. The dots were chosen from a fixed grid, and the choice "
        "is paid for."
    )
    return Plot("alpha", "Bound against smoothing", caption, svg, legend)


def _stake(details: ReportDetails) -> Plot | None:
    if not details.stake_curves:
        return None
    svg, legend = _choice_plot("stake", details.stake_curves, "stake lambda, per bit")
    caption = (
        "The freedman line at the chosen alpha: a small stake multiplies what is paid, a large one charges for every "
        "fluctuation. The dot is the chosen point of the grid."
    )
    return Plot("stake", "Bound against the stake", caption, svg, legend)


def _choice_plot(name: str, curves: Sequence[Curve], label: str) -> tuple[Markup, Legend]:
    panel = Panel(curves, None)
    with settings():
        figure = new_figure(270)
        axes = figure.add_subplot()
        panel.draw(axes)
        axes.set_xlim(*panel.seen())
        log_x(axes, _power)
        axes.set_xlabel(label)
        axes.set_ylabel("bound, bits per token")
        return inline_svg(figure, name), panel.legend()


class Panel:
    """Curves with their chosen points, in a range of values that shows the best of them and what is near it.

    Args:
        curves: at least one.
        guess: what guessing costs; drawn where it is in range.
        errors: the values are shares of tokens, all of them shown from 0.
    """

    def __init__(self, curves: Sequence[Curve], guess: float | None, *, errors: bool = False) -> None:
        self.low, self.high = _error_range(curves) if errors else _y_range(curves, guess)
        self.errors = errors
        roles = [CURVE_ROLES[index % len(CURVE_ROLES)] for index in range(len(curves))]
        pairs = list(zip(curves, roles, strict=True))
        self.curves = [(curve, role) for curve, role in pairs if min(curve.y) < self.high]
        self.guess = guess if guess is not None and self.low < guess < self.high else None

    def legend(self) -> Legend:
        """Of what is in the picture."""
        words = tuple((role, "line", curve.label) for curve, role in self.curves)
        return (*words, ("guess", "dash", "random guessing")) if self.guess is not None else words

    def seen(self) -> tuple[float, float]:
        """The range of x in which some curve is in the picture, and a little more."""
        x = [x for curve, _ in self.curves for x, y in zip(curve.x, curve.y, strict=True) if y <= self.high]
        return min(x) / 1.3, max(x) * 1.3

    def draw(self, axes: Axes) -> None:
        """Curves, points, the value of the best point, and the guess."""
        for curve, role in reversed(self.curves):
            axes.plot(curve.x, curve.y, color=colour(role), linewidth=2, solid_capstyle="round")
            if curve.chosen and curve.chosen[1] <= self.high:
                axes.plot(*curve.chosen, "o", color=colour(role), markersize=8, markeredgecolor=colour("surface"))
        if self.guess is not None:
            axes.axhline(self.guess, color=colour("guess"), linewidth=1.5, linestyle=(0, (4, 3)))
        axes.set_ylim(self.low, self.high)
        axes.grid(axis="y")
        points = [curve.chosen for curve, _ in self.curves if curve.chosen]
        for point in points if self.errors else sorted(points, key=lambda point: point[1])[:1]:
            self._value(axes, point)

    def _value(self, axes: Axes, point: tuple[float, float]) -> None:
        """Beside the point, where a falling curve leaves room: below it on the left, else above it on the right."""
        below = point[1] - self.low > 0.14 * (self.high - self.low)
        axes.annotate(
            f"{format_bound(100 * point[1], 2)} %" if self.errors else format_bound(point[1], 3),
            point,
            xytext=(-6, -5) if below else (6, 5),
            textcoords="offset points",
            ha="right" if below else "left",
            va="top" if below else "bottom",
            weight="bold",
            fontsize=11,
        )


def _error_range(curves: Sequence[Curve]) -> tuple[float, float]:
    highest = max((curve.chosen[1] for curve in curves if curve.chosen), default=1.0)
    return 0.0, min(1.02, 1.5 * highest)


def _y_range(curves: Sequence[Curve], guess: float | None) -> tuple[float, float]:
    """Room for the best point and what is near it; what shoots up leaves the picture."""
    chosen = sorted(curve.chosen[1] for curve in curves if curve.chosen)
    low, highest = min(min(curve.y) for curve in curves), max(max(curve.y) for curve in curves)
    best = chosen[0] if chosen else low
    top = max((value for value in chosen if value <= 2.5 * best), default=best)
    spread = max(top - low, 0.04 * abs(low), 1e-3)
    high = min(top + 2.2 * spread, highest + 0.1 * spread)
    if guess is not None and low < guess < low + 12 * spread:
        high = max(high, guess + 0.3 * spread)
    return max(low - 0.22 * (high - low), min(0.0, low)), high


def _distribution(certificate: CertificateRecord, found: LossDistribution | None, *, smoothed: bool) -> Plot | None:
    if found is None:
        return None
    edges = np.array(found.edges_bits)
    edges[0] = edges[1] / 2 if edges[0] <= 0 else edges[0]
    with settings():
        figure = new_figure(270)
        axes = figure.add_subplot()
        axes.stairs(found.token_share, edges, fill=True, color=colour("measured"), linewidth=0)
        axes.stairs(found.loss_share, edges, color=colour("artifact"), linewidth=2)
        axes.axvline(certificate.random_guess_bits, color=colour("guess"), linewidth=1.5, linestyle=(0, (4, 3)))
        log_x(axes, _short)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        axes.set_ylim(0, 1.08 * max(*found.token_share, *found.loss_share))
        axes.set_xlim(max(edges[0], 2e-4), edges[-1] * 1.05)
        axes.set_xlabel(f"{'smoothed' if smoothed else 'unsmoothed'} loss of a token, bits (logarithmic)")
        axes.grid(axis="y")
        svg = inline_svg(figure, "distribution")
    caption = (
        "Filled: the share of tokens with a loss of that size. Outline: their share of the whole loss. "
        "Where the outline towers over the filling, few tokens carry much of the risk."
    )
    legend = (
        ("measured", "area", "share of the tokens"),
        ("artifact", "line", "share of the loss"),
        ("guess", "dash", "random guessing"),
    )
    return Plot("distribution", "Losses of the tokens", caption, svg, legend)


def _entropy(certificate: CertificateRecord, found: EntropyBins | None) -> Plot | None:
    if found is None or not found.entropy_bits:
        return None
    entropy, loss = np.array(found.entropy_bits), np.array(found.loss_bits)
    top = max(float(entropy.max()), 0.1) * 1.04
    legend = [("artifact", "dot", "tokens of one bin; area = their number"), ("muted", "dash", "loss = entropy")]
    with settings():
        figure = new_figure(290)
        axes = figure.add_subplot()
        axes.plot([0, top], [0, top], color=colour("muted"), linewidth=1.2, linestyle=(0, (4, 3)))
        forecast = _forecast(certificate, np.linspace(0, top, 80))
        if forecast is not None:
            axes.plot(np.linspace(0, top, 80), forecast, color=colour("accent"), linewidth=2)
            legend.append(("accent", "line", "forecast of the freedman line"))
        size = np.maximum(np.array(found.token_share) * 2200, 3)
        axes.scatter(entropy, loss, s=size, color=colour("artifact"), alpha=0.55, linewidths=0)
        axes.set_xlim(0, top)
        axes.set_ylim(0, max(top, float(loss.max()) * 1.06))
        axes.set_xlabel("entropy of the prediction, bits")
        axes.set_ylabel("mean loss, bits")
        axes.grid()
        svg = inline_svg(figure, "entropy")
    caption = (
        "How unsure the model was, and how wrong it turned out to be. On the dashed line the two agree; above it the "
        "model is overconfident. The better the forecast follows the dots, the smaller the price of fluctuations."
    )
    return Plot("entropy", "Loss by entropy of the prediction", caption, svg, tuple(legend))


def _forecast(certificate: CertificateRecord, entropy_bits: Floats) -> Floats | None:
    """The forecast of the first line that makes one."""
    lines = [Line.from_dict(row) for row in certificate.bounds if row["value"]]
    found = [(find_bound(line.method), line) for line in lines]
    curves = [bound.forecast_bits(line, entropy_bits, certificate.vocab_size) for bound, line in found if bound]
    return next((curve for curve in curves if curve is not None), None)


def _position(found: PositionBins | None) -> Plot | None:
    if found is None:
        return None
    with settings():
        figure = new_figure(250)
        axes = figure.add_subplot()
        axes.plot(found.place, found.loss_bits, color=colour("accent"), linewidth=2, marker="o", markersize=4)
        log_x(axes, counted)
        axes.set_ylim(0, max(found.loss_bits) * 1.08)
        axes.set_xlabel("place among the window's scored tokens")
        axes.set_ylabel("mean loss, bits")
        axes.grid(axis="y")
        svg = inline_svg(figure, "position")
    caption = (
        f"Later tokens of a window are predicted from more context. Unsmoothed losses of {found.num_tokens:,} tokens "
        "from shards spread over the run."
    )
    return Plot("position", "Loss by place in the window", caption, svg)


def _artifact(certificate: CertificateRecord, parts: Sequence[ArtifactPart]) -> Plot | None:
    if not parts:
        return None
    kinds = [kind for kind in KIND_ROLES if any(part.bytes_by_kind.get(kind) for part in parts)]
    longest = max(part.num_bytes for part in parts)
    with settings():
        figure = new_figure(70 + 24 * len(parts))
        axes = figure.add_subplot()
        for row, part in enumerate(parts):
            left = 0
            for kind in kinds:
                size = part.bytes_by_kind.get(kind, 0)
                axes.barh(row, size, left=left, height=0.66, color=colour(KIND_ROLES[kind]), linewidth=0)
                left += size
            axes.text(left + longest * 0.015, row, _part_words(part), va="center", fontsize=10)
        axes.set_yticks(range(len(parts)), [plain(part.name) for part in parts])
        axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))
        axes.set_ylim(len(parts) - 0.4, -0.6)
        axes.set_xlim(0, longest * 1.36)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: counted(value)))
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel("bytes")
        svg = inline_svg(figure, "artifact")
    caption = f"All {certificate.artifact_bytes:,} bytes of the artifact by layer, with bits per weight. " + (
        "They are not paid for under a holdout prior." if certificate.prior == "holdout" else "Every one is paid for."
    )
    legend = tuple((KIND_ROLES[kind], "area", kind) for kind in kinds)
    return Plot("artifact", "Where the artifact's bits went", caption, svg, legend)


def _part_words(part: ArtifactPart) -> str:
    return f"{8 * part.num_bytes / part.elements:.2f} bit/w" if part.elements else counted(part.num_bytes)


def log_x(axes: Axes, show: Callable[[float], str]) -> None:
    """A logarithmic x axis with few round ticks, each shown in few letters."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = (1.0,) if high / low >= 300 else (1.0, 2.0, 5.0) if high / low >= 6 else (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0)
    axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=9))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))


def counted(value: float) -> str:
    """A count in few letters.

    >>> counted(1500), counted(36_000_000), counted(12)
    ('1.5 k', '36 M', '12')
    """
    for size, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:.3g}"


def _power(value: float) -> str:
    """A weight or stake in few letters.

    >>> _power(1e-5), _power(0.02)
    ('1e-5', '0.02')
    """
    return f"{value:g}" if 9e-4 < value < 1e4 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def _short(value: float) -> str:
    return f"{value:g}"
