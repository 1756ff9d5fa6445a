"""Forged runs in which every digest, record and number is consistent: each is refused, and for what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forgery_support import Forger, improved_ranks

from tokenbound.certificate.control_variates import FEATURES
from tokenbound.certificate.identity import SOFTWARE_DECLARATIONS
from tokenbound.certificate.verify import verified_ledger, verify_beside
from tokenbound.config.run import RunConfig, load_config
from tokenbound.corpus.ngram_features import Features
from tokenbound.engine.evaluate.rescore import rescore
from tokenbound.errors import MismatchError
from tokenbound.report.words import unchecked
from tokenbound.store.run import RunDirectory, losses_sha256

Runs = Callable[[str], Forger]
RUNS = ("full", "sampled", "delta", "grown")


def fields(**changes: Any) -> Callable[[Forger], None]:
    """Set fields; `a__b` is `a.b`."""

    def edit(forged: Forger) -> None:
        for path, value in changes.items():
            forged.set(path.replace("__", "."), value)

    return edit


def without(path: str) -> Callable[[Forger], None]:
    section, _, key = path.rpartition(".")

    def edit(forged: Forger) -> None:
        del forged.tree[section][key]

    return edit


def more_tokens(forged: Forger) -> None:
    """A larger corpus than the windows of a sample show."""
    fields(num_tokens=lambda n: n + 50, corpus__tokens=lambda n: n + 50, corpus__text_bytes=lambda n: n + 50)(forged)
    corpus = forged.tree["corpus"]
    corpus["bytes_per_token"] = corpus["scored_text_bytes"] / forged.tree["num_tokens"]


def with_prior_holdout(forged: Forger) -> None:
    forged.tree["prior"] = forged.tree["declarations"]["prior"] = "holdout"


def rescored(forged: Forger, windows: int = 60, **options: Any) -> Any:
    certificate, run, artifact = verify_beside(forged.path)
    config = load_config(RunConfig, forged.folder / "config.yaml")
    return rescore(certificate, config, losses=run, artifact=artifact, windows=windows, **options)


def some_slow(names: Any, quick: set[str]) -> list[Any]:
    """Parameters of which a few of each kind run by default."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_slow(RUNS, {"sampled", "grown"}))
def test_honest_runs_pass_when_sealed_again(name: str, forger: Runs) -> None:
    """The forger's own work is not what is refused."""
    forged = forger(name)
    before = json.loads(forged.path.read_text())
    forged.seal()
    assert json.loads(forged.path.read_text()) == before
    found = rescored(forged, windows=10_000 if name == "grown" else 60)
    assert found.windows == (found.of_windows if name == "grown" else 60)
    assert found.largest_difference_nats < 1e-4


REFUSED_BY_VERIFY: dict[str, tuple[str, Callable[[Forger], None], str]] = {
    "tokens-x100": ("sampled", fields(num_tokens=lambda n: 100 * n), "num_tokens"),
    "tokens-x100-in-the-corpus-too": (
        "sampled",
        fields(
            num_tokens=lambda n: 100 * n,
            corpus__tokens=lambda n: 100 * n,
            corpus__text_bytes=lambda n: 100 * n,
        ),
        "num_tokens",
    ),
    "windows-larger-than-the-protocol": (
        "sampled",
        fields(sampling__max_window_tokens=64),
        "max_window_tokens 64 exceeds protocol.length 32",
    ),
    "windows-differ": ("sampled", fields(num_windows=lambda n: n + 1), "num_windows"),
    "tokenizer-counted-but-absent": ("full", fields(declarations__tokenizer_is="counted"), "holds no tokenizer"),
    "holdout-undeclared": ("full", with_prior_holdout, "declarations.holdout_declaration is missing"),
    "holdout-declared-without-being-one": (
        "full",
        fields(declarations__holdout_declaration="not used"),
        "does not rest on it",
    ),
    "base-undeclared": ("delta", without("declarations.base_is_independent"), "base_is_independent is missing"),
    "bases-uncounted": ("delta", without("declarations.num_bases"), "num_bases"),
    "base-unnamed": ("delta", without("model.base"), "model.base"),
    "base-of-a-whole-model": (
        "full",
        fields(declarations__base_is_independent="x", declarations__num_bases=1),
        "does not rest on it",
    ),
    "software-undeclared": ("full", without(f"declarations.{SOFTWARE_DECLARATIONS[0]}"), "is missing"),
    "threads-undeclared": ("full", without(f"declarations.{SOFTWARE_DECLARATIONS[1]}"), "is missing"),
    "architecture-of-another": ("full", fields(model__architecture="gpt2"), "model.architecture"),
    "growth-invented": ("delta", fields(earlier_fingerprints=["ab" * 32]), "no shard was scored under abab"),
    "growth-twice": ("grown", fields(earlier_fingerprints=lambda found: found * 2), "given twice"),
    "bytes-per-token-alone": ("full", fields(corpus__bytes_per_token=4.0), "corpus.bytes_per_token"),
    "eos-contradicts-the-protocol": ("full", fields(corpus__add_eos=False), "corpus.add_eos"),
    "documents-miscounted": ("full", fields(corpus__scored_documents=lambda n: n - 1), "corpus.scored_documents"),
    "more-documents-scored-than-there-are": ("full", fields(corpus__documents=3), "documents"),
    "ids-fewer-than-predictions": ("full", fields(corpus__tokens=100), "cannot be predicted"),
    "tokenizer-larger-than-the-logits": ("full", fields(tokenizer_vocab_size=300), "exceeds vocab_size"),
    "tokens-of-a-sample": ("sampled", more_tokens, "control variates are of .* tokens"),
    "pilot-as-large-as-the-sample": (
        "sampled",
        fields(sampling__pilot_windows=120, scoring_identity__pilot_windows=120),
        "not more than the pilot's 120",
    ),
}


