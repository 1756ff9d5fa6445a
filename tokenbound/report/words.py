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
    from tokenbound.certificate.record import CertificateRecord
    from tokenbound.engine.evaluate.rescore import Rescored


TAKEN_ON_TRUST = (
    "Taken on trust: every token of the corpus is here once, predicted (entropy included) from what came before it "
    "alone, and the model has a prefix-free code of the length given."
)
"""What losses alone cannot show."""


def verified_sentence(certificate: CertificateRecord, rescored: Rescored | None) -> str:
    """What a verification found."""
    bound = (
        "no loss bound"
        if certificate.bound_bits is None
        else f"{format_bound(certificate.bound_bits, 4)} bits/token "
        f"({certificate.method}{', vacuous' * certificate.vacuous})"
    )
    text = (
        f"verified: {certificate.num_scored_tokens:,} losses and {certificate.artifact_bytes:,} artifact bytes give "
        f"{bound}."
    )
    if rescored is None:
        return f"{text} Whether this corpus has these losses was not checked: add --rescore 20."
    every = rescored.windows == rescored.of_windows
    of = "all" if every else f"{rescored.windows:,} distinct windows, drawn at random from"
    text += (
        f" Scored again: {of} {rescored.of_windows:,} recorded windows ({rescored.tokens:,} tokens); they agree to "
        f"{rescored.largest_difference_nats:.2g} nats per token."
    )
    if rescored.control_variates:
        text += " The control variates were computed again from the corpus and agree."
    if every:
        return text
    return (
        f"{text} If {100 * rescored.detectable_share:.2g} % of the recorded windows or more had been forged, this "
        "would have found one with 95 % probability."
    )


def online_sentence(declaration: str) -> str:
    """What bounds of a training run's own losses say, and what they do not.

    >>> online_sentence("one pass, no repeats").endswith("Declared: one pass, no repeats.")
    True
    """
    return (
        "These lines bound the risk of the training run: the mean, over its own tokens, of the expected loss of the "
        "model as it was before it learned from each. They say nothing about the last model, and no code is paid. "
        "Taken on trust: every token is here once, predicted (entropy included) from earlier tokens alone, and rows of "
        f"one batch did not see each other. Declared: {declaration.rstrip('.')}."
    )


def unchecked(certificate: CertificateRecord, rescored: Rescored | None) -> list[str]:
    """What a verification leaves to trust, each by name; the certificate is only as good as these.

    Args:
        certificate: one that was verified.
        rescored: what was scored again; None where only losses and artifact were read.
    """
    return [*_unread(certificate, rescored), *_unknowable(certificate)]


def _unread(certificate: CertificateRecord, rescored: Rescored | None) -> list[str]:
    """What the corpus would have shown, were it read."""
    if rescored is not None:
        left = rescored.of_windows - rescored.windows
        found = [f"losses: {left:,} recorded windows were not scored again (use a larger --rescore)"] if left else []
        if certificate.num_worst_case_tokens:
            found.append(
                f"num_worst_case_tokens: that {certificate.num_worst_case_tokens:,} tokens could not be scored; they "
                "count at the worst case"
            )
        return [
            *found,
            *(f"{name}: it differs from the config's, with the same digests" for name in rescored.unmatched_names),
        ]
    found = [
        "losses: that the model gives these tokens these losses, entropies and ranks (use --rescore)",
        "corpus_sha256, tokens_sha256: that there is such a corpus, and which one it is (use --rescore)",
        "corpus: its source, paths, tokenizer, files, documents and bytes, as the certificate has them (use --rescore)",
        "vocab_size, tokenizer_vocab_size: how many ids the model predicts and the tokenizer can emit (use --rescore)",
        "model.source: where the model came from (use --rescore)",
    ]
    if certificate.sampling is not None:
        from tokenbound.certificate.record import possible_tokens

        low, high = possible_tokens(certificate)
        found.append(
            f"num_tokens, num_windows, max_window_tokens: the size of the corpus; its windows could hold {low:,} to "
            f"{high:,} tokens (use --rescore)"
        )
        if "num_decisions" in certificate.corpus:
            found.append(
                "corpus.num_decisions, corpus.max_window_decisions: how many decisions the ids of the corpus have, "
                "as far as the windows drawn leave it open (use --rescore)"
            )
        if certificate.sampling.has_controls:
            found.append("control_variates: that the features are those of the corpus (use --rescore)")
    if "targets" in certificate.corpus:
        found.append("corpus.targets: which of the tokens are answers (use --rescore)")
    if "base" in certificate.scoring_identity:
        found.append("model.base, base architecture_sha256: the base itself was not read (use --rescore)")
    if certificate.earlier_fingerprints:
        found.append(
            f"earlier_fingerprints: that the {len(certificate.earlier_fingerprints):,} are this corpus at an earlier "
            "size (use --rescore)"
        )
    return found


