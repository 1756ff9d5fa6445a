"""A certificate in a line: for a paper's table, a README, a bibliography, a model card. Pure functions of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from tokenbound.bounds.rounding import format_bound
from tokenbound.errors import InputError
from tokenbound.report.words import remarks, source_name
from tokenbound.store.uri import base_name, is_uri

if TYPE_CHECKING:
    from tokenbound.certificate.record import CertificateRecord

MARKDOWN_HEADER = (
    "| model | corpus | tokens | artifact (bytes) | measured (bits/token) | bound (bits/token) "
    "| guessing | method | 1-delta |\n"
    "|:--|:--|--:|--:|--:|--:|--:|:--|--:|"
)
"""Header of :func:`markdown_row`'s table."""

LATEX_HEADER = (
    r"model & corpus & tokens & artifact (bytes) & $\hat R$ (bits/token) & bound (bits/token) "
    r"& guessing & method & $1-\delta$ \\"
)
"""Header of :func:`latex_row`'s table."""

PAPER_BIBTEX = """@inproceedings{lotfi2024unlocking,
  title = {Unlocking Tokens as Data Points for Generalization Bounds on Larger Language Models},
  author = {Lotfi, Sanae and Kuang, Yilun and Amos, Brandon and Goldblum, Micah and Finzi, Marc
            and Wilson, Andrew Gordon},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  note = {arXiv:2407.18158}
}"""
"""The paper whose bound the line `azuma` is."""

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def model_name(certificate: CertificateRecord) -> str:
    """The model's own name: the last part of where it came from, else its architecture.

    >>> from tokenbound.demo import demo_certificate
    >>> model_name(demo_certificate())
    'demo'
    """
    source = str(certificate.model.get("source") or certificate.model.get("architecture") or "model")
    return source_name(source)


def corpus_name(certificate: CertificateRecord) -> str:
    """The corpus in a few words: its first path or its name, with what was taken of a dataset, else its kind.

    >>> from tokenbound.demo import demo_certificate
    >>> corpus_name(demo_certificate())
    'python-stdlib'
    """
    corpus = certificate.corpus
    paths = [_path_name(str(path)) for path in corpus.get("paths") or ()]
    if not paths:
        name = str(corpus.get("name") or corpus.get("source", "corpus"))
    else:
        name = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    details = [str(corpus[key]) for key in ("subset", "split") if corpus.get(key) not in (None, "train")]
    details += ["answers only"] if "targets" in corpus else []
    return f"{name} ({', '.join(details)})" if details else name


def _path_name(path: str) -> str:
    """Name of a file or folder; of a glob that of the folder it begins in.

    >>> _path_name("data/a.jsonl"), _path_name("data/corpus/*.jsonl"), _path_name("*.txt")
    ('a.jsonl', 'corpus', '*.txt')
    """
    parts = path.split("/")
    fixed = list(itertools.takewhile(lambda part: not set(part) & set("*?["), parts))
    return base_name(path) if is_uri(path) or fixed in (parts, []) else fixed[-1] or path


def _cells(certificate: CertificateRecord, name: str | None) -> list[str]:
    bound, measured = certificate.bound_bits, certificate.empirical_risk_bits
    bound_text = "none" if bound is None else format_bound(bound, 3)
    sampled = "" if certificate.sampling is None else f" ({certificate.num_scored_tokens:,} scored)"
    return [
        name or model_name(certificate),
        corpus_name(certificate),
        f"{certificate.num_tokens:,}{sampled}",
        f"{certificate.artifact_bytes:,}{' (not paid)' if certificate.prior == 'holdout' else ''}",
        "none" if measured is None else f"{measured:.3f}",
        f"{bound_text} (vacuous)" if certificate.vacuous and bound is not None else bound_text,
        f"{certificate.random_guess_bits:.3f}",
        f"{certificate.method or 'errors only'}{', holdout' if certificate.prior == 'holdout' else ''}",
        f"{1 - certificate.delta:g}",
    ]


def markdown_row(certificate: CertificateRecord, name: str | None = None) -> str:
    """One row of a Markdown table; `MARKDOWN_HEADER` fits.

    Args:
        certificate: what to quote.
        name: what to call the model; default :func:`model_name`.

    >>> from tokenbound.demo import demo_certificate
    >>> markdown_row(demo_certificate(), "my model").split(" | ")[:2]
    ['| my model', 'python-stdlib']
    """
    return "| " + " | ".join(markdown_cell(cell) for cell in _cells(certificate, name)) + " |"