@pytest.mark.parametrize("name", REFUSED_BY_VERIFY)
def test_verify_refuses_without_the_corpus(name: str, forger: Runs) -> None:
    run, edit, reason = REFUSED_BY_VERIFY[name]
    forged = forger(run)
    edit(forged)
    if name == "pilot-as-large-as-the-sample":
        forged.reorder()
    try:
        forged.seal()
    except Exception:  # even the forger's own arithmetic refuses it; the file is written as it is
        forged.write()
    with pytest.raises(MismatchError, match=reason):
        verify_beside(forged.path)


UNKNOWN_KEYS = {
    "scoring_identity": "sampled",
    "claim_identity": "full",
    "protocol": "full",
    "scoring_identity.protocol": "full",
    "scoring_identity.base": "delta",
    "declarations": "full",
    "corpus": "full",
    "model": "full",
    "code_split": "full",
    "sampling": "sampled",
}


@pytest.mark.parametrize("section", UNKNOWN_KEYS)
def test_an_unknown_key_is_refused_in_every_section(section: str, forger: Runs) -> None:
    """In an identity it would be a free number with which the order of a sample can be ground."""
    forged = forger(UNKNOWN_KEYS[section])
    forged.set(f"{section}.note", 7)
    if section == "scoring_identity":
        forged.reorder()
    forged.write()
    with pytest.raises(MismatchError, match=f"'{section}.note': unknown key") as caught:
        verify_beside(forged.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["seed", "protocol.dtype", "pilot_windows"])
def test_identities_are_those_of_the_fields(field: str, forger: Runs) -> None:
    """Every value of an identity is pinned by a field that is printed or paid for."""
    forged = forger("sampled")
    other = {"seed": 1, "protocol.dtype": "bfloat16", "pilot_windows": 41}[field]
    forged.set(f"scoring_identity.{field}", other)
    forged.reorder()
    forged._seal_losses()
    if field == "protocol.dtype":  # the records make the protocol; the certificate keeps the old one
        forged.set("protocol.dtype", "float32")
    forged.write()
    with pytest.raises(MismatchError, match=field.partition(".")[0]):
        verify_beside(forged.path)


def test_order_ground_by_a_list_of_batches_is_refused(forger: Runs) -> None:
    """Only memory makes lists of batches, in the applied protocol; an identity asks for one."""
    forged = forger("sampled")
    forged.set("scoring_identity.protocol.batch", [[4, 60], [4, 60]])
    forged.reorder()
    forged._seal_losses()
    forged.write()
    with pytest.raises(MismatchError, match=r"scoring_identity.protocol.batch|protocol"):
        verify_beside(forged.path)


def lower_losses(shift: float) -> Callable[[Forger], None]:
    def edit(forged: Forger) -> None:
        forged.map_losses(lambda losses: {"nll": np.maximum(losses.nll - np.float32(shift), 0)})

    return edit


def lower_losses_under_noise(forged: Forger) -> None:
    """A shift of the mean that hides in noise of five times its size, all inside the tolerance of a token."""
    generator = np.random.default_rng(0)

    def change(losses: Any) -> dict[str, Any]:
        noise = generator.normal(2e-4, 4e-4, losses.num_tokens)
        return {"nll": np.maximum(losses.nll - noise.astype(np.float32), 0)}

    forged.map_losses(change)


def higher_entropies(forged: Forger) -> None:
    forged.map_losses(lambda losses: {"entropy": losses.entropy + np.float32(4e-4)})