def _unknowable(certificate: CertificateRecord) -> list[str]:
    """What no computation can show: it is declared."""
    declared = certificate.declarations
    found = [
        f"trial {certificate.trial}: that no more configurations were tried on these tokens ("
        f"{COUNTED['config' if certificate.selection is None else certificate.selection.counted_by]})",
        "methods, top_k, delta: that they were named before the losses were known (declared)",
        "software: that the versions of this package, torch, transformers and NumPy, the device, `how.compile` and the "
        "number of threads were chosen without regard to the tokens (declared)",
    ]
    if declared.get("tokenizer_is") == "given":
        found.append("tokenizer_is: that the tokenizer was chosen independently of this corpus (declared)")
    if certificate.prior == "holdout":
        found.append("holdout_declaration: what these tokens were not used for (declared)")
    if certificate.declared_tokens is not None:
        found.append("declared_tokens: that this number was fixed before the corpus was seen (declared)")
    if "base_is_independent" in declared:
        found.append(
            f"base_is_independent, num_bases {declared.get('num_bases', 1)}: that the base does not depend on these "
            "tokens, and how many bases were tried (declared)"
        )
    if certificate.sampling is not None:
        draw = "" if certificate.sampling.evaluation is None else f", evaluation {certificate.sampling.evaluation}"
        found.append(
            f"seed {certificate.sampling.seed}, pilot_windows {certificate.sampling.pilot_windows}{draw}: that no "
            "other draw was looked at (declared)"
        )
    return [*found, "environment, created_at, tokenbound_version: what scored, and when (declared)"]


def headline(certificate: CertificateRecord) -> str:
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
        f"With {confidence} confidence this model's expected loss per {token_word(certificate.corpus)} on this corpus "
        f"is at most "
        f"{format_bound(certificate.bound_bits, 2)} bits{tail}; guessing costs {certificate.random_guess_bits:.2f}."
    )


def is_vacuous(certificate: CertificateRecord) -> bool:
    """Whether no line says more than guessing does: no loss line, or no error line where only errors are bounded."""
    if certificate.bound_bits is not None:
        return certificate.vacuous
    return all(line["vacuous"] for line in certificate.bounds)


def verdict(certificate: CertificateRecord) -> str:
    """Vacuous or not, in words."""
    if is_vacuous(certificate):
        return (
            "VACUOUS: the bound is not below random guessing. It says nothing about this model; use a shorter artifact "
            "or more tokens (tokenbound plan says how many)."
        )
    return "Not vacuous: below random guessing."