def markdown_cell(text: str) -> str:
    r"""Text as a cell of a Markdown table: on one line, special letters escaped.

    >>> print(markdown_cell("a_b | c"))
    a\_b \| c
    """
    flat = " ".join(text.split())
    for letter in "\\|`*_<>[]":
        flat = flat.replace(letter, "\\" + letter)
    return flat


def latex_row(certificate: CertificateRecord, name: str | None = None) -> str:
    r"""One row of a LaTeX tabular of nine columns (`llrrrrrlr`), closed with ``\\``; `LATEX_HEADER` fits.

    Args:
        certificate: what to quote.
        name: what to call the model; default :func:`model_name`.

    >>> from tokenbound.demo import demo_certificate
    >>> latex_row(demo_certificate(), "my_model").split(" & ")[0]
    'my\\_model'
    """
    return " & ".join(latex_text(cell) for cell in _cells(certificate, name)) + r" \\"


def latex_text(text: str) -> str:
    r"""Text with LaTeX's special letters escaped, on one line.

    >>> print(latex_text("a_b & 50 %"))
    a\_b \& 50 \%
    """
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def bibtex(certificate: CertificateRecord, name: str | None = None) -> str:
    """An entry for the certificate itself; its note holds the bound and the fingerprint that names the claim.

    Args:
        certificate: what to cite.
        name: what to call the model; default :func:`model_name`.

    >>> from tokenbound.demo import demo_certificate
    >>> print(bibtex(demo_certificate()).splitlines()[1])
      title = {Risk certificate for demo on python-stdlib},
    """
    title = f"Risk certificate for {name or model_name(certificate)} on {corpus_name(certificate)}"
    if certificate.bound_bits is None:
        claim = "bounds on top-k errors"
    else:
        claim = f"expected loss at most {format_bound(certificate.bound_bits, 3)} bits per token"
        claim += " (vacuous)" if certificate.vacuous else ""
    note = f"{claim} with probability {1 - certificate.delta:g}; claim {certificate.claim_fingerprint[:16]}"
    note = " ".join([f"{note}.", *remarks(certificate)])
    return (
        f"@misc{{tokenbound-{certificate.claim_fingerprint[:8]},\n"
        f"  title = {{{latex_text(title)}}},\n"
        f"  year = {{{certificate.created_at[:4]}}},\n"
        f"  howpublished = {{tokenbound {latex_text(certificate.tokenbound_version)}}},\n"
        f"  note = {{{latex_text(note)}}}\n"
        "}"
    )


def model_index(certificate: CertificateRecord, name: str | None = None) -> list[dict[str, Any]]:
    """Hugging Face `model-index` metadata: the value of that key in a model card's YAML header.

    Metrics are the best loss bound, the unsmoothed mean, perplexity, and every bounded error. Their names say what they
    are, since no registered metric type means an upper bound.

    Args:
        certificate: what to publish.
        name: what to call the model; default :func:`model_name`.

    >>> from tokenbound.demo import demo_certificate
    >>> model_index(demo_certificate())[0]["results"][0]["metrics"][0]["type"]
    'risk-bound-bits-per-token'
    """
    corpus = corpus_name(certificate)
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"name": corpus, "type": str(certificate.corpus.get("name") or certificate.corpus.get("source"))}
        | {
            key: certificate.corpus[field]
            for key, field in (("config", "subset"), ("split", "split"), ("revision", "revision"))
            if certificate.corpus.get(field)
        },
        "metrics": _metrics(certificate),
    }
    return [{"name": name or model_name(certificate), "results": [result]}]


