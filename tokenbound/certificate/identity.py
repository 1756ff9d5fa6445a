"""What names a run and a claim: the scoring protocol, the two fingerprints, and what they are made of.

The scoring fingerprint names everything that decides the losses; the claim fingerprint adds what is said about
them. Stopping rules (`sample.windows`, `sample.until_slack_bits`) and everything under `how` are in neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from tokenbound.bounds.codes import protocol_code_length_bits
from tokenbound.bounds.constants import SAMPLING_DELTA_SHARE
from tokenbound.bounds.lines import LINES
from tokenbound.config.run import ModelConfig, WhatConfig, WindowsConfig
from tokenbound.corpus.config import CorpusConfig
from tokenbound.corpus.ngram_features import KIND as NGRAM_FEATURES
from tokenbound.corpus.sources import SOURCES
from tokenbound.plugins import plugins_used
from tokenbound.store.draws import Configuration
from tokenbound.store.run import canonical_json, sha256_hex

SOFTWARE_DECLARATIONS = (
    "package_torch_and_device_chosen_without_regard_to_the_tokens",
    "transformers_numpy_compile_and_threads_chosen_without_regard_to_the_tokens",
)
"""What every certificate declares; those made before the second was known make the first alone."""

DEFAULT_PROTOCOL: dict[str, Any] = {
    "add_bos": False,
    "add_eos": True,
    "batch": 16,
    "context": "packed",
    "dtype": "float32",
    "length": 512,
    "stride": 512,
}
"""The package's own way of scoring, which costs one bit; any other is spelled out and paid for."""


def scoring_protocol(model: ModelConfig, corpus: CorpusConfig, windows: WindowsConfig) -> dict[str, Any]:
    """How the hypothesis is applied to a corpus; part of the hypothesis, hence of L(h)."""
    return {
        "add_bos": corpus.add_bos,
        "add_eos": corpus.add_eos,
        "batch": windows.batch,
        "context": windows.context,
        "dtype": model.dtype,
        "length": windows.length,
        "stride": windows.stride or windows.length,
    }


def applied_protocol(protocol: dict[str, Any], shards: Iterable[tuple[int | None, int]]) -> dict[str, Any]:
    """The protocol by which a run was scored, where memory ran out on the way and the batch was halved.

    Every window has a batch shape of its own then, and all of them are part of the hypothesis: the code spells the
    runs of equal shapes, in the order of the plan.

    Args:
        protocol: as the config asks.
        shards: in order, the batch of each (None: the protocol's own) and its number of windows.

    Returns:
        The same with `batch` as it was: one number, or [[batch, windows], ...].

    >>> applied_protocol({"batch": 8, "dtype": "float32"}, [(None, 10), (4, 6), (4, 10)])
    {'batch': [[8, 10], [4, 16]], 'dtype': 'float32'}
    >>> applied_protocol({"batch": 8}, [(4, 10), (4, 6)])
    {'batch': 4}
    """
    runs: list[list[int]] = []
    for batch, windows in shards:
        shape = protocol["batch"] if batch is None else batch
        if runs and runs[-1][0] == shape:
            runs[-1][1] += windows
        else:
            runs.append([shape, windows])
    return {**protocol, "batch": runs[0][0] if len(runs) == 1 else runs or protocol["batch"]}


def smallest_batch(protocol: dict[str, Any]) -> int:
    """The batch of a protocol, or the last that it was halved to."""
    batch = protocol["batch"]
    return batch if isinstance(batch, int) else min(shape for shape, _ in batch)


def protocol_bits(protocol: dict[str, Any]) -> int:
    """Bits of a protocol's code: 1 for the package default."""
    return protocol_code_length_bits(canonical_json(protocol), canonical_json(DEFAULT_PROTOCOL))


