"""The sentences of a certificate, shared by every report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tokenbound.bounds.claim import Line
from tokenbound.bounds.lines import find_bound
from tokenbound.bounds.lines.base import plain_row_name
from tokenbound.bounds.rounding import format_bound
from tokenbound.store.uri import base_name

if TYPE_CHECKING:
    from tokenbound.certificate import Certificate


TAKEN_ON_TRUST = (
    "Taken on trust: every token of the corpus is here once, predicted (entropy included) from what came before it "
    "alone, and the model has a prefix-free code of the length given."
)
"""What losses alone cannot show."""


def headline(certificate: Certificate) -> str:
    """The claim in one sentence."""
    confidence = f"{100 * (1 - certificate.delta):g} %"
    if certificate.bound_bits is None:
        return f"With {confidence} confidence all error bounds below hold together; no loss was bounded."
    per_byte = certificate.bound_bits_per_byte
    tail = (
        f" ({format_bound(per_byte, 2)} bits per byte of text)"
        if per_byte and abs(per_byte - certificate.bound_bits) > 0.005
        else ""
    )
    return (
        f"With {confidence} confidence this model's expected loss per token on this corpus is at most "
        f"{format_bound(certificate.bound_bits, 2)} bits{tail}; guessing costs {certificate.random_guess_bits:.2f}."
    )


def is_vacuous(certificate: Certificate) -> bool:
    """Whether no line says more than guessing does: no loss line, or no error line where only errors are bounded."""
    if certificate.bound_bits is not None:
        return certificate.vacuous
    return all(line["vacuous"] for line in certificate.bounds)


def verdict(certificate: Certificate) -> str:
    """Vacuous or not, in words."""
    if is_vacuous(certificate):
        return (
            "VACUOUS: the bound is not below random guessing. It says nothing about this model; use a shorter artifact "
            "or more tokens (tokenbound plan says how many)."
        )
    return "Not vacuous: below random guessing."


def assumptions(certificate: Certificate) -> list[str]:
    """What the claim rests on and what it does not say."""
    found = [
        (
            "The risk is the mean, over this corpus's own positions, of the expected loss if that one token were "
            "drawn again given everything before it; of the smoothed model. It is not the risk on fresh documents."
        ),
        _prior_sentence(certificate),
        *_base_sentences(certificate),
        *_arithmetic_sentences(certificate),
        *_line_sentences(certificate),
        *plugin_sentences(certificate.declarations.get("plugins", {})),
        f"Tokenizer: {_tokenizer_sentence(certificate)}",
        "This package's version, torch and the device are declared chosen without regard to the tokens.",
    ]
    if certificate.sampling is not None:
        found.append(
            f"Scored: {certificate.sampling.scored_windows:,} of {certificate.num_windows:,} windows, a prefix of an "
            f"order fixed by hashes. {slack_sentence(certificate)}"
        )
    else:
        found.append(
            "Every token was scored."
            if certificate.declared_tokens == certificate.num_tokens
            else "Every token was scored; the bound holds for all corpus sizes at once, so it may be re-evaluated as "
            "the corpus grows."
        )
    if certificate.earlier_fingerprints:
        times = len(certificate.earlier_fingerprints)
        found.append(
            f"The corpus grew {'once' if times == 1 else f'{times:,} times'} by files appended at its end; what was "
            "scored before was kept, and the confidence is that of the whole sequence."
        )
    if certificate.num_worst_case_tokens:
        found.append(f"{certificate.num_worst_case_tokens:,} tokens had no finite loss and count at the worst case.")
    return found


def slack_sentence(certificate: Certificate) -> str:
    """What not scoring the rest costs the quoted line, and what more windows would leave of it."""
    line = quoted_line(certificate)
    if line is None:
        return "The slack for the rest is in the bounds."
    terms, unit = line["terms"], "bits per token" if line["top_k"] is None else f"in the {line_name(line)}"
    sizes = (("twice as many windows", "slack_at_2n"), ("four times as many", "slack_at_4n"))
    expected = [f"{words} would leave about {terms[name]:.4f}" for words, name in sizes if name in terms]
    return (
        f"The slack for the rest, {terms['sampling_slack']:.4f} {unit}, is in the bound; "
        f"{', '.join([*expected, 'all of them none'])}."
    )


def quoted_line(certificate: Certificate) -> dict[str, Any] | None:
    """The loss line that the certificate quotes, else its first line with a value."""
    known = [line for line in certificate.bounds if line["value"] is not None]
    losses = [line for line in known if line["top_k"] is None and line["value"] == certificate.bound_bits]
    return next(iter(losses or known), None)


def _prior_sentence(certificate: Certificate) -> str:
    if certificate.prior == "holdout":
        declared = certificate.declarations.get("holdout_declaration")
        return (
            f"Holdout, declared: {declared!r}. If that is false, the bound is void. The risk is also given what the "
            "model was chosen from."
        )
    return (
        f"The model may depend on these tokens in any way: its whole code is paid for "
        f"({certificate.artifact_bytes:,} bytes, {certificate.code_length_bits:,.0f} bits with the protocol)."
    )


def _base_sentences(certificate: Certificate) -> list[str]:
    """Of a delta: what its base rests on."""
    tried = certificate.declarations.get("num_bases", 0)
    if not tried:
        return []
    declared = certificate.declarations.get("base_is_independent")
    picked = f" It was picked among {tried:,} bases, which is paid for." if tried > 1 else ""
    digest = str((certificate.scoring_identity.get("base") or {}).get("sha256"))[:16]
    return [
        f"The artifact is a delta on the base {certificate.model.get('base')} (tensors {digest}), which is declared "
        f"independent of these tokens: {declared!r}. If that is false, the bound is void.{picked}"
    ]


def _arithmetic_sentences(certificate: Certificate) -> list[str]:
    arithmetic = certificate.model.get("arithmetic")
    if arithmetic is None:
        return []
    dtype = certificate.protocol.get("dtype")
    return [f"The model is quantized. It was scored by {arithmetic}, in {dtype}; other kernels may give other losses."]


def _line_sentences(certificate: Certificate) -> list[str]:
    """What the bounds themselves have to say of their lines."""
    lines = [Line.from_dict(row) for row in certificate.bounds]
    found = [(find_bound(line.method), line) for line in lines if line.value is not None]
    return [sentence for bound, line in found if bound is not None for sentence in bound.sentences(line)]


def plugin_sentences(plugins: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Which installed packages took part, by entry-point group and name."""
    names = [f"{name} ({package})" for group in plugins.values() for name, package in group.items()]
    return [f"Provided by other packages, whose proofs and code count too: {', '.join(names)}."] if names else []


def _tokenizer_sentence(certificate: Certificate) -> str:
    name = certificate.corpus.get("tokenizer") or "stored token ids"
    kind = certificate.declarations.get("tokenizer_is")
    return (
        f"{name}, {'counted in the artifact' if kind == 'counted' else 'declared chosen independently of this corpus'}."
    )


def source_name(source: str) -> str:
    """Where a model came from, in a word; of a checkpoint that `reevaluate` encoded and kept, the checkpoint's name.

    >>> source_name("models/step-1000"), source_name("runs/nightly/artifacts/step-1000-e648170cabdc0002.tokenbound")
    ('step-1000', 'step-1000')
    """
    return re.sub(r"-[0-9a-f]{16}\.tokenbound$", "", base_name(source)) or source


def line_name(row: Line | dict[str, Any]) -> str:
    """What tables and plots call a line."""
    line = row if isinstance(row, Line) else Line.from_dict(row)
    bound = find_bound(line.method)
    return plain_row_name(line) if bound is None else bound.row_name(line)


def duration(seconds: float) -> str:
    """A time in its largest sensible unit.

    >>> duration(12.3), duration(754), duration(9000)
    ('12 s', '13 min', '2.5 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