def _metrics(certificate: CertificateRecord) -> list[dict[str, Any]]:
    confidence = f"with probability {1 - certificate.delta:g}"
    claim = {
        "delta": certificate.delta,
        "claim_fingerprint": certificate.claim_fingerprint,
        "trial": certificate.trial,
        "selection": " ".join(remarks(certificate)),
    }
    found: list[dict[str, Any]] = []
    if certificate.bound_bits is not None:
        vacuous = ", vacuous" if certificate.vacuous else ""
        title = f"upper bound on the expected loss, bits per token, {confidence} ({certificate.method}{vacuous})"
        found.append(_metric("risk-bound-bits-per-token", title, certificate.bound_bits, claim))
    found.append(
        _metric("loss-bits-per-token", "mean loss on the scored tokens, bits per token", certificate.mean_nll_bits)
    )
    found.append(_metric("perplexity", "perplexity on the scored tokens", certificate.perplexity))
    for line in certificate.bounds:
        if line["top_k"] is not None and line["value"] is not None:
            k = line["top_k"]
            found.append(
                _metric(f"top-{k}-error-bound", f"upper bound on the top-{k} error, {confidence}", line["value"], claim)
            )
    return found


def _metric(kind: str, title: str, value: float, claim: dict[str, Any] | None = None) -> dict[str, Any]:
    metric = {"type": kind, "name": title, "value": value if math.isfinite(value) else str(value)}
    return {**metric, "args": dict(claim)} if claim else metric


def model_card_yaml(certificate: CertificateRecord, name: str | None = None) -> str:
    """:func:`model_index` as YAML, to paste between the `---` lines of a model card.

    Args:
        certificate: what to publish.
        name: what to call the model; default :func:`model_name`.

    >>> from tokenbound.demo import demo_certificate
    >>> print(model_card_yaml(demo_certificate()).splitlines()[0])
    model-index:
    """
    tree = {"model-index": model_index(certificate, name)}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=10_000)


def eval_results(certificate: CertificateRecord) -> str:
    """The file `.eval_results/tokenbound.yaml` of a model's repository on the hub, for a corpus that is a hub dataset.

    The bound and the measured loss, each as a task of the dataset.

    Args:
        certificate: of a model scored on a dataset of the hub.

    Raises:
        InputError: the corpus is none.

    >>> from tokenbound.demo import demo_certificate
    >>> eval_results(demo_certificate())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tokenbound.errors.InputError: eval-results name a dataset of the hub, but the corpus is python-stdlib; use ...
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    corpus = certificate.corpus
    if not corpus.get("name"):
        raise InputError(
            f"eval-results name a dataset of the hub, but the corpus is {corpus_name(certificate)}; use another format"
        )
    where = ", ".join(f"{key} {corpus[key]}" for key in ("subset", "split") if corpus.get(key))
    bounded = f"upper bound with probability {1 - certificate.delta:g}, bits per token, {certificate.method}"
    values = [("loss-bits-per-token", certificate.mean_nll_bits, "mean loss, bits per token")]
    if certificate.bound_bits is not None:
        values.insert(0, ("risk-bound-bits-per-token", certificate.bound_bits, bounded))
    entries = [
        EvalResultEntry(
            dataset_id=str(corpus["name"]),
            task_id=task,
            value=value,
            dataset_revision=corpus.get("revision"),
            date=certificate.created_at,
            notes="; ".join(part for part in (notes, where, *remarks(certificate)) if part),
        )
        for task, value, notes in values
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True, width=10_000)


def markdown_table(certificate: CertificateRecord) -> str:
    """A table of one row, and below it what every form of a certificate says."""
    said = " ".join(markdown_cell(sentence) for sentence in remarks(certificate))
    return f"{MARKDOWN_HEADER}\n{markdown_row(certificate)}\n\n{said}"


def latex_rows(certificate: CertificateRecord) -> str:
    """The row, and below it over all columns what every form of a certificate says."""
    said = " ".join(latex_text(sentence) for sentence in remarks(certificate))
    return f"{latex_row(certificate)}\n\\multicolumn{{9}}{{p{{\\linewidth}}}}{{\\footnotesize {said}}} \\\\"


def _picture(certificate: CertificateRecord) -> str:
    from tokenbound.report.figures import composition_svg  # draws: only where it is asked for

    return composition_svg(certificate)


EXPORTS: Mapping[str, Callable[[CertificateRecord], str]] = {
    "markdown": markdown_table,
    "latex": latex_rows,
    "bibtex": bibtex,
    "model-card": model_card_yaml,
    "eval-results": eval_results,
    "svg": _picture,
}
"""What `tokenbound report --format` prints besides the table and JSON."""