def scoring_identity(
    *,
    artifact_sha256: str,
    corpus_sha256: str,
    tokens_sha256: str,
    protocol: dict[str, Any],
    sample: Drawn,
    base: dict[str, str] | None = None,
    tree: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Everything that decides the losses of a run and the order in which windows are drawn.

    `sample` is the section of the run's config, or what a certificate says of it where it is verified. `base` is the
    identity of the base that a delta changes, absent for a whole model. `tree` names the tree along which decisions
    are scored, absent where they are not.
    """
    return {
        **({} if base is None else {"base": base}),
        **({} if tree is None else {"tree": tree}),
        "artifact_sha256": artifact_sha256,
        "corpus_sha256": corpus_sha256,
        "tokens_sha256": tokens_sha256,
        "protocol": protocol,
        **drawing(sample),
    }


class Drawn(Protocol):
    """How windows are drawn, as far as it is part of the identity."""

    @property
    def is_full(self) -> bool:
        """Whether every window is scored."""

    @property
    def seed(self) -> int:
        """Seed of the order."""

    @property
    def pilot_windows(self) -> int:
        """First windows of the order."""


def drawing(sample: Drawn) -> dict[str, Any]:
    """What of a sample is part of the identity: not where it stops."""
    return {
        "sampled": not sample.is_full,
        "seed": sample.seed,
        "pilot_windows": None if sample.is_full else sample.pilot_windows,
    }


def declarations(what: WhatConfig, encoded_by: Mapping[str, Mapping[str, str]] | None = None) -> dict[str, Any]:
    """What the user vouches for; nothing here can be recomputed.

    Args:
        what: of the run.
        encoded_by: the plugin that encoded the artifact, as `compression.methods.plugins_of` gives it.
    """
    found: dict[str, Any] = {
        "tokenizer_is": what.corpus.tokenizer_is,
        "prior": what.bound.prior,
        **dict.fromkeys(SOFTWARE_DECLARATIONS, True),
    }
    if what.bound.prior == "holdout":
        found["holdout_declaration"] = what.bound.holdout_declaration
    if what.bound.declared_tokens is not None:
        found["declared_tokens"] = what.bound.declared_tokens
    if what.model.base is not None:
        found["base_is_independent"] = what.model.base_is_independent
        found["num_bases"] = what.model.num_bases
    plugins = plugins_used((LINES, what.bound.methods), (SOURCES, [what.corpus.source]))
    plugins |= {group: dict(names) for group, names in (encoded_by or {}).items()}
    return {**found, **({"plugins": plugins} if plugins else {})}


class Sampled(Protocol):
    """What a config says of a sample, and what a certificate says of it, as far as it is claimed."""

    @property
    def evaluation(self) -> int | None:
        """Ordinal of the draw in a growing corpus."""

    @property
    def has_controls(self) -> bool:
        """Whether control variates are used."""

    @property
    def has_budgets(self) -> bool:
        """Whether windows have a budget, in the bounds that know one."""


class Claimed(Protocol):
    """What a config claims, and what a certificate says that it claimed."""

    @property
    def methods(self) -> Sequence[str]:
        """Bounds that are printed."""

    @property
    def top_k(self) -> Sequence[int]:
        """Errors that are bounded."""

    @property
    def delta(self) -> float:
        """Probability that any line fails."""

    @property
    def ordinal(self) -> int:
        """Which of the configurations tried on these tokens it is, from 1."""

    @property
    def unscorable(self) -> str:
        """What a window without a finite loss does."""


def claim_identity(
    scoring_fingerprint: str, bound: Claimed, declared: dict[str, Any], drawn: Sampled | None = None
) -> dict[str, Any]:
    """Everything that is claimed about the losses of a run.

    `bound` and `drawn` are sections of the run's config, or the certificate itself and its own section where it is
    verified.
    """
    return {
        "scoring_fingerprint": scoring_fingerprint,
        "methods": list(bound.methods),
        "top_k": list(bound.top_k),
        "delta": bound.delta,
        "sampling_delta_share": SAMPLING_DELTA_SHARE,
        "trial": bound.ordinal,
        "unscorable": bound.unscorable,
        "declarations": declared,
        **_sampling(drawn),
    }


def _sampling(drawn: Sampled | None) -> dict[str, Any]:
    """What of a sample is claimed: the ordinal of its draw, control variates, budgets; absent where there are none."""
    if drawn is None:
        return {}
    return {**({} if drawn.evaluation is None else {"evaluation": drawn.evaluation}), **_sampling_methods(drawn)}


def _sampling_methods(drawn: Sampled) -> dict[str, Any]:
    """How the sampling error is kept small; what was certified before there was such a thing does not name it."""
    controls = {"control_variates": NGRAM_FEATURES} if drawn.has_controls else {}
    return {**controls, **({"window_budgets": True} if drawn.has_budgets else {})}


def configuration(what: WhatConfig, identities: Sequence[dict[str, Any]]) -> Configuration:
    """What the register of draws counts: not a text of the config, but what makes another event of a failure.

    With every token scored under the prior `code` the lines hold for all models and protocols at once, so only the
    claim is counted, and the base of a delta, which pays no code. A sample, or a holdout, is drawn for one model,
    protocol, seed and pilot. Where scoring stops, and the order of methods, are in neither.

    Args:
        what: the run.
        identities: its scoring identity, behind those it had while its corpus was shorter.
    """
    bound, last = what.bound, identities[-1]
    base = (last.get("base") or {}).get("sha256")
    claim: dict[str, Any] = {
        "methods": sorted(bound.methods),
        "top_k": sorted(bound.top_k),
        "delta": bound.delta,
        "sampling_delta_share": SAMPLING_DELTA_SHARE,
        "prior": bound.prior,
        "declared_tokens": bound.declared_tokens,
        "unscorable": bound.unscorable,
        "base_sha256": base,
        "num_bases": what.model.bases_tried,
        **_answers(what.corpus),
    }
    holdout = bound.prior == "holdout"
    group = {"claim": claim, **({name: last[name] for name in ("artifact_sha256", "protocol")} if holdout else {})}
    if what.sample.is_full and not holdout:
        return Configuration((fingerprint({"claim": claim}),), fingerprint(group), words={"claim": claim})
    evaluation = None if what.sample.is_full else what.sample.evaluation
    drawn = {"claim": claim, "evaluation": evaluation, **_sampling_methods(what.sample)}
    keys = tuple(fingerprint({**drawn, "draw": fingerprint(identity)}) for identity in identities)
    words = {**drawn, "scoring_fingerprint": fingerprint(last), **{name: last[name] for name in SAID if name in last}}
    return Configuration(keys, fingerprint(group), evaluation, words)


def _answers(corpus: CorpusConfig) -> dict[str, Any]:
    """Which ids are scored, where not all are: another martingale on the same ids, so another event of a failure."""
    if corpus.targets == "all":
        return {}
    return {"targets": {"kind": corpus.targets, "columns": [corpus.prompt_field, corpus.messages_field]}}


SAID = ("artifact_sha256", "protocol", "seed", "pilot_windows")
"""What the register says of a draw besides its name."""


def fingerprint(identity: dict[str, Any]) -> str:
    """SHA-256 of an identity's canonical JSON."""
    return sha256_hex(canonical_json(identity))


def differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Which fields of two identities differ, for an error message.

    >>> differences({"seed": 1, "sampled": False}, {"seed": 2, "sampled": False})
    'seed (1, now 2)'
    """
    keys = sorted(set(found) | set(expected))
    changed = [key for key in keys if found.get(key) != expected.get(key)]
    return ", ".join(f"{key} ({_short(found.get(key))}, now {_short(expected.get(key))})" for key in changed)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