def assumptions(certificate: CertificateRecord) -> list[str]:
    """What the claim rests on and what it does not say."""
    word = token_word(certificate.corpus)
    found = [
        _risk_sentence(certificate.corpus),
        _prior_sentence(certificate),
        *_base_sentences(certificate),
        *_weights_sentences(certificate),
        *_arithmetic_sentences(certificate),
        *corpus_sentences(certificate.corpus),
        *_line_sentences(certificate),
        *plugin_sentences(certificate.declarations.get("plugins", {})),
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
        if certificate.sampling.has_controls:
            found.append(
                "The sampling error is computed on what control variates, n-gram code lengths of every window of the "
                "corpus, do not explain."
            )
    else:
        found.append(
            f"Every {word} was scored."
            if certificate.declared_tokens == certificate.num_tokens
            else f"Every {word} was scored; the bound holds for all corpus sizes at once, so it may be re-evaluated as "
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


def token_word(corpus: Mapping[str, Any]) -> str:
    """What is scored.

    >>> token_word({"targets": "answers"}), token_word({})
    ('answer token', 'token')
    """
    return "answer token" if "targets" in corpus else "token"


def _risk_sentence(corpus: Mapping[str, Any]) -> str:
    answers = "targets" in corpus
    over, given = (
        ("the positions of the answers in this corpus", "everything before it, prompts included, and that the answer ")
        if answers
        else ("this corpus's own positions", "everything before it")
    )
    return (
        f"The risk is the mean, over {over}, of the expected loss if that one token were drawn again given "
        f"{given}{'goes on' if answers else ''}; of the smoothed model. It is not the risk on fresh documents."
    )


def remarks(certificate: CertificateRecord) -> list[str]:
    """What every form of a certificate says, however short.

    Whether answers alone are scored, how it was selected, and whether versions differ.
    """
    return [
        *answer_sentences(certificate.corpus),
        selection_sentence(certificate),
        *_environment_sentences(certificate),
    ]


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


def selection_sentence(certificate: CertificateRecord) -> str:
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


def _environment_sentences(certificate: CertificateRecord) -> list[str]:
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


def slack_sentence(certificate: CertificateRecord) -> str:
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


def quoted_line(certificate: CertificateRecord) -> dict[str, Any] | None:
    """The loss line that the certificate quotes, else its first line with a value."""
    known = [line for line in certificate.bounds if line["value"] is not None]
    losses = [line for line in known if line["top_k"] is None and line["value"] == certificate.bound_bits]
    return next(iter(losses or known), None)


def _prior_sentence(certificate: CertificateRecord) -> str:
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


def _base_sentences(certificate: CertificateRecord) -> list[str]:
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


def _weights_sentences(certificate: CertificateRecord) -> list[str]:
    """What lay beside the weights that were scored, and a base that the adapter did not ask for."""
    found = []
    if named := certificate.model.get("adapter_base"):
        found.append(
            f"The adapter says that it was trained on {named}; it was scored on the base "
            f"{certificate.model.get('base')}, which may be another model."
        )
    if others := certificate.model.get("other_weights"):
        found.append(f"The checkpoint also holds {', '.join(map(str, others))}, which were not read.")
    return found


def _arithmetic_sentences(certificate: CertificateRecord) -> list[str]:
    arithmetic = certificate.model.get("arithmetic")
    if arithmetic is None:
        return []
    dtype = certificate.protocol.get("dtype")
    return [f"The model is quantized. It was scored by {arithmetic}, in {dtype}; other kernels may give other losses."]


def _line_sentences(certificate: CertificateRecord) -> list[str]:
    """What the bounds themselves have to say of their lines."""
    lines = [Line.from_dict(row) for row in certificate.bounds]
    found = [(find_bound(line.method), line) for line in lines if line.value is not None]
    return [sentence for bound, line in found if bound is not None for sentence in bound.sentences(line)]


def plugin_sentences(plugins: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Which installed packages took part, by entry-point group and name."""
    names = [f"{name} ({package})" for group in plugins.values() for name, package in group.items()]
    return [f"Provided by other packages, whose proofs and code count too: {', '.join(names)}."] if names else []


RULE_WORDS = {
    "hidden": "hidden files or folders",
    "excluded": "files or folders that the config excludes",
    "other suffix": "files with another suffix",
    "link to a listed file": "links to files that are listed anyway",
    "folder matched by a glob": "folders that the glob matched, but no file inside",
    "other form of a file": "compressed shards of which the raw form was read",
    "not read by datasets": "files that the `datasets` library does not read",
    "broken link": "broken links",
}
"""Rules by which files are left out of a corpus, in words."""


def corpus_sentences(corpus: Mapping[str, Any]) -> list[str]:
    """What the corpus section says of how the corpus was read, where that is not plain UTF-8 of every file.

    >>> corpus_sentences({"skipped": {"hidden": 2}, "encoding": "latin-1"})
    ['Left out of the corpus: hidden files or folders (2).', 'Text was decoded as latin-1.']
    """
    found = []
    if part := corpus.get("part"):
        salt = f" with the salt {part['salt']!r}" if part["salt"] else ""
        found.append(
            f"The corpus is the part of its source whose documents hash{salt} into [{part['from']:g}, {part['to']:g}); "
            "the risk is that of this part."
        )
    if skipped := corpus.get("skipped"):
        parts = [f"{RULE_WORDS.get(rule, rule)} ({count:,})" for rule, count in skipped.items()]
        found.append(f"Left out of the corpus: {', '.join(parts)}.")
    if empty := corpus.get("empty_files"):
        found.append(f"Empty files among those read: {empty:,}.")
    if corpus.get("missing") == "skip":
        found.append(f"Rows without a text were left out: {corpus.get('rows_without_text', 0):,}.")
    if corpus.get("encoding", "utf-8") != "utf-8":
        found.append(f"Text was decoded as {corpus['encoding']}.")
    if corpus.get("errors") == "replace":
        found.append(
            "Bytes that could not be decoded were replaced by U+FFFD, which "
            f"{corpus.get('documents_with_replacements', 0):,} documents contain."
        )
    if corpus.get("special_tokens") == "parse":
        found.append("Text that spells a special token of the tokenizer was read as that token.")
    if corpus.get("special_tokens") == "refuse":
        found.append("No document contains text that spells a special token of the tokenizer.")
    return found


def answer_sentences(corpus: Mapping[str, Any]) -> list[str]:
    """Which tokens are scored, where not all are.

    >>> answer_sentences({"targets": "answers", "prompt_field": "q", "completion_field": "a"})
    ["Answers only: the texts of the field 'a', each behind its prompt in 'q'. Nothing else is scored or counted in m."]
    """
    if "targets" not in corpus:
        return []
    return [f"Answers only: {_answer_words(corpus)}. Nothing else is scored or counted in m."]


def _answer_words(corpus: Mapping[str, Any]) -> str:
    if field := corpus.get("messages_field"):
        return (
            f"what the assistant says in the conversations of the field {field!r}, written by the tokenizer's chat "
            "template, with the special token that ends each turn"
        )
    return (
        f"the texts of the field {corpus.get('completion_field')!r}, each behind its prompt in "
        f"{corpus.get('prompt_field')!r}{', with the end of the document' if corpus.get('add_eos') else ''}"
    )


def source_of_corpus(corpus: Mapping[str, Any]) -> str:
    """Source of a corpus; of a dataset also its name, subset, split and revision.

    >>> source_of_corpus({"source": "jsonl"})
    'jsonl'
    >>> source_of_corpus({"source": "hf", "name": "you/data", "subset": None, "split": "train[:1]", "revision": "v1"})
    'hf you/data (split train[:1], revision v1)'
    """
    if not corpus.get("name"):
        return str(corpus["source"])
    details = [f"{key} {corpus[key]}" for key in ("subset", "split", "revision") if corpus.get(key)]
    return f"{corpus['source']} {corpus['name']}" + (f" ({', '.join(details)})" if details else "")


def _tokenizer_sentence(certificate: CertificateRecord) -> str:
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
