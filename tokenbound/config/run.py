"""The run config: one YAML file, validated into typed models that refuse unknown keys.

``what`` decides the certificate and is fingerprinted; ``how`` decides only where and how fast the work is
done and may change when a run is resumed. Nothing that decides a certificate has a silent default: whether
the tokenizer is given or counted, and the BOS/EOS rule, must be written down.

The keys of ``what.corpus`` are described in `tokenbound.corpus.sources.fields`, those of ``compress`` in
`tokenbound.compression.methods`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tokenbound.bounds.claim import DEFAULT_METHODS
from tokenbound.bounds.decisions import TreeName
from tokenbound.bounds.lines import bound_named, require_method, scores_decisions
from tokenbound.bounds.lines.base import Setting
from tokenbound.compression.methods import METHODS, CompressionMethod, built_in_methods
from tokenbound.config.compress import CompressSettings, LosslessSettings
from tokenbound.config.family import DenseFamily, Family
from tokenbound.corpus.config import CorpusConfig as CorpusConfig
from tokenbound.corpus.sources.fields import is_utf8
from tokenbound.errors import InputError
from tokenbound.gguf_file import ENDING, IN_REPOSITORY
from tokenbound.limits import MAX_SHARD_TOKENS
from tokenbound.store.sections import of_unions
from tokenbound.store.strict_json import StrictJsonError, check_tree
from tokenbound.store.strict_yaml import StrictYamlError, as_json, parse_yaml
from tokenbound.store.uri import is_uri, refuse_credentials, refuse_credentials_in, texts_in

T = TypeVar("T", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(_Section):
    """The hypothesis: an artifact, or a checkpoint that is encoded into one before it is scored."""

    artifact: str | None = None
    """Path of an artifact made by `compress` or `pretrain`; `demo` is the one shipped inside the package."""
    checkpoint: str | None = None
    """Directory or hub id of a Hugging Face causal language model with safetensors weights, or a GGUF file of
    llama.cpp; of a split one the first part."""
    revision: str | None = None
    """Of a `checkpoint` on the hub: the commit, tag or branch; null means the newest. The same as `@revision` behind
    the id."""
    file: str | None = None
    """Of a `checkpoint` that is a directory or hub id: the GGUF file in it to read."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the model body; losses are always computed in float32 or better. Part of the protocol."""
    compress: CompressSettings | None = None
    """How a checkpoint becomes an artifact; absent means `lossless`."""
    base: str | None = None
    """Of a fine-tune that is given as a delta: directory or hub id of the checkpoint that it changes, or path of its
    artifact. A `checkpoint`, or the directory of a LoRA adapter, is then encoded as a delta on it."""
    base_is_independent: str | None = None
    """How the base was fixed without regard to the scored tokens, in your words; required with `base`, printed on the
    certificate."""
    num_bases: int = Field(default=1, ge=1)
    """Where the base was picked after seeing the scored tokens: out of how many, each fixed without regard to them."""

    @property
    def checkpoint_place(self) -> str:
        """`checkpoint` with `revision` and `file`, in the form that readers of checkpoints take."""
        assert self.checkpoint is not None, "an artifact has no checkpoint"
        named = self.checkpoint if self.revision is None else f"{self.checkpoint}@{self.revision}"
        if self.file is None:
            return named
        is_folder = is_uri(named) or Path(named).expanduser().is_dir()
        return f"{named.rstrip('/')}/{self.file}" if is_folder else f"{named}{IN_REPOSITORY}{self.file}"

    @property
    def bases_tried(self) -> int:
        """M, 0 where there is no base."""
        return 0 if self.base is None else self.num_bases

    @model_validator(mode="after")
    def _declared_base(self) -> Self:
        if self.base is not None and not self.base_is_independent:
            raise ValueError("`base` needs `base_is_independent`: say how it was fixed without regard to these tokens")
        if self.base is None and (self.base_is_independent is not None or self.num_bases != 1):
            raise ValueError("`base_is_independent` and `num_bases` speak of a `base`; name it")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.artifact is None) == (self.checkpoint is None):
            raise ValueError("give exactly one of `artifact` and `checkpoint`")
        if self.compress is not None and self.checkpoint is None:
            raise ValueError("`compress` applies to a `checkpoint`; an artifact is already compressed")
        return self

    @model_validator(mode="after")
    def _place_fits(self) -> Self:
        for key, value in (("revision", self.revision), ("file", self.file)):
            if value is not None and self.checkpoint is None:
                raise ValueError(f"`{key}: {value}` applies to a `checkpoint`; remove it beside an artifact")
        named = self.checkpoint or ""
        is_local = is_uri(named) or named.startswith(("/", ".", "~")) or Path(named).exists()
        if self.revision is not None and (is_local or "@" in named):
            raise ValueError(
                f"`revision: {self.revision}` applies to a hub id without `@`, not to {named!r}; remove it"
            )
        if self.file is not None and (not self.file.endswith(ENDING) or named.endswith(ENDING)):
            raise ValueError(
                f"`file: {self.file}` names a GGUF file in a directory or hub id; {named!r} is read without"
            )
        return self


