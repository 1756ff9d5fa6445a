"""The sections of a certificate: which keys each may have, and of which type. A new key is added here.

A key that is not listed is refused: inside an identity it would be a free number with which the order of a sample can
be ground until it flatters, elsewhere a sentence that nothing checks. Types are strict: a number as text or a `true`
for a 1 is refused as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from typing_extensions import TypedDict

from tokenbound.bounds.claim import Line
from tokenbound.store.strict_json import shortened

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
"""How many of something."""
Positive = Annotated[int, Field(ge=1, lt=1 << 63)]
"""How many of something that there must be, or an ordinal."""
Seed = Annotated[int, Field(ge=0, lt=1 << 64)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in lower-case hexadecimal."""
Words = Annotated[str, StringConstraints(pattern=r"\S")]
"""Text that says something."""
Version = Annotated[str, StringConstraints(pattern=r"^[0-9][0-9A-Za-z.+!_-]{0,60}$")]
Moment = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(\+00:00|Z)$")]
"""Date and time in UTC, ISO 8601."""


ShortText = Annotated[str, StringConstraints(max_length=200)]


class ProtocolSection(TypedDict):
    """How the model is applied; `batch` is a list of [batch, windows] where memory ran out on the way."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    add_bos: bool
    add_eos: bool
    batch: Positive | list[Annotated[list[Positive], Field(min_length=2, max_length=2)]]
    context: Literal["packed", "document"]
    dtype: Literal["float32", "bfloat16", "float16"]
    length: Positive
    stride: Positive


class BaseSection(TypedDict):
    """The base that a delta changes."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    sha256: Digest
    architecture_sha256: NotRequired[Digest]


class TreeSection(TypedDict):
    """The tree along which decisions were scored."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    name: Literal["zipf", "balanced", "counts"]
    lengths: NotRequired[Annotated[str, StringConstraints(pattern=r"^[A-Za-z]{2,}$")]]


class ScoringIdentitySection(TypedDict, total=False):
    """Everything that decides the losses and the order of the draw; `verify` makes it again from the other fields."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    base: BaseSection
    tree: TreeSection
    artifact_sha256: Digest
    corpus_sha256: Digest
    tokens_sha256: Digest
    protocol: ProtocolSection
    sampled: bool
    seed: Seed
    pilot_windows: Positive | None


class DeclarationsSection(TypedDict):
    """What the user vouches for."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    tokenizer_is: Literal["given", "counted"]
    prior: Literal["code", "holdout"]
    package_torch_and_device_chosen_without_regard_to_the_tokens: NotRequired[Literal[True]]
    transformers_numpy_compile_and_threads_chosen_without_regard_to_the_tokens: NotRequired[Literal[True]]
    holdout_declaration: NotRequired[Words]
    declared_tokens: NotRequired[Positive]
    base_is_independent: NotRequired[Words]
    num_bases: NotRequired[Positive]
    plugins: NotRequired[dict[ShortText, dict[ShortText, ShortText]]]


class ClaimIdentitySection(TypedDict, total=False):
    """Everything that is claimed about the losses; `verify` makes it again from the other fields."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    scoring_fingerprint: Digest
    methods: list[str]
    top_k: list[Positive]
    delta: float
    sampling_delta_share: float
    trial: Positive
    unscorable: Literal["refuse", "worst_case"]
    declarations: DeclarationsSection
    evaluation: Positive
    control_variates: ShortText
    window_budgets: Literal[True]


class CodeSplitSection(TypedDict):
    """L(h) by what it pays for, bits."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    artifact: float
    protocol: float


PartSection = TypedDict("PartSection", {"from": float, "to": float, "salt": ShortText})
"""Which documents of a corpus, by the hash of their text."""
PartSection.__pydantic_config__ = STRICT  # type: ignore[attr-defined]


class CorpusSection(TypedDict):
    """What was read, and how."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    source: str
    documents: Count
    paths: NotRequired[list[str]]
    exclude: NotRequired[list[str]]
    tokenizer: NotRequired[str | None]
    files: NotRequired[Count]
    segments: NotRequired[Positive]
    tokens: NotRequired[Count]
    text_bytes: NotRequired[Count | None]
    scored_text_bytes: NotRequired[Count | None]
    skipped: NotRequired[dict[str, Positive]]
    empty_files: NotRequired[Positive]
    documents_with_replacements: NotRequired[Count]
    text_field: NotRequired[str]
    missing: NotRequired[str]
    delimiter: NotRequired[str | None]
    quoting: NotRequired[str]
    rows_without_text: NotRequired[Count]
    encoding: NotRequired[str]
    errors: NotRequired[str]
    special_tokens: NotRequired[str]
    part: NotRequired[PartSection]
    prompt_field: NotRequired[str]
    completion_field: NotRequired[str]
    messages_field: NotRequired[str]
    targets: NotRequired[Literal["answers"]]
    dtype: NotRequired[str | None]
    eos_id: NotRequired[Count | None]
    name: NotRequired[str | None]
    subset: NotRequired[str | None]
    split: NotRequired[str | None]
    revision: NotRequired[str | None]
    bytes_per_token: NotRequired[Annotated[float, Field(gt=0)] | None]
    add_bos: NotRequired[bool]
    add_eos: NotRequired[bool]
    python: NotRequired[str]
    options: NotRequired[dict[ShortText, JsonValue]]
    scored_documents: NotRequired[Positive]
    num_decisions: NotRequired[Positive]
    max_window_decisions: NotRequired[Positive]


