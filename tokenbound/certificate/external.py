"""Bounds from losses that another tool recorded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenbound.bounds.claim import DEFAULT_METHODS, Claim
from tokenbound.bounds.decisions import TreeChoice
from tokenbound.bounds.lines import LINES, bound_named, find_bound, method_names, scores_decisions
from tokenbound.certificate.derived import plain
from tokenbound.certificate.identity import DEFAULT_PROTOCOL, protocol_bits
from tokenbound.certificate.reduce import (
    ForeignLedger,
    Ledger,
    RunLedger,
    full_evidence,
    reduce_ledger,
    reduced_columns,
)
from tokenbound.errors import InputError, MismatchError
from tokenbound.store.external_losses import common_columns, find_row_groups, named_windows
from tokenbound.store.run import PLAN, RunDirectory, canonical_json
from tokenbound.store.uri import base_name, split

TOP_K = (1, 10, 100)
"""The top-k errors that are bounded where ranks were stored."""


def bound_losses(
    path: str,
    *,
    vocab_size: int,
    tokenizer_vocab_size: int,
    code_length_bits: float,
    delta: float = 0.05,
    method: str = "all",
    trial: int = 1,
    protocol: Mapping[str, Any] | None = None,
    online: bool = False,
) -> list[dict[str, Any]]:
    """Every line that these losses allow, as plain data.

    Args:
        path: Parquet file, directory of them, or a run directory (then its commit records are followed).
        vocab_size: V.
        tokenizer_vocab_size: V_tok.
        code_length_bits: L(h); of the model alone where the protocol is given, else with the protocol's bits.
        delta: failure probability of all lines together.
        method: `azuma`, `freedman`, `kl`, a bound that an installed package provides, or `all` of the first three; of a
            run that recorded decisions also `bits`.
        trial: ordinal of this claim among all tried on these tokens, from 1.
        protocol: how the model was applied (:func:`given_protocol`); the bits of its code are added.
        online: the losses are those of a training run that predicted each token before it learned from it, in one pass.
            No code is paid, and the lines bound the risk of the sequence of models, not of its last one.

    Raises:
        InputError: no readable `nll`, or an unknown method.
        MismatchError: losses that are NaN, infinite, negative, outside the vocabulary, or of a window given twice.

    >>> import tempfile
    >>> import pyarrow as pa, pyarrow.parquet as pq
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pq.write_table(pa.table({"nll": [0.5, 1.5] * 50_000}), f"{folder}/losses.parquet")
    ...     what = {"vocab_size": 257, "tokenizer_vocab_size": 257, "code_length_bits": 1e4}
    ...     lines = bound_losses(f"{folder}/losses.parquet", **what, method="azuma")
    >>> lines[0]["method"], lines[0]["empirical"] < lines[0]["value"] < lines[0]["random_guess"]
    ('azuma', True)
    """
    _require_method(method)
    applied = 0 if protocol is None else protocol_bits(dict(protocol))
    ledger, columns = open_ledger(path, vocab_size)
    evidence, tree = full_evidence(ledger, TOP_K), recorded_tree(ledger)
    claim = Claim(
        vocab_size=vocab_size,
        tokenizer_vocab_size=tokenizer_vocab_size,
        code_length_bits=code_length_bits + applied,
        delta=delta,
        num_tokens=evidence.num_tokens + evidence.worst_case_tokens,
        top_k=TOP_K,
        methods=_all_methods(tree) if method == "all" else (method,),
        trial=trial,
        prior="online" if online else "code",
        has_entropy="entropy" in columns,
        has_rank="rank" in columns,
        tree=None if tree is None else tree.name,
        tree_lengths=None if tree is None else tree.lengths,
    )
    if isinstance(ledger, RunLedger):
        ledger = replace(ledger, columns=reduced_columns(claim))
    return [plain(line.to_dict()) for line in reduce_ledger(ledger, claim, evidence=evidence).lines]


def recorded_tree(ledger: Ledger) -> TreeChoice | None:
    """The tree along which a run recorded decisions; None where it did not, and of other tools' losses."""
    if not isinstance(ledger, RunLedger) or not RunDirectory(ledger.uri).exists(PLAN):
        return None
    named = RunDirectory(ledger.uri).plan().get("scoring_identity", {}).get("tree")
    return None if named is None else TreeChoice.from_dict(named if isinstance(named, dict) else {"name": named})


def _all_methods(tree: TreeChoice | None) -> tuple[str, ...]:
    plain_methods = tuple(name for name in DEFAULT_METHODS if not scores_decisions((name,)))
    return plain_methods if tree is None else (*plain_methods, "bits")


