"""Running a sweep: trials as plain Ray tasks, each resumable, and a comparison of their certificates."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from tokenbound.certificate.record import CertificateRecord
from tokenbound.config.sweep import SweepConfig, SweepEntry, expand_entries, remember
from tokenbound.engine.cluster.executor import executor
from tokenbound.engine.cluster.session import plain_errors
from tokenbound.engine.corpus import check_corpus, open_corpus
from tokenbound.engine.evaluate.preparation import check_model, check_run
from tokenbound.engine.evaluate.run import evaluate
from tokenbound.engine.train.run import check_training, pretrain
from tokenbound.errors import IncompleteError, InputError, TokenboundError
from tokenbound.report.sweep_report import (
    ROWS,
    SweepRow,
    comparison_csv,
    comparison_markdown,
    comparison_svg,
    sweep_row,
    write_sweep,
)
from tokenbound.store.run import RunDirectory
from tokenbound.store.uri import is_uri

logger = logging.getLogger(__name__)

LEDGER = "trials.json"
RESULT = "result.json"


def sweep(config: SweepConfig) -> list[SweepRow]:
    """Run what is not yet done of a sweep; write `sweep.html`, `.md`, `.csv`, `.json` and `.svg`.

    A trial that fails does not stop the others.

    Returns:
        A row for each trial, in the order of the config.

    Raises:
        InputError: a trial's config cannot be used; found before the first trial begins.
        MismatchError: a trial changed since it was first seen.
        IncompleteError: trials failed; the tables show the others.
    """
    if is_uri(config.how.output):
        raise InputError(f"how.output {config.how.output}: a sweep trains into a local or shared directory")
    directory = RunDirectory(str(Path(config.how.output).absolute()))
    known = directory.read_json(LEDGER) if directory.exists(LEDGER) else {}
    entries = expand_entries(config, known)
    for entry in entries:
        _check(entry)
    directory.write_json(LEDGER, remember(entries, known))
    with executor().session(config.how.ray_address, config.how.ray_timeout_s):
        _prepare_once(config)
        failures = dict(_run_all(entries, config.how.parallel))
    rows = [_row(entry, directory) for entry in entries if entry.name not in failures]
    _write_tables(directory, rows)
    if failures:
        shown = "; ".join(f"{name}: {message}" for name, message in failures.items())
        raise IncompleteError(f"{len(failures)} of {len(entries)} trials failed ({shown}); run again to resume")
    return rows


def _check(entry: SweepEntry) -> None:
    """Refuse a trial that cannot be trained or scored, as far as it shows without Ray.

    Raises:
        InputError, MismatchError: the message names the trial.
    """
    if _is_done(entry):
        return
    try:
        if entry.training is None:
            check_run(entry.run)
        elif (architecture := check_training(entry.training)) is not None:
            check_model(architecture, check_corpus(entry.run.what.corpus).max_id, entry.run.what.windows.length)
    except TokenboundError as error:
        raise type(error)(f"trial {entry.name!r}: {error}") from None


def _is_done(entry: SweepEntry) -> bool:
    directory = RunDirectory(entry.folder)
    return directory.exists(RESULT) and directory.read_json(RESULT)["identity"] == entry.identity


def _prepare_once(config: SweepConfig) -> None:
    """Tokenise before the trials begin, so that they do not do it side by side."""
    cache = config.how.cache or f"{Path(config.how.output).absolute()}/prepared"
    open_corpus(config.corpus, output=config.how.output, cache=cache)


def _run_all(entries: tuple[SweepEntry, ...], parallel: int) -> Iterator[tuple[str, str]]:
    """Run the trials, some at a time; yields (name, message) of each that failed.

    A trial's task only waits for the training and scoring that it starts, so it reserves no processor itself.
    """
    share = max(1, executor().resources().cpus // parallel)
    task = ray.remote(num_cpus=0, max_retries=0)(_run_entry)
    waiting = list(entries)
    under_way: dict[Any, str] = {}
    while waiting or under_way:
        while waiting and len(under_way) < parallel:
            entry = waiting.pop(0)
            logger.info("trial %s begins", entry.name)
            under_way[task.remote(entry, share, Path.cwd())] = entry.name
        done, _ = ray.wait(list(under_way), num_returns=1)
        name = under_way.pop(done[0])
        try:
            with plain_errors():
                logger.info("trial %s: %s", name, ray.get(done[0]))
        except (TokenboundError, ray.exceptions.RayError) as error:
            message = str(error).strip().splitlines()[-1]
            logger.warning("trial %s failed: %s", name, message)
            yield name, message


def _run_entry(entry: SweepEntry, threads: int, here: Path) -> str:
    """Train, encode, score and certify one trial; says the bound. Runs in a task of its own."""
    if here.is_dir():
        os.chdir(here)  # relative paths of the config mean what they mean where the sweep was started
    if _is_done(entry):
        return "already done"
    trained = None
    if entry.training is not None:
        how = entry.training.how
        shared = how.model_copy(update={"threads": threads}) if how.threads == "auto" else how
        trained = asdict(pretrain(entry.training.model_copy(update={"how": shared})))
    how_run = entry.run.how
    if how_run.replicas == "auto" and not executor().resources().gpus:
        how_run = how_run.model_copy(update={"replicas": threads})
    paths: list[str] = []
    certificate = evaluate(
        entry.run.model_copy(update={"how": how_run}), on_certificate=lambda _, path: paths.append(path)
    )
    RunDirectory(entry.folder).write_json(
        RESULT, {"identity": entry.identity, "certificate": paths[0], "trained": trained}
    )
    return f"{certificate.artifact_bytes:,} bytes, bound {certificate.bound_bits} bits/token"


def _row(entry: SweepEntry, home: RunDirectory) -> SweepRow:
    result = RunDirectory(entry.folder).read_json(RESULT)
    family = "given" if entry.training is None else entry.training.what.family.kind
    path = result["certificate"]
    return sweep_row(entry.name, family, result["trained"], CertificateRecord.load(path), home.relative(path))


def _write_tables(directory: RunDirectory, rows: list[SweepRow]) -> None:
    tree: list[dict[str, Any]] = [row.to_dict() for row in rows]
    directory.write(ROWS, json.dumps(tree, indent=2).encode() + b"\n")
    directory.write("sweep.md", comparison_markdown(rows).encode())
    directory.write("sweep.csv", comparison_csv(rows).encode())
    if rows:
        directory.write("sweep.svg", comparison_svg(rows).encode())
        write_sweep(directory, rows)