class ModelSection(TypedDict):
    """Whose losses these are."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    architecture: str | None
    source: NotRequired[str | None]
    arithmetic: NotRequired[str]
    base: NotRequired[str]
    adapter_base: NotRequired[str]
    other_weights: NotRequired[list[str]]


class ScoredBySection(TypedDict):
    """Versions, device and settings, and how many shards were scored with them."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    shards: Positive
    tokenbound: NotRequired[ShortText]
    torch: NotRequired[ShortText]
    transformers: NotRequired[ShortText]
    numpy: NotRequired[ShortText]
    python: NotRequired[ShortText]
    device: NotRequired[ShortText]
    compile: NotRequired[bool]


EnvironmentSection = dict[
    Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_.-]{0,60}$")], ShortText | list[ScoredBySection]
]
"""Versions and machine by name; which packages there are depends on how the model is quantized."""


class LineSection(TypedDict):
    """One printed line; `verify` recomputes all of it."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    method: str
    top_k: Positive | None
    value: float | None
    empirical: float | None
    kappa_nats: float
    tune_bits: float
    vacuous: bool
    random_guess: float
    terms: dict[str, float]
    parameters: dict[str, Any]
    note: str


def _of(section: type) -> AfterValidator:
    """A dictionary that is checked against a section and stays as it is."""
    adapter: TypeAdapter[Any] = (
        TypeAdapter(section)
        if hasattr(section, "__pydantic_config__")
        else TypeAdapter(section, config=ConfigDict(strict=True))
    )

    def check(value: dict[str, Any]) -> dict[str, Any]:
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            raise ValueError(first_problem(error, within=True)) from None
        return value

    return AfterValidator(check)


_BRANCH = re.compile(r"literal\[.*\]|constrained-\w+|int|float|str|bool|(list|tuple|dict)\[.*\]")
"""How pydantic names a branch of a union, as a step of the path that is no field."""


def of_unions(errors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Pydantic's findings with one for each field: where a field may be one of several kinds it reports each of them.

    >>> from pydantic import BaseModel, ValidationError
    >>> class Example(BaseModel):
    ...     trial: Literal["auto"] | int
    >>> try:
    ...     Example(trial="x")
    ... except ValidationError as error:
    ...     print([(item["loc"], item["msg"].partition(",")[0]) for item in of_unions(error.errors())])
    [(('trial',), "Input should be 'auto' or a valid integer")]
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for item in errors:
        place = tuple(item["loc"])
        while len(place) > 1 and _BRANCH.fullmatch(str(place[-1])):
            place = place[:-1]
        if place in found and place != tuple(item["loc"]):
            more = str(item["msg"]).removeprefix("Input should be ")
            found[place]["msg"] = f"{found[place]['msg']} or {more}"
        else:
            found[place] = {**item, "loc": place}
    return list(found.values())


def first_problem(error: ValidationError, *, within: bool = False) -> str:
    """The first thing that is wrong with some data, with the field's path: one line.

    Args:
        error: pydantic's report.
        within: the path is inside a section whose own name is put before it by the caller.
    """
    item = of_unions(error.errors())[0]
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        reason = "unknown key"
    elif item["type"] == "missing":
        reason = "missing"
    else:
        reason = str(item["msg"]).removeprefix("Value error, ")
    given = item["input"] if isinstance(item["input"], str | int | float | bool) else None
    shown = "" if given is None or item["type"] == "value_error" else f" (got {shortened(repr(given), 60)})"
    if item["type"] == "value_error" and reason.startswith("."):
        return f"field {place + reason.partition(': ')[0]!r}: {reason.partition(': ')[2]}"
    return f".{place}: {reason}{shown}" if within else f"field {place!r}: {reason}{shown}"


ProtocolDict = Annotated[dict[str, Any], _of(ProtocolSection)]
ScoringIdentityDict = Annotated[dict[str, Any], _of(ScoringIdentitySection)]
ClaimIdentityDict = Annotated[dict[str, Any], _of(ClaimIdentitySection)]
DeclarationsDict = Annotated[dict[str, Any], _of(DeclarationsSection)]
CodeSplitDict = Annotated[dict[str, float], _of(CodeSplitSection)]
CorpusDict = Annotated[dict[str, Any], _of(CorpusSection)]
ModelDict = Annotated[dict[str, Any], _of(ModelSection)]
EnvironmentDict = Annotated[dict[str, Any], _of(EnvironmentSection)]
LineDict = Annotated[dict[str, Any], _of(LineSection), WithJsonSchema(TypeAdapter(Line).json_schema())]


def keys_of(section: type) -> frozenset[str]:
    """Every key that a section may have.

    >>> sorted(keys_of(CodeSplitSection))
    ['artifact', 'protocol']
    """
    return frozenset(section.__annotations__)


class PlanRecord(TypedDict, total=False):
    """`plan.json` of a run directory."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    scoring_fingerprint: Digest
    scoring_identity: dict[str, Any]
    corpus_root: str
    num_windows: Count
    num_tokens: Count
    max_window_tokens: Count
    shard_tokens: Positive
    shard_batch: Positive
    segments: list[list[str]]
    features_sha256: Digest
