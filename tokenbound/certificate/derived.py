"""What a run claims, and every number of a certificate that losses and claim determine."""

from __future__ import annotations

import json
import math
from typing import Any

from tokenbound.bounds.claim import Claim, Line
from tokenbound.bounds.codes import artifact_code_length_bits
from tokenbound.bounds.decisions import TreeChoice
from tokenbound.certificate.identity import (
    protocol_bits,
)
from tokenbound.certificate.reduce import Reduction
from tokenbound.config.run import BoundConfig


def code_split(artifact_bytes: int, protocol: dict[str, Any]) -> dict[str, float]:
    """L(h) by what it pays for, bits. A counted tokenizer and a delta's base digest are inside the artifact."""
    return {
        "artifact": float(artifact_code_length_bits(artifact_bytes)),
        "protocol": float(protocol_bits(protocol)),
    }


def claim_of(
    bound: BoundConfig,
    *,
    artifact_bytes: int,
    protocol: dict[str, Any],
    vocab_size: int,
    tokenizer_vocab_size: int,
    num_tokens: int,
    num_bases: int = 0,
    head_alpha_min: float | None = None,
    num_documents: int | None = None,
    tree: TreeChoice | None = None,
) -> Claim:
    """What a run's config claims about a model of this size on a corpus of this size."""
    split = code_split(artifact_bytes, protocol)
    return Claim(
        vocab_size=vocab_size,
        tokenizer_vocab_size=tokenizer_vocab_size,
        code_length_bits=math.fsum(split.values()),
        delta=bound.delta,
        num_tokens=num_tokens,
        methods=bound.methods,
        top_k=bound.top_k,
        trial=bound.ordinal,
        declared_tokens=bound.declared_tokens,
        prior=bound.prior,
        code_split=split,
        num_bases=num_bases,
        head_alpha_min=head_alpha_min,
        num_documents=num_documents,
        tree=None if tree is None else tree.name,
        tree_lengths=None if tree is None else tree.lengths,
    )


def derived_fields(reduction: Reduction, claim: Claim, bytes_per_token: float | None) -> dict[str, Any]:
    """Every number of a certificate that the losses and the claim determine."""
    best = best_loss_line(reduction.lines)
    mean = reduction.sums.mean_nll_nats
    per_byte = None if not bytes_per_token else 1 / bytes_per_token
    return {
        "bound_bits": best.value if best else None,
        "method": best.method if best else None,
        "empirical_risk_bits": best.empirical if best else None,
        "gap_bits": best.value - best.empirical
        if best and best.value is not None and best.empirical is not None
        else None,
        "vacuous": best is None or bool(best.vacuous),
        "tune_bits": best.tune_bits if best else None,
        "alpha": best.parameters.get("alpha") if best else None,
        "bounds": [plain(line.to_dict()) for line in reduction.lines],
        "mean_nll_nats": mean,
        "mean_nll_bits": mean / math.log(2),
        "perplexity": math.exp(min(mean, 700.0)),
        "bound_bits_per_byte": best.value * per_byte if best and best.value is not None and per_byte else None,
        "mean_nll_bits_per_byte": mean / math.log(2) * per_byte if per_byte else None,
    }


def best_loss_line(lines: tuple[Line, ...]) -> Line | None:
    """The loss line with the smallest value; all lines hold together, so the smallest may be quoted."""
    known = [(line.value, i) for i, line in enumerate(lines) if line.bounds_risk and line.value is not None]
    return lines[min(known)[1]] if known else None


def plain(tree: object) -> Any:
    """As it will look after a round trip through JSON."""
    return json.loads(json.dumps(tree, allow_nan=False))