class CompressChoice(_Section):
    """One method of compression."""

    compress: CompressSettings
    """The method and its options."""


class WindowsConfig(_Section):
    """What each forward pass sees."""

    length: int = Field(default=512, ge=1)
    """Inputs, and so predictions, of one window."""
    context: Literal["packed", "document"] = "document"
    """`packed`: contiguous windows over the whole stream. `document`: no window crosses a document."""
    stride: int | None = Field(default=None, ge=1)
    """Distance between window starts; null means `length`. Smaller strides give longer contexts at a higher cost."""
    batch: int = Field(default=16, ge=1)
    """Windows per forward pass; part of the plan, so that a loss never depends on how many actors ran."""
    shard_tokens: Literal["auto"] | int = "auto"
    """Scored tokens per shard, the unit of commit and retry. `auto`: m/64 clamped to [2^14, 2^19]."""

    @model_validator(mode="after")
    def _stride_fits(self) -> Self:
        if self.stride is not None and self.stride > self.length:
            raise ValueError(f"stride {self.stride} exceeds length {self.length}: tokens would be left out")
        if self.shard_tokens != "auto" and not 1 <= self.shard_tokens <= MAX_SHARD_TOKENS:
            raise ValueError(f"shard_tokens must be 1 to {MAX_SHARD_TOKENS:,}")
        return self


class SampleConfig(_Section):
    """Scoring a uniform sample of windows instead of all of them."""

    windows: int | None = Field(default=None, ge=1)
    """How many windows to score; null scores everything unless `until_slack_bits` is set."""
    seed: int = Field(default=0, ge=0)
    """Seed of the hashed order in which windows are drawn."""
    until_slack_bits: float | None = Field(default=None, gt=0)
    """Stop at the first complete prefix of the order at which the sampling slack of every line that bounds the loss is
    at most this many bits per token."""
    pilot_windows: int = Field(default=256, ge=1)
    """First windows of the order; they choose the grid point and stay outside the sequence."""
    evaluation: int | None = Field(default=None, ge=1)
    """In a growing corpus, the ordinal of this draw: it spends 1/(j(j+1)) of the sampling's share of delta, and
    configurations need not be counted anew at every length. `reevaluate` counts by itself. Null: a draw from a grown
    corpus is counted behind all draws before (`bound.trial`)."""
    control_variates: Literal["auto", "none"] = "auto"
    """`auto`: the sampling error is computed on what n-grams of the corpus itself do not explain of each window; a run
    that was begun without goes on without. `none`: on the windows' sums as they are."""

    @model_validator(mode="after")
    def _more_than_a_pilot(self) -> Self:
        if self.windows is not None and self.windows <= self.pilot_windows:
            raise ValueError(
                f"`windows` {self.windows} must exceed `pilot_windows` {self.pilot_windows}; draw more or shorten the "
                "pilot"
            )
        return self

    @property
    def is_full(self) -> bool:
        """Whether every window is scored."""
        return self.windows is None and self.until_slack_bits is None

    @property
    def has_controls(self) -> bool:
        """Whether control variates are used."""
        return not self.is_full and self.control_variates != "none"

    @property
    def has_budgets(self) -> bool:
        """Whether windows have a budget, in the bounds that know one."""
        return not self.is_full