def given_protocol(text: str) -> dict[str, Any]:
    """The protocol that a user describes: the package's default, changed where it says so.

    Args:
        text: `default`, a JSON object, or the path of a file that holds one.

    Raises:
        InputError: not JSON, or a key or value that no protocol has.

    >>> given_protocol('{"length": 2048, "stride": 2048}')["length"]
    2048
    """
    if text.strip() == "default":
        return dict(DEFAULT_PROTOCOL)
    source = text
    if not text.lstrip().startswith("{"):
        try:
            source = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise InputError(f"--protocol {text}: give `default`, a JSON object, or a file that holds one") from None
    try:
        changes = json.loads(source)
    except json.JSONDecodeError as error:
        usual = canonical_json(DEFAULT_PROTOCOL).decode()
        raise InputError(f"--protocol is not JSON ({error}); write it like {usual}") from None
    if not isinstance(changes, dict):
        raise InputError('--protocol must be a JSON object such as {"length": 2048}')
    for name, value in changes.items():
        if name not in DEFAULT_PROTOCOL:
            raise InputError(f"--protocol: unknown key {name!r}; the keys are {', '.join(DEFAULT_PROTOCOL)}")
        default = DEFAULT_PROTOCOL[name]
        if type(value) is not type(default) or (type(value) is int and value < 1):
            raise InputError(f"--protocol: {name} is {value!r}; give a value such as {json.dumps(default)}")
    # Windows do not overlap unless a stride is given.
    return {**DEFAULT_PROTOCOL, "stride": changes.get("length", DEFAULT_PROTOCOL["stride"]), **changes}


def _require_method(method: str) -> None:
    """Accept `all` and every bound that needs nothing but losses token by token.

    Raises:
        InputError: the method is another.
    """
    found = None if method == "all" else find_bound(method)
    if method != "all" and (found is None or not found.shares_pass):
        known = [name for name in method_names() if name not in LINES.built_in or bound_named(name).shares_pass]
        raise InputError(f"--method {method!r} must be one of {', '.join(known)} or all")


def open_ledger(path: str, vocab_size: int) -> tuple[Ledger, tuple[str, ...]]:
    """The losses at a path and which columns they have.

    Where commit records exist they are followed, never a listing of files.
    """
    for root in (path, *([split(path)[0]] if base_name(path) == "losses" else [])):
        run = RunDirectory(root)
        if run.exists("shards"):
            if run.exists("plan.json") and run.plan().get("scoring_identity", {}).get("sampled"):
                raise InputError(
                    f"{root} holds a sample of its corpus, which `bound` would take for the whole; use its certificate"
                )
            records = run.committed()
            if sorted(records) != list(range(len(records))) or not records:
                raise InputError(f"{root}: shards are missing; finish the run first")
            _refuse_missing(run, sum(record.windows for record in records.values()))
            _refuse_repeated((record.file, run.losses(record, ("position",)).window_id) for record in records.values())
            names = tuple({record.scoring_fingerprint for record in records.values()})
            ledger = RunLedger(root, len(records), names[0], vocab_size, earlier_fingerprints=names[1:])
            return ledger, ("nll", "entropy", "rank")
    groups = find_row_groups(path)
    columns = common_columns(groups)
    _refuse_gaps(_refuse_repeated(named_windows(groups)))
    return ForeignLedger(groups, vocab_size), columns


def _refuse_missing(run: RunDirectory, windows: int) -> None:
    """A run whose last shards are not scored is not the corpus that it planned.

    Raises:
        InputError: fewer windows are committed than planned.
    """
    planned = run.plan().get("num_windows", windows) if run.exists("plan.json") else windows
    if windows < planned:
        raise InputError(
            f"{run.uri}: shards are missing ({windows} of {planned} windows are there); finish the run first"
        )


def _refuse_gaps(ids: NDArray[np.int64]) -> None:
    """Windows whose numbers leave none out, from 0 or 1 on, are all there, as far as numbers can tell.

    Raises:
        MismatchError: a number is left out.
    """
    if not ids.size:
        return
    before = np.concatenate([[min(ids[0], 1) - 1], ids[:-1]])
    gaps = np.flatnonzero(ids - before > 1)
    if gaps.size:
        raise MismatchError(
            f"window_id {before[gaps[0]] + 1} is missing, though {ids[gaps[0]]} is there; give all files, or leave out "
            "the column `window_id` if its numbers do not count windows"
        )


def _refuse_repeated(windows: Iterable[tuple[str, NDArray[np.int64]]]) -> NDArray[np.int64]:
    """Each window counts once among all files.

    Returns:
        The ids in ascending order.

    Raises:
        MismatchError: an id stands twice.
    """
    named = list(windows)
    ids = np.sort(np.concatenate([part for _, part in named] or [np.zeros(0, np.int64)]))
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if repeated.size:
        holders = dict.fromkeys(name for name, part in named if (part == repeated[0]).any())
        raise MismatchError(f"window_id {repeated[0]} stands twice (in {', '.join(holders)}); give each window once")
    return ids
