"""A forger who knows the format: what is edited is made consistent again, so that only its meaning is false."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenbound.api import Certificate
from tokenbound.certificate.derived import code_split, derived_fields
from tokenbound.certificate.identity import applied_protocol, fingerprint
from tokenbound.certificate.reduce import reduce_ledger, reduced_columns, shard_evidence
from tokenbound.certificate.verify import sampling_plan_beside
from tokenbound.corpus.windows import hashed_order
from tokenbound.store.losses import Losses, to_parquet
from tokenbound.store.run import (
    CommitRecord,
    RunDirectory,
    canonical_json,
    losses_sha256,
    scoring_environments,
    sha256_hex,
)

Tree = dict[str, Any]
Edit = Callable[["Forger"], None]


class Forger:
    """A copy of a finished run whose certificate and losses may be edited, and are then sealed again.

    Args:
        source: the finished run.
        folder: where the copy goes.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        shutil.copytree(source, folder)
        self.folder, self.run = folder, RunDirectory(str(folder))
        self.tree: Tree = json.loads((folder / "certificate.json").read_text())
        self.losses: list[Losses] = [
            self.run.losses(self.run.record(shard)) for shard in range(self.tree["num_shards"])
        ]
        records = [self.run.record(shard) for shard in range(self.tree["num_shards"])]
        self.environments = {record.shard: record.environment for record in records}
        self.signed_by: dict[int, str] = {
            record.shard: record.scoring_fingerprint
            for record in records
            if record.scoring_fingerprint != self.tree["scoring_fingerprint"]
        }
        """Shards whose records bear another fingerprint than the run's."""

    @property
    def path(self) -> Path:
        """The certificate's file."""
        return self.folder / "certificate.json"

    def set(self, path: str, value: Any) -> None:
        """Set a field, `a.b.c`; a function gets the old value."""
        *parents, last = path.split(".")
        node = self.tree
        for parent in parents:
            node = node[parent]
        node[last] = value(node.get(last)) if callable(value) else value

    def map_losses(self, change: Callable[[Losses], dict[str, Any]]) -> None:
        """Replace columns of every shard."""
        self.losses = [replace(each, **change(each)) for each in self.losses]

    def reorder(self) -> None:
        """Number the windows of a sample as the order that the identity now gives would draw them."""
        tree = self.tree
        self._seal_identities()
        order = hashed_order(
            tree["num_windows"],
            artifact_sha256=tree["artifact_sha256"],
            corpus_sha256=tree["corpus_sha256"],
            fingerprint=tree["scoring_fingerprint"],
            seed=tree["sampling"]["seed"],
            first=sum(len(each.window_id) for each in self.losses),
        )
        ends = np.cumsum([len(each.window_id) for each in self.losses])[:-1]
        numbers = np.split(order, ends)
        self.losses = [replace(each, window_id=ids) for each, ids in zip(self.losses, numbers, strict=True)]

    def seal(self) -> None:
        """Make digests, records, identities and every derived number follow from the edited tree and losses."""
        self._seal_identities()
        self._seal_losses()
        self._seal_numbers()
        self.write()

    def write(self) -> None:
        """Write the certificate as the tree says, consistent or not."""
        self.path.write_text(json.dumps(self.tree))

    def _seal_identities(self) -> None:
        tree = self.tree
        for name in ("artifact_sha256", "corpus_sha256", "tokens_sha256"):
            tree["scoring_identity"][name] = tree[name]
        tree["scoring_fingerprint"] = fingerprint(tree["scoring_identity"])
        tree["claim_identity"]["scoring_fingerprint"] = tree["scoring_fingerprint"]
        for name in ("methods", "top_k", "delta", "trial", "unscorable", "declarations"):
            tree["claim_identity"][name] = tree[name]
        tree["claim_fingerprint"] = fingerprint(tree["claim_identity"])

    def _seal_losses(self) -> None:
        tree, run, records = self.tree, self.run, []
        for shard, losses in enumerate(self.losses):
            data, name = to_parquet(losses), run.shard_file("losses", shard, ".parquet")
            run.write(name, data)
            evidence = json.loads(shard_evidence(losses, tree["vocab_size"], tuple(tree["top_k"])).to_json())
            record = CommitRecord(
                shard=shard,
                file=name,
                bytes=len(data),
                sha256=sha256_hex(data),
                windows=len(losses.window_id),
                tokens=losses.num_tokens,
                unscored_windows=int(losses.unscored.sum()),
                evidence=evidence,
                scoring_fingerprint=self.signed_by.get(shard, tree["scoring_fingerprint"]),
                environment=self.environments.get(shard),
            )
            run.write(run.shard_file("shards", shard), canonical_json(asdict(record)))
            records.append(record)
        tree["num_shards"], tree["losses_sha256"] = len(records), losses_sha256(records)
        tree["environment"]["scored_by"] = scoring_environments(records)
        shapes = [(record.batch, record.windows) for record in records]
        tree["protocol"] = applied_protocol(tree["scoring_identity"]["protocol"], shapes)

    def _seal_numbers(self) -> None:
        tree = self.tree
        tree["code_split"] = code_split(len(self.run.read("artifact.tokenbound")), tree["protocol"])
        paid = 0.0 if tree["prior"] == "holdout" else math.fsum(tree["code_split"].values())
        tree["code_length_bits"], tree["random_guess_bits"] = paid, math.log2(tree["tokenizer_vocab_size"])
        left = tree["sampling"]["scored_windows"] if tree["sampling"] else tree["num_windows"]
        tree["num_scored_tokens"] = 0
        for losses in self.losses:
            count = min(left, len(losses.window_id))
            tree["num_scored_tokens"] += int(losses.offsets[count])
            left -= count
        certificate = Certificate.model_validate(tree)
        ledger = replace(certificate.ledger(self.run.uri), columns=reduced_columns(certificate.claim()))
        reduction = reduce_ledger(ledger, certificate.claim(), sampling_plan_beside(certificate, self.run.uri))
        tree |= derived_fields(reduction, certificate.claim(), tree["corpus"].get("bytes_per_token"))


def improved_ranks(losses: Losses, share: float, top_k: Sequence[int] = (100, 10, 1)) -> dict[str, Any]:
    """Ranks just below each k for one token and some share of every window's."""
    rank = losses.rank.copy()
    for start, stop in zip(losses.offsets, losses.offsets[1:], strict=False):
        for k in top_k:
            worse = np.flatnonzero(rank[start:stop] >= k)
            rank[start + worse[: int(1 + share * (stop - start))]] = k - 1
    return {"rank": rank}