class BoundConfig(_Section):
    """The claim: fixed before anything is scored."""

    delta: float = Field(default=0.05, gt=0, lt=1)
    """Probability that any of the printed lines fails."""
    prior: Literal["code", "holdout"] = "code"
    """`code`: pay for the artifact's bits. `holdout`: the hypothesis was chosen without the scored tokens."""
    holdout_declaration: str | None = None
    """For `holdout`: what these tokens were not used for, in your words; printed on the certificate."""
    trial: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Ordinal of this configuration among all tried on these tokens; each pays for those before it. `auto` counts in
    the register of draws, `draws/` beside the prepared corpora (`how.cache`). A number below the register's is
    refused; give one where configurations were tried that the register does not know of."""
    methods: tuple[Annotated[str, AfterValidator(require_method)], ...] = (*DEFAULT_METHODS, "bits")
    """Which bounds to compute, named before scoring; all of them hold together, and each is charged for the others.
    `bits` takes the binary decisions of a token for steps. `document` is the older baseline that assumes i.i.d.
    documents. Both bound other risks and are never the bound quoted. Installed packages may provide more."""
    top_k: tuple[Annotated[int, Field(ge=1)], ...] = (1, 10, 100)
    """Top-k errors that `kl` bounds."""
    tree: Literal["auto"] | TreeName = "auto"
    """Tree whose binary decisions `bits` takes for steps. `zipf`: ids in their order, halved by the weights
    1 / (id + 10). `balanced`: halved by number. `counts`: by how often they occur in the corpus as it is when first
    scored; the code lengths are charged. `auto`: `counts` if that corpus has at least 10,000 tokens for each id of the
    vocabulary, else `zipf`."""
    declared_tokens: int | None = Field(default=None, ge=1)
    """Number of tokens declared before the data was seen; allows azuma's fixed-m form when it is exactly met."""
    unscorable: Literal["refuse", "worst_case"] = "refuse"
    """What a window without a finite loss does: stop the certificate, or count at the worst-case loss."""

    @property
    def ordinal(self) -> int:
        """The trial as a number; `auto` is the first until a register has counted it (see :meth:`numbered`)."""
        return 1 if self.trial == "auto" else self.trial

    def numbered(self, ordinal: int) -> Self:
        """The same claim with its trial as it was counted."""
        return self.model_copy(update={"trial": ordinal})

    @model_validator(mode="after")
    def _declared(self) -> Self:
        if self.prior == "holdout" and not self.holdout_declaration:
            raise ValueError("prior `holdout` needs `holdout_declaration`: say what these tokens were not used for")
        if len(set(self.methods)) != len(self.methods) or not self.methods:
            raise ValueError("`methods` must name at least one method, each once")
        if not any(bound_named(name).stands_alone for name in self.methods):
            raise ValueError(f"method `{self.methods[0]}` does not bound the risk of a token; name freedman beside it")
        if len(set(self.top_k)) != len(self.top_k):
            raise ValueError("`top_k` must not repeat a value")
        if self.tree != "auto" and not self.scores_decisions:
            raise ValueError(f"`tree: {self.tree}` is that of the method bits; add it to `methods` or remove `tree`")
        return self

    @property
    def scores_decisions(self) -> bool:
        """Whether the decisions of every token are recorded."""
        return scores_decisions(self.methods)


