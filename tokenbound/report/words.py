"""The sentences of a certificate, shared by every report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
        *_document_sentences(certificate),
        f"Tokenizer: {_tokenizer_sentence(certificate)}",
        "The versions of this package, torch, transformers and NumPy, the device, compilation and the number of "
        "threads are declared chosen without regard to the tokens.",
        *remarks(certificate),
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


def remarks(certificate: Certificate) -> list[str]:
    """What every form of a certificate says, however short: how it was selected, and whether versions differ."""
    return [selection_sentence(certificate), *_environment_sentences(certificate)]


def grouped_sentences(said: Mapping[str, str]) -> list[str]:
    """What is said of each of several things, those of which the same is said together; of all of them without names.

    >>> grouped_sentences({"a": "Old.", "b": "Old."}), grouped_sentences({"a": "Old.", "b": "New."})
    (['Old.'], ['a: Old.', 'b: New.'])
    """
    names: dict[str, list[str]] = {}
    for name, sentence in said.items():
        names.setdefault(sentence, []).append(name)
    if len(names) == 1:
        return list(names)
    return [f"{', '.join(those)}: {sentence}" for sentence, those in names.items()]


COUNTED = {"register": "counted on this machine; declared", "config": "numbered by its config; declared"}
"""Where an ordinal comes from, by `selection.counted_by`."""


def selection_sentence(certificate: Certificate) -> str:
    """The place of this configuration among those tried, all of which it pays for."""
    selection, record = certificate.selection, certificate.sampling
    counted = COUNTED["config" if selection is None else selection.counted_by]
    what = "this holdout" if certificate.prior == "holdout" else "this corpus"
    tried = f"This is the {ordinal_word(certificate.trial)} configuration tried on"
    if record is not None:
        found = f"{tried} a sample of {what} ({counted}), drawn with seed {record.seed}"
        found += "" if record.evaluation is None else f" as draw {record.evaluation} of a growing corpus"
    elif certificate.prior == "holdout":
        found = f"{tried} {what} ({counted}), with every token scored"
    else:
        found = (
            f"{tried} {what} ({counted}), with every token scored, where other models and protocols do not count "
            "because each pays its own code"
        )
    shipped = 0 if selection is None else selection.shipped
    authors = f" The first {shipped} are those of this package's authors." if shipped else ""
    return f"{found}; its lines were named before scoring.{authors}"


def ordinal_word(number: int) -> str:
    """A number as an ordinal.

    >>> [ordinal_word(number) for number in (1, 2, 3, 11, 12, 22, 113)]
    ['1st', '2nd', '3rd', '11th', '12th', '22nd', '113th']
    """
    teen = 11 <= number % 100 <= 13
    return f"{number:,}{'th' if teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def _environment_sentences(certificate: Certificate) -> list[str]:
    """Of shards that were not all scored by the same versions, settings and device: which were scored by what."""
    found = certificate.environment.get("scored_by", [])
    if len(found) < 2:
        return []
    names = [name for name in dict.fromkeys(name for tree in found for name in tree) if name != "shards"]
    differing = [name for name in names if len({str(tree.get(name)) for tree in found}) > 1]
    parts = [
        f"{tree['shards']:,} by "
        + (", ".join(f"{name} {_setting(tree[name])}" for name in differing if name in tree) or "unrecorded versions")
        for tree in found
    ]
    return [f"Not all shards were scored in the same environment: {'; '.join(parts)}."]


def _setting(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


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
    """Of a delta: what its base rests on, and how the relative line splits."""
    line = next((line for line in certificate.bounds if line["method"] == "relative"), None)
    if line is None:
        return []
    declared, tried = certificate.declarations.get("base_is_independent"), certificate.declarations.get("num_bases", 1)
    picked = f" It was picked among {tried:,} bases, which is paid for." if tried > 1 else ""
    digest = str((certificate.scoring_identity.get("base") or {}).get("sha256"))[:16]
    found = [
        f"The artifact is a delta on the base {certificate.model.get('base')} (tensors {digest}), which is declared "
        f"independent of these tokens: {declared!r}. If that is false, the bound is void.{picked}"
    ]
    if certificate.sampling is None:
        terms = line["terms"]
        found.append(
            f"The relative line adds two bounds: the base's own risk is at most {format_bound(terms['base_bound'], 4)} "
            f"bits per token, and the fine-tune's excess over it at most {format_bound(terms['excess'], 4)} "
            f"(measured {terms['excess_empirical']:.4f}, negative is better than the base)."
        )
    return found


def _arithmetic_sentences(certificate: Certificate) -> list[str]:
    arithmetic = certificate.model.get("arithmetic")
    if arithmetic is None:
        return []
    dtype = certificate.protocol.get("dtype")
    return [f"The model is quantized. It was scored by {arithmetic}, in {dtype}; other kernels may give other losses."]


def _document_sentences(certificate: Certificate) -> list[str]:
    documents = certificate.corpus.get("scored_documents")
    if documents is None:
        return []
    return [
        f"The line document bounds another risk, the expected mean loss of a fresh document: it takes the "
        f"{documents:,} documents for independent draws whose number was fixed beforehand, each weighing the same. It "
        "is a baseline, never the bound quoted; with few documents it says nothing."
    ]


def _tokenizer_sentence(certificate: Certificate) -> str:
    name = certificate.corpus.get("tokenizer") or "stored token ids"
    kind = certificate.declarations.get("tokenizer_is")
    return (
        f"{name}, {'counted in the artifact' if kind == 'counted' else 'declared chosen independently of this corpus'}."
    )


ALPHA_WORDS = {"column": ", head", "constant": ", fixed alpha", "entropy": ", alpha(H)"}
"""Behind the method of a line, where a certificate has several of it."""


def source_name(source: str) -> str:
    """Where a model came from, in a word; of a checkpoint that `reevaluate` encoded and kept, the checkpoint's name.

    >>> source_name("models/step-1000"), source_name("runs/nightly/artifacts/step-1000-e648170cabdc0002.tokenbound")
    ('step-1000', 'step-1000')
    """
    return re.sub(r"-[0-9a-f]{16}\.tokenbound$", "", base_name(source)) or source


def line_name(line: dict[str, Any]) -> str:
    """Method and k of a line, and where its smoothing comes from if a smoothing head gives others to compare with."""
    if line["top_k"] is not None:
        return f"top-{line['top_k']} error"
    return f"{line['method']}{ALPHA_WORDS.get(line['parameters'].get('alpha_from'), '')}"


def is_companion(line: dict[str, Any]) -> bool:
    """Whether a line says where its smoothing comes from, beside those that took the best of the package's grid."""
    return line["parameters"].get("alpha_from") in ALPHA_WORDS


def duration(seconds: float) -> str:
    """A time in its largest sensible unit.

    >>> duration(12.3), duration(754), duration(9000)
    ('12 s', '13 min', '2.5 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
