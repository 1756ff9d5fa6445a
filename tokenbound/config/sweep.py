"""Many configurations in one launch: what a sweep's config says, and the runs that come out of it.

Under the prior `code` with every token scored each artifact pays its own code, so all certificates of a sweep hold at
once. A sample, or a holdout, was drawn for all of them: there each artifact is a trial of its own; and everywhere each
changed claim is one. `evaluate` counts them in the register of draws beside the prepared corpus, where an ordinal once
given stays.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from tokenbound.config.run import CorpusConfig, PretrainConfig, RunConfig, validate
from tokenbound.errors import InputError, MismatchError
from tokenbound.store.run import canonical_json, sha256_hex

ARTIFACT = "model.tokenbound"
"""What a training run leaves in its output."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SweepHow(_Section):
    """Where and how fast the trials are made; may change when a sweep is resumed."""

    output: str
    """A local directory: one folder for each trial, the tables and the plot."""
    cache: str | None = None
    """Where prepared corpora are kept; null means `prepared/` inside the output."""
    parallel: int = Field(default=1, ge=1)
    """Trials under way at once. Their training and scoring share the cluster's processors and GPUs."""
    train: dict[str, Any] = {}
    """Further keys of `how` of `pretrain`, for every trial."""
    evaluate: dict[str, Any] = {}
    """Further keys of `how` of `evaluate`, for every trial."""
    ray_address: str | None = None
    """Ray cluster to join, HOST:PORT; null joins the surrounding one or starts a local one."""
    ray_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds after which a cluster that does not answer is given up."""


class SweepConfig(_Section):
    """One sweep: a base, and what each trial changes of it."""

    corpus: CorpusConfig
    """What every trial is trained and certified on."""
    train: dict[str, Any] | None = None
    """`what` of `pretrain` without the corpus: model, family, training, compress. Null: trials name a model to
    evaluate."""
    evaluate: dict[str, Any] = {}
    """`what` of `evaluate` without the corpus: windows, sample, bound; and model, where nothing is trained, or what is
    declared of a `train.base`."""
    trials: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """By name: dotted keys and what they become, e.g. `{train.family: {kind: lora, rank: 4}}`."""
    how: SweepHow


@dataclass(frozen=True)
class SweepEntry:
    """One configuration, ready to be run."""

    name: str
    training: PretrainConfig | None
    run: RunConfig
    identity: str
    """Names all that decides its certificate."""

    @property
    def folder(self) -> str:
        """Where it is kept."""
        return self.run.how.output.rpartition("/")[0]


def expand_entries(config: SweepConfig, known: Mapping[str, Mapping[str, Any]]) -> tuple[SweepEntry, ...]:
    """Every trial as validated configs, before anything is run.

    Args:
        config: the sweep.
        known: trials seen before, by name: their `identity`.

    Raises:
        InputError: a name or a key that cannot be used; the message names the trial.
        MismatchError: a trial that was seen before has another configuration now.
    """
    entries: list[SweepEntry] = []
    for name, changes in config.trials.items():
        entry = _entry(config, name, changes)
        if name in known and known[name]["identity"] != entry.identity:
            raise MismatchError(
                f"trial {name!r} of {config.how.output} had another configuration; give the new one a new name"
            )
        entries.append(entry)
    _refuse_shared_ordinals(entries)
    return tuple(entries)


def _refuse_shared_ordinals(entries: Sequence[SweepEntry]) -> None:
    """A number for several draws is none of them.

    Raises:
        InputError: two trials that share a sample or a holdout are given one ordinal.
    """
    given: dict[int, str] = {}
    for entry in entries:
        what = entry.run.what
        if what.bound.trial == "auto" or (what.sample.is_full and what.bound.prior == "code"):
            continue
        other = given.setdefault(what.bound.trial, entry.name)
        if other != entry.name:
            raise InputError(
                f"trials {other!r} and {entry.name!r}: evaluate.bound.trial {what.bound.trial} cannot number both; set "
                "it to auto, which counts them"
            )


def remember(entries: tuple[SweepEntry, ...], known: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`known` for the next start: what was known, and the new trials behind it in order."""
    found = {name: dict(entry) for name, entry in known.items()}
    for entry in entries:
        found.setdefault(entry.name, {"identity": entry.identity})
    return found


def _entry(config: SweepConfig, name: str, changes: Mapping[str, Any]) -> SweepEntry:
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
        raise InputError(f"trials: the name {name!r} must be letters, digits and . _ + -: it becomes a folder")
    tree: dict[str, Any] = {"train": copy.deepcopy(config.train), "evaluate": copy.deepcopy(config.evaluate)}
    for key, value in changes.items():
        _change(tree, key, value, name)
    output = str(Path(config.how.output).absolute())
    folder, origin = f"{output}/{name}", f"of trial {name!r}"
    cache = config.how.cache or f"{output}/prepared"
    corpus = config.corpus.model_dump()
    training = None
    if tree["train"] is not None:
        if tree["evaluate"].get("bound", {}).get("prior") == "holdout":
            raise InputError(f"trial {name!r}: prior `holdout`, but it is trained on these tokens; set train: null")
        how = {**config.how.train, "output": f"{folder}/training", "cache": cache}
        training = validate(PretrainConfig, {"what": {**tree["train"], "corpus": corpus}, "how": how}, origin=origin)
        declared = tree["evaluate"].get("model", {})
        if taken := declared.keys() & {"artifact", "checkpoint", "compress", "base"}:
            raise InputError(
                f"trial {name!r}: evaluate.model.{min(taken)} is what was trained; remove it, or set train: null"
            )
        base = {} if training.what.base is None else {"base": training.what.base}
        tree["evaluate"]["model"] = {**declared, **base, "artifact": f"{folder}/training/{ARTIFACT}"}
    how = {**config.how.evaluate, "output": f"{folder}/run", "cache": cache}
    run = validate(RunConfig, {"what": {**tree["evaluate"], "corpus": corpus}, "how": how}, origin=origin)
    identity = [None if training is None else training.what.model_dump(mode="json"), run.what.model_dump(mode="json")]
    return SweepEntry(name, training, run, sha256_hex(canonical_json(identity)))


def _change(tree: dict[str, Any], key: str, value: object, entry: str) -> None:
    """Set one dotted key.

    Raises:
        InputError: the key is not below `train` or `evaluate`.
    """
    *parents, leaf = key.split(".")
    if not parents or parents[0] not in ("train", "evaluate") or tree[parents[0]] is None:
        raise InputError(f"trial {entry!r}: {key!r} must begin with `train.` or `evaluate.`, as the base has them")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise InputError(f"trial {entry!r}: {key!r}: {parent!r} is not a section of the config")
    node[leaf] = copy.deepcopy(value)