class WhatConfig(_Section):
    """Everything that decides the certificate."""

    model: ModelConfig
    corpus: CorpusConfig
    windows: WindowsConfig = WindowsConfig()
    sample: SampleConfig = SampleConfig()
    bound: BoundConfig = BoundConfig()

    @model_validator(mode="after")
    def _methods_fit(self) -> Self:
        errors_only = self.model.base is None and not any(bound_named(name).bounds_risk for name in self.bound.methods)
        if self.sample.until_slack_bits is not None and errors_only:
            raise ValueError("`sample.until_slack_bits` needs a loss line; add freedman or azuma to `bound.methods`")
        method = self.model.compress
        if self.bound.prior == "holdout" and method is not None and method.needs_calibration:
            raise ValueError(
                f"prior `holdout`: method {method.name!r} of `model.compress` would look at the scored "
                "tokens; encode the checkpoint first with `tokenbound compress --config` on other tokens, and name the "
                "artifact"
            )
        objection = self.objection()
        if objection is not None:
            raise ValueError(f"method {objection}")
        return self

    def objection(self, times_grown: int = 0) -> str | None:
        """The first method of `bound.methods` that cannot be used and the reason; None where all can.

        Args:
            times_grown: how often the corpus has grown.
        """
        setting = Setting(self.windows.context, sampled=not self.sample.is_full, times_grown=times_grown)
        found = [(name, bound_named(name).objection(setting)) for name in self.bound.methods]
        return next((f"`{name}` {reason}" for name, reason in found if reason is not None), None)


class HowConfig(_Section):
    """Where and how fast the work is done; never part of a fingerprint."""

    output: str
    """The run directory: a path or an s3:// or gs:// URI."""
    cache: str | None = None
    """Where prepared corpora are kept; null means `prepared/` beside the run directory."""
    local_folder: str | None = None
    """A folder on every machine for artifacts fetched from a store, and for decoded or packed weights that its replicas
    share; null means one below the system's folder for temporary files. What it lies in must exist on every machine."""
    replicas: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Scoring actors; `auto` takes one per GPU, or per processor without one, and more as nodes join the cluster."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where replicas run. `auto`: on GPUs where the cluster has one at the start; `cuda` also waits for GPUs that an
    autoscaler brings."""
    gpus_per_replica: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """GPUs over which one replica is spread, whole layers on each; `auto`: as few as its predicted memory needs. They
    must be on one node."""
    weights: Literal["auto", "dense", "packed", "streamed"] = "auto"
    """How a replica holds its weights; losses do not depend on it. `dense`: all of them in memory. `packed`: the codes
    of an artifact in memory, which the replicas of a machine share, and the weights of one layer at a time. `streamed`:
    one layer at a time, made once per shard from codes on the disk, while the one before it computes. `auto`: the first
    of these that fits."""
    compile: bool = False
    """Fuse the passes over the logits with `torch.compile`: faster at large vocabularies, a minute slower to start."""
    retries: int = Field(default=3, ge=0)
    """How often a shard may lose its actor before the run gives up."""
    store_tokens: bool = True
    """Keep the `token` column in the losses. It is a copy of the corpus: think before sharing a run."""
    progress_interval_s: float = Field(default=30.0, gt=0)
    """Seconds between progress lines where there is no terminal."""
    ray_address: str | None = None
    """Ray cluster to join, HOST:PORT; null joins the surrounding one or starts a local one."""
    ray_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds after which a cluster that does not answer is given up."""

    @model_validator(mode="after")
    def _layers_are_on_one_gpu(self) -> Self:
        if self.weights in ("packed", "streamed") and self.gpus_per_replica not in ("auto", 1):
            raise ValueError(
                f"gpus_per_replica is {self.gpus_per_replica}, but with `weights: {self.weights}` a replica runs on "
                "one GPU; set gpus_per_replica to 1, or weights to dense"
            )
        return self