def lower_base_losses(forged: Forger) -> None:
    forged.map_losses(lambda losses: {"base_nll": losses.base_nll - np.float32(4e-4)})


def better_ranks(share: float) -> Callable[[Forger], None]:
    return lambda forged: forged.map_losses(lambda losses: improved_ranks(losses, share))


def one_better_rank(forged: Forger) -> None:
    rank = forged.losses[0].rank.copy()
    rank[int(np.argmax(rank >= 100))] = 0
    forged.losses[0] = replace(forged.losses[0], rank=rank)


def shard_of_another_run(forged: Forger) -> None:
    """A growth that shards bear, but that the corpus never had."""
    forged.signed_by = {0: "ab" * 32}
    forged.tree["earlier_fingerprints"] = ["ab" * 32]
    forged.tree["corpus"]["segments"] = 2


def other_features(forged: Forger) -> None:
    """Control variates that promise more of the windows that were not drawn."""
    table = Features.parse(forged.run.read(FEATURES), FEATURES).table.copy()
    drawn = np.concatenate([losses.window_id for losses in forged.losses])
    table[np.setdiff1d(np.arange(len(table)), drawn), 1] //= 2
    forged.run.write(FEATURES, Features.of(table).data)
    forged.set("sampling.control_variates.sha256", Features.of(table).sha256)


def other_names(forged: Forger) -> None:
    forged.tree["corpus"].update(source="hf", tokenizer="openai/gpt2")
    forged.tree["model"]["source"] = "other/model"


def four_bytes_per_token(forged: Forger) -> None:
    size = 4 * forged.tree["num_tokens"]
    fields(corpus__text_bytes=size, corpus__scored_text_bytes=size, corpus__bytes_per_token=4.0)(forged)


REFUSED_BY_RESCORING: dict[str, tuple[str, Callable[[Forger], None], str]] = {
    "ranks-1-and-1-percent": ("full", better_ranks(0.01), "ranks are not the model's at top-"),
    "ranks-of-one-token": ("full", one_better_rank, "1 of 32 recorded ranks are not the model's at top-1"),
    "losses-4.9e-4-lower": ("full", lower_losses(4.9e-4), "recorded nll differs from the model by -4"),
    "losses-5e-5-lower": ("sampled", lower_losses(5e-5), "recorded nll differs from the model by -5"),
    "losses-lower-under-noise": ("full", lower_losses_under_noise, "recorded nll differs from the model"),
    "entropies-higher": ("full", higher_entropies, "recorded entropy differs from the model by"),
    "losses-of-the-base-lower": ("delta", lower_base_losses, "recorded base_nll differs from the model by"),
    "bytes-per-token": (
        "full",
        lambda forged: fields(
            corpus__text_bytes=4 * forged.tree["num_tokens"],
            corpus__scored_text_bytes=4 * forged.tree["num_tokens"],
            corpus__bytes_per_token=4.0,
        )(forged),
        "corpus.(bytes_per_token|scored_text_bytes|text_bytes): the certificate says",
    ),
    "protocol-flipped": (
        "full",
        fields(
            scoring_identity__protocol__add_bos=True,
            scoring_identity__protocol__add_eos=False,
            corpus__add_bos=True,
            corpus__add_eos=False,
        ),
        "protocol: the config scores otherwise.*add_bos",
    ),
    "names": ("full", other_names, "corpus.source: the certificate says 'hf'"),
    "tokenizer-name": ("full", fields(corpus__tokenizer="openai/gpt2"), "corpus.tokenizer"),
    "model-name": ("full", fields(model__source="other/model"), "model.source: the certificate says 'other/model'"),
    "base-name": ("delta", fields(model__base="other/base"), "model.base"),
    "documents": ("sampled", fields(corpus__documents=13), "corpus.documents"),
    "files": ("full", fields(corpus__files=13), "corpus.files"),
    "growth": ("delta", shard_of_another_run, "segments|earlier_fingerprints"),
    "features": ("sampled", other_features, "control_variates: .* was not computed from this corpus"),
    "tokenizer-size": ("full", fields(tokenizer_vocab_size=256), "tokenizer_vocab_size"),
    "logits-wider": ("sampled", fields(vocab_size=300), "vocab_size"),
}


QUICK = {
    "features",
    "ranks-1-and-1-percent",
    "losses-4.9e-4-lower",
    "bytes-per-token",
    "protocol-flipped",
    "names",
    "growth",
}