class RunConfig(_Section):
    """One evaluation."""

    what: WhatConfig
    how: HowConfig


class TrainingConfig(_Section):
    """How long and how fast to train."""

    tokens: int = Field(ge=1)
    """Training tokens in all."""
    window: int = Field(default=512, ge=2)
    """Inputs of one training window."""
    batch: int = Field(default=16, ge=1)
    """Windows per optimizer step and worker."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the updates of the inner matrices (AdamW for the rest)."""
    lr: float = Field(default=3e-3, gt=0)
    """Peak learning rate of the inner matrices."""
    embedding_lr: float = Field(default=3e-3, gt=0)
    """Peak learning rate of embeddings, norms and biases."""
    warmup: float = Field(default=0.02, ge=0, le=1)
    """Share of the steps with a rising learning rate; it falls linearly to zero afterwards."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of the matrices."""
    clip: float = Field(default=1.0, gt=0)
    """Gradient norm at which gradients are clipped."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights and of the order of the data."""


class FinishConfig(TrainingConfig):
    """How long and how fast to train an artifact on its grid, and what a bit of its code is worth meanwhile."""

    nats_per_bit: float | None = Field(default=None, ge=0)
    """Price of a bit of code in nats of mean loss; null asks the freedman bound. A higher price makes smaller
    artifacts."""
    coarser: dict[str, int] = {}
    """Half octaves by which the steps of tensors are widened before training, by a text in their names; of several the
    longest counts. A short training moves steps little, so this decides the size."""


class PretrainWhat(_Section):
    """Everything that decides the trained model."""

    model: dict[str, Any] = {}
    """A Hugging Face causal LM config, to train from random weights: `model_type` and its keyword arguments. The family
    `markov` has none."""
    start: str | None = None
    """A checkpoint to start from instead."""
    base: str | None = None
    """A checkpoint or artifact on which the family `lora` trains an adapter, itself unchanged. The artifact is then a
    delta that pays for the adapter alone; runs that score it declare `model.base` and how it was fixed."""
    artifact: str | None = None
    """Path of an artifact to start from instead: its grid is trained further by `finish`."""
    family: Family = DenseFamily()
    """What is trained of it: `kind` (dense, lora, sublora, kronecker, monarch; or markov) and its options."""
    corpus: CorpusConfig
    training: TrainingConfig | None = None
    """How a network is trained; the family `markov` counts the whole corpus instead, and a checkpoint under `start` may
    be compressed and finished as it is."""
    compress: CompressSettings | None = None
    """How the trained weights become an artifact; null means `lossless`."""
    finish: FinishConfig | None = None
    """Quantization-aware training of the artifact on the bound (see `training.qat`); null leaves it as compressed."""
    smoothing_head: Literal["freedman", "azuma"] | None = None
    """Train a linear head that predicts how far each prediction is smoothed, on this bound, and put it into the
    artifact; the certificate then prints freedman and azuma as it smooths, beside freedman at the best fixed alpha and
    at the best alpha(H)."""

    @model_validator(mode="after")
    def _adapters_are_lora(self) -> Self:
        if self.base is None:
            return self
        if self.family.kind != "lora" or self.model or self.start is not None or self.artifact is not None:
            raise ValueError(
                "`base` brings the model, and `family.kind: lora` trains on it; leave `model`, `start`, `artifact` out"
            )
        if self.encoding.needs_calibration:
            usable = built_in_methods(lambda method: not method.needs_calibration)
            raise ValueError(f"on a `base`, `compress.method` is {usable}: the others need whole weights")
        if self.smoothing_head is not None or (self.finish is not None and self.finish.nats_per_bit is None):
            raise ValueError("on a `base`, leave `smoothing_head` out, and give a `finish` its `nats_per_bit`")
        return self

    @model_validator(mode="after")
    def _networks_are_trained(self) -> Self:
        if self.family.kind == "markov":
            if self.start is not None or self.finish is not None or self.smoothing_head is not None:
                raise ValueError("`start`, `finish` and `smoothing_head` need a network; the family `markov` has none")
        elif self.training is None and (self.start is self.artifact is None or self.finish is None):
            raise ValueError("`training` is missing: tokens, window, batch, learning rate")
        if self.artifact is not None:
            self._artifact_is_all()
            return self
        if self.start is not None and (self.model or self.family != DenseFamily()):
            raise ValueError("`start` brings the model and its family; leave `model` and `family` out")
        if self.finish is not None and not self.encoding.writes_grid:
            usable = built_in_methods(lambda method: method.writes_grid)
            raise ValueError(f"`finish` needs `compress.method` {usable}: the others have no grid to train")
        return self

    def _artifact_is_all(self) -> None:
        if self.model or self.family != DenseFamily() or any((self.start, self.training, self.compress)):
            raise ValueError("`artifact` is trained by `finish` alone; leave out what comes before it")

    @property
    def encoding(self) -> CompressionMethod:
        """How the trained weights become an artifact."""
        return self.compress or LosslessSettings()

    @property
    def last_training(self) -> TrainingConfig:
        """The last training of a network: compression looks at text in its windows."""
        last = self.finish or self.training
        assert last is not None, "only the family `markov` goes without"
        return last


class PretrainHow(_Section):
    """Where training runs and what it leaves behind."""

    output: str
    """Directory of checkpoints, the float model (Hugging Face format) and `model.tokenbound`."""
    cache: str | None = None
    """Where prepared corpora are kept; null means `prepared/` beside the output."""
    workers: int = Field(default=1, ge=1)
    """Ray Train workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the workers run."""
    threads: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """CPU threads of one worker; `auto` divides the cores. Small models often train as fast with one."""
    checkpoint_interval_s: float = Field(default=120.0, gt=0)
    """Seconds between checkpoints; a killed run loses at most this much."""
    progress_interval_s: float = Field(default=30.0, gt=0)
    """Seconds between progress lines."""
    log: tuple[Literal["tensorboard", "mlflow"], ...] = ()
    """Where else progress lines go: `tensorboard` to event files below the output, `mlflow` (an extra) to a run."""
    ray_address: str | None = None
    """Ray cluster to join, HOST:PORT; null joins the surrounding one or starts a local one."""
    ray_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds after which a cluster that does not answer is given up."""


class PretrainConfig(_Section):
    """One training run."""

    what: PretrainWhat
    how: PretrainHow


def load_config(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML config, apply ``a.b=c`` overrides and validate it.

    Args:
        kind: model that it must fit, such as `RunConfig`.
        path: of the file.
        overrides: each `dotted.key=value`, the value in YAML.

    Raises:
        InputError: the file is missing, is not YAML, or a field is unknown, missing or out of range.

    >>> import tempfile
    >>> from tokenbound.demo import demo_config
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = Path(folder, "run.yaml").write_text(dump_config(demo_config("runs/demo")))
    ...     config = load_config(RunConfig, Path(folder, "run.yaml"), ["what.bound.delta=0.01"])
    >>> config.what.bound.delta
    0.01
    """
    return validate(kind, load_tree(path, overrides), origin=str(path))