@pytest.mark.parametrize("name", some_slow(REFUSED_BY_RESCORING, QUICK))
def test_rescoring_refuses_what_verify_cannot(name: str, forger: Runs) -> None:
    run, edit, reason = REFUSED_BY_RESCORING[name]
    forged = forger(run)
    edit(forged)
    forged.seal()
    if forged.tree["corpus"].get("scored_text_bytes"):
        ratio = forged.tree["corpus"]["scored_text_bytes"] / forged.tree["num_tokens"]
        forged.tree["corpus"]["bytes_per_token"] = ratio
        forged._seal_numbers()
        forged.write()
    certificate, _, _ = verify_beside(forged.path)
    assert unchecked(certificate, None)
    with pytest.raises(MismatchError, match=reason):
        rescored(forged, windows=10_000 if name == "ranks-of-one-token" else 60)


def test_an_earlier_size_that_the_corpus_never_had_is_refused(forger: Runs) -> None:
    forged = forger("grown")
    (honest,) = forged.tree["earlier_fingerprints"]
    borne = [i for i in range(len(forged.losses)) if forged.run.record(i).scoring_fingerprint == honest]
    forged.signed_by = dict.fromkeys(borne, "cd" * 32)
    forged.tree["earlier_fingerprints"] = ["cd" * 32]
    forged.seal()
    verify_beside(forged.path)
    with pytest.raises(MismatchError, match="earlier_fingerprints: cdcd"):
        rescored(forged)


def test_losses_that_change_after_verification_are_not_rescored(forger: Runs) -> None:
    forged = forger("full")
    certificate, run, artifact = verify_beside(forged.path)
    forged.map_losses(lambda losses: {"nll": losses.nll * np.float32(0.9)})
    forged._seal_losses()
    config = load_config(RunConfig, forged.folder / "config.yaml")
    with pytest.raises(MismatchError, match="losses_sha256"):
        rescore(certificate, config, losses=run, artifact=artifact, windows=5)
    other, artifact = forger("sampled"), str(forger("delta").folder / "artifact.tokenbound")
    certificate, run, _ = verify_beside(other.path)
    config = load_config(RunConfig, other.folder / "config.yaml")
    with pytest.raises(MismatchError, match="artifact"):
        rescore(certificate, config, losses=run, artifact=artifact, windows=5)


def test_records_are_read_once(forger: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that changes between two reads cannot vouch for other losses than were compared."""
    forged = forger("full")
    certificate, run, _ = verify_beside(forged.path)
    ledger = verified_ledger(certificate, run)
    forged.map_losses(lambda losses: {"nll": losses.nll * np.float32(0.9)})
    forged._seal_losses()
    records = [RunDirectory(run).record(shard) for shard in range(certificate.num_shards)]
    assert losses_sha256(records) != certificate.losses_sha256
    with pytest.raises(MismatchError, match="changed after it was committed"):
        ledger.losses(0)
    assert [ledger.record(shard) for shard in range(certificate.num_shards)] != records
    monkeypatch.undo()


def test_another_protocol_in_the_config_is_named(finished_runs: Path) -> None:
    folder = finished_runs / "full"
    certificate, run, artifact = verify_beside(folder / "certificate.json")
    for override, key in (
        ("what.windows.length=16", "length"),
        ("what.windows.context=packed", "context"),
        ("what.model.dtype=bfloat16", "dtype"),
        ("what.windows.batch=2", "batch"),
    ):
        overrides = [override, 'what.bound.methods=["azuma"]']
        config = load_config(RunConfig, folder / "config.yaml", overrides)
        with pytest.raises(MismatchError, match=f"protocol: the config scores otherwise.*{key}"):
            rescore(certificate, config, losses=run, artifact=artifact, windows=1)


def test_a_tokenizer_declared_otherwise_is_named(finished_runs: Path) -> None:
    folder = finished_runs / "full"
    certificate, run, artifact = verify_beside(folder / "certificate.json")
    config = load_config(RunConfig, folder / "config.yaml", ["what.corpus.tokenizer_is=counted"])
    with pytest.raises(MismatchError, match=r"declarations\.tokenizer_is"):
        rescore(certificate, config, losses=run, artifact=artifact, windows=1)


def test_where_the_corpus_lies_is_not_what_it_is(finished_runs: Path, text_folder: Path, tmp_path: Path) -> None:
    """The same files at another place verify; the name that could not be compared is listed."""
    import shutil

    shutil.copytree(text_folder, tmp_path / "moved")
    folder = finished_runs / "full"
    certificate, run, artifact = verify_beside(folder / "certificate.json")
    config = load_config(RunConfig, folder / "config.yaml", [f"what.corpus.paths=[{tmp_path / 'moved'}]"])
    found = rescore(certificate, config, losses=run, artifact=artifact, windows=3, seed=1)
    assert found.unmatched_names == ("corpus.paths",)
    assert any(point.startswith("corpus.paths") for point in unchecked(certificate, found))