def load_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML config as plain data and apply ``a.b=c`` overrides.

    Raises:
        InputError: the file is missing or is not YAML.
    """
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"config {path} does not exist; give the path of a YAML file") from None
    except (StrictYamlError, UnicodeDecodeError, IsADirectoryError) as error:
        raise InputError(f"config {path} is not readable YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"config {path} must be a mapping with the keys `what` and `how`")
    for override in overrides:
        _apply_override(tree, override)
    return tree


def validate(kind: type[T], tree: object, *, origin: str) -> T:
    """Validate plain data, turning pydantic's report into one line per problem.

    Types are strict: a number as text, or `true` for a 1, is a mistake and not a spelling.

    Args:
        kind: model that it must fit.
        tree: the data.
        origin: where it came from, for messages.

    Raises:
        InputError: a field is unknown, missing or out of range, or a URI holds credentials.

    >>> validate(BoundConfig, {"delta": 2}, origin="example")
    Traceback (most recent call last):
    tokenbound.errors.InputError: config example: delta: Input should be less than 1 (got 2)
    """
    refuse_credentials_in(tree)
    for place, text in texts_in(tree):
        if not is_utf8(text):
            raise InputError(
                f"config {origin}: {place}: {text!r} is not UTF-8 and cannot be stored; give another name, or of a "
                "corpus file its directory or a glob"
            )
    try:
        check_tree(tree)
        return kind.model_validate_json(as_json(tree), strict=True)
    except (StrictJsonError, StrictYamlError) as error:
        raise InputError(f"config {origin}: {error}") from None
    except ValidationError as error:
        problems = "; ".join(_problem(kind, item) for item in of_unions(error.errors()))
        raise InputError(f"config {origin}: {problems}") from None


def _problem(kind: type[BaseModel], item: Mapping[str, Any]) -> str:
    """One of pydantic's findings as field, reason and value; of an unknown key also what may have been meant."""
    place = ".".join(str(part) for part in item["loc"]) or "config"
    given = f" (got {item['input']!r})" if isinstance(item["input"], str | int | float | bool) else ""
    if item["type"] == "extra_forbidden":
        *above, key = map(str, item["loc"])
        known = item.get("ctx", {}).get("known") or _keys_at(kind, above)
        return f"{place}: unknown key{given}; {_meant(key, known)}"
    return f"{place}: {item['msg'].removeprefix('Value error, ')}{given}"


def _meant(key: str, known: Sequence[str]) -> str:
    """The known key that is spelt most like one, else all of them.

    >>> _meant("lenght", ["length", "context"])
    'did you mean `length`?'
    >>> _meant("depth", ["length", "context"])
    'the keys here are length, context'
    """
    close = get_close_matches(key, known, n=1)
    return f"did you mean `{close[0]}`?" if close else f"the keys here are {', '.join(known)}"


def _keys_at(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Names of the fields at a place below a model; where one of several models may stand, those of all.

    >>> _keys_at(RunConfig, ["what", "windows"])
    ['length', 'context', 'stride', 'batch', 'shard_tokens']
    """
    kinds = [kind]
    for part in path:
        fields = [found.model_fields[part] for found in kinds if part in found.model_fields]
        kinds = [model for field in fields for model in _models_in(field.annotation)] or _chosen(kinds, part)
    return list(dict.fromkeys(name for found in kinds for name in found.model_fields))


def _chosen(kinds: list[type[BaseModel]], tag: str) -> list[type[BaseModel]]:
    """Of the kinds of a union the one that was chosen, which pydantic names as a step of its own that is no field.

    >>> from tokenbound.config.compress import LosslessSettings, RoundToNearestSettings
    >>> [kind.__name__ for kind in _chosen([LosslessSettings, RoundToNearestSettings], "rtn")]
    ['RoundToNearestSettings']
    """
    if any(issubclass(kind, CompressionMethod) for kind in kinds):
        return [METHODS.get(tag)]
    return kinds


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override {override!r} must look like how.output=runs/other")
    refuse_credentials(text, where=key)
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"override {override!r}: {parent!r} is not a section of the config")
        node = child
    try:
        node[leaf] = parse_yaml(text)
    except StrictYamlError as error:
        raise InputError(f"override {override!r}: the value is not valid YAML: {error}") from None


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML, as it is stored in a run directory.

    Args:
        config: validated.

    >>> print(dump_config(SampleConfig(windows=1000)).splitlines()[0])
    windows: 1000
    """
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
