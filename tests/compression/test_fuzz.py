"""Forged artifacts of every kind, with digests that match: a value or a clear error, soon, and nothing else.

Forgers know the format: they open a section, change what is inside, and close it again, so that what lies behind the
first checks is reached. The long form of each test (`-m slow`) runs the same forgers a hundred times as often.
"""

from __future__ import annotations

import json
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from tokenbound.compression.artifact import Artifact, decode_artifact, encode_artifact
from tokenbound.compression.bytestreams import decode_text, encode_text
from tokenbound.compression.container import Section, read_container, varint, write_container
from tokenbound.compression.inspection import inspect_artifact
from tokenbound.compression.ngram_codec import TensorSource, read_tree
from tokenbound.compression.weight_delta import adapter_delta, apply_delta, difference, encode_delta, encode_difference
from tokenbound.config.compress import LosslessSettings, RoundToNearestSettings
from tokenbound.errors import TokenboundError
from tokenbound.models.smoothing_head import BIAS, SMOOTHING, WEIGHT, take_head
from tokenbound.report.artifact_view import artifact_view

GOLDEN = Path(__file__).parent / "golden"
LIMIT_S = 10
"""No forgery of these sizes may take longer on the processor, whatever else the machine does."""
TENSORS = "tensors"


@contextmanager
def limited() -> Iterator[None]:
    """Fail, rather than hang."""

    def stop(number: int, frame: object) -> None:
        raise AssertionError(f"decoding took more than {LIMIT_S} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def base_model() -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    return {"q.weight": torch.randn(24, 16, generator=make), "norm.weight": torch.ones(16), "b.weight": torch.ones(6)}


COPY = {"head.weight": "q.weight"}


@lru_cache(maxsize=1)
def seeds() -> dict[str, bytes]:
    """One artifact of every kind."""
    base, chosen = base_model(), RoundToNearestSettings(step=0.3)
    tuned = {**base, "q.weight": base["q.weight"] * 1.1, "norm.weight": base["norm.weight"] * 2}
    factors = {"q.lora_A.weight": torch.ones(2, 16), "q.lora_B.weight": torch.ones(24, 2)}
    head = {WEIGHT: torch.ones(1, 16), BIAS: torch.zeros(1), **base}
    smoothed = {"model_type": "llama", SMOOTHING: {"alpha_min": 2.0**-10}}
    return {
        "codecs": (GOLDEN / "every_codec.tokenbound").read_bytes(),
        "static": (GOLDEN / "static.tokenbound").read_bytes(),
        "markov": (GOLDEN / "ngrams.tokenbound").read_bytes(),
        "blocks": (GOLDEN / "ggml.tokenbound").read_bytes(),
        "difference": encode_difference({}, base, tuned, chosen),
        "adapter": encode_delta({}, adapter_delta(base, factors, scaling=2.0), LosslessSettings()),
        "untied": encode_delta({}, difference(base, {**tuned, "head.weight": base["q.weight"]}, untied=COPY), chosen),
        "smoothing": encode_artifact(smoothed, head, chosen, tokenizer=b"tokens" * 9),
        "repeats": encode_artifact({}, {f"{n}.{name}": base[name] for n in "abc" for name in base}, LosslessSettings()),
    }


KINDS = ("codecs", "static", "markov", "blocks", "difference", "adapter", "untied", "smoothing", "repeats")


def use(data: bytes) -> None:
    """What is done with the bytes of an artifact: all of it may refuse, with an error of ours."""
    with limited():
        artifact = decode_artifact(data)
        assert all(isinstance(tensor, torch.Tensor) for tensor in artifact.tensors.values())
        shown(data)
        for part in (_applied, _with_head, _walked):
            part(artifact)


def shown(data: bytes) -> str:
    """What `inspect` prints."""
    console = Console(file=StringIO(), record=True, width=200)
    console.print(artifact_view(inspect_artifact(data, compare=True)))
    return console.export_text()


def _applied(artifact: Artifact) -> None:
    if artifact.base is not None:
        apply_delta(artifact, base_model())


def _with_head(artifact: Artifact) -> None:
    take_head(artifact.architecture, artifact.tensors)


def _walked(artifact: Artifact) -> None:
    for tensor in artifact.tensors.values():
        if tensor.dtype == torch.int32 and tensor.ndim == 1 and artifact.architecture.get("model_type") == "markov":
            read_tree(TensorSource(tensor.numpy()))


def refused_or_used(data: bytes) -> None:
    with suppress(TokenboundError):
        use(data)


# Forgers


def changed(draw: Callable[..., Any], data: bytes) -> bytes:
    """Bytes set, put in, taken out, repeated or cut off."""
    body = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(body) - 1)))
        kind = draw(st.sampled_from(["set", "insert", "delete", "cut", "repeat", "long"]))
        if kind == "set" and body:
            body[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            body[at:at] = draw(st.binary(min_size=1, max_size=6))
        elif kind == "delete":
            del body[at : at + draw(st.integers(1, 9))]
        elif kind == "cut":
            del body[at:]
        elif kind == "repeat":
            body[at:at] = body[at : at + 40] * draw(st.integers(1, 30))
        elif kind == "long":
            body[at:at] = varint(draw(st.integers(0, (1 << 63) - 1)))
    return bytes(body)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def changed_json(draw: Callable[..., Any], text: bytes) -> bytes:
    """Another value at a key, in canonical form."""
    value = json.loads(text)
    key = draw(st.sampled_from([*value, "kind", "scaling", "transposed", SMOOTHING, "other"]))
    if draw(st.booleans()) and isinstance(value.get(key), dict):
        value[key] = {name: draw(VALUES) for name in value[key]}
    else:
        value[key] = draw(VALUES)
    plain = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return plain.encode(errors="surrogatepass")


def joined(sections: dict[str, bytes]) -> bytes:
    return b"".join(write_container({name: Section.of(payload) for name, payload in sections.items()}))


def forge(draw: Callable[..., Any], data: bytes) -> bytes:
    """Change one section of an artifact, inside or outside its compression, and seal it."""
    sections: dict[str, bytes] = {name: bytes(payload) for name, payload in read_container(data).items()}
    name = draw(st.sampled_from([*sections, TENSORS, "index"]))
    inside = name != TENSORS and draw(st.booleans())
    if not inside:
        sections[name] = changed(draw, sections[name])
    else:
        text = decode_text(sections[name], name)
        is_json = name in ("architecture", "settings", "base") and draw(st.booleans())
        sections[name] = encode_text((changed_json if is_json else changed)(draw, text))
    return joined(sections)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_artifact_is_used_as_it_is(kind: str) -> None:
    use(seeds()[kind])


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_forgeries_of_every_kind_are_refused_or_used(data: st.DataObject) -> None:
    refused_or_used(forge(data.draw, seeds()[data.draw(st.sampled_from(sorted(seeds())))]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_many_forgeries_are_refused_or_used(kind: str, data: st.DataObject) -> None:
    refused_or_used(forge(data.draw, seeds()[kind]))


def resealed(kind: str, **texts: bytes) -> bytes:
    sections = {name: bytes(payload) for name, payload in read_container(seeds()[kind]).items()}
    return joined({**sections, **{name: encode_text(text) for name, text in texts.items()}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (resealed("codecs", architecture=b'{"a":"\\ud800"}'), "canonical JSON"),
        (resealed("codecs", architecture=b'{"a":1e999}'), "canonical JSON"),
        (resealed("difference", base=b"{}"), "does not name a base"),
        (resealed("difference", base=b'{"kind":["difference"],"sha256":"' + b"0" * 64 + b'"}'), "does not name a base"),
        (resealed("smoothing", architecture=b'{"%b":{"alpha_min":[]}}' % SMOOTHING.encode()), "not in the grid"),
        (resealed("smoothing", architecture=b'{"%b":7}' % SMOOTHING.encode()), "not in the grid"),
    ],
)
def test_forged_sections_are_named(data: bytes, message: str) -> None:
    with pytest.raises(TokenboundError, match=message):
        use(data)


@pytest.mark.parametrize("scaling", [10**400, "x", None, [1]])
def test_an_adapter_with_a_scaling_that_is_no_number_is_refused(scaling: object) -> None:
    named = json.loads(decode_text(read_container(seeds()["adapter"])["base"], "base"))
    text = json.dumps({**named, "scaling": scaling}, sort_keys=True, separators=(",", ":"))
    with pytest.raises(TokenboundError, match="adapter does not fit"):
        use(resealed("adapter", base=text.encode()))


def test_factors_of_a_vector_are_refused() -> None:
    factors = {"b.lora_A.weight": torch.ones(2), "b.lora_B.weight": torch.ones(6)}
    with pytest.raises(TokenboundError, match="does not fit"):
        adapter_delta(base_model(), factors, scaling=2.0)


def test_names_are_neither_markup_nor_escapes() -> None:
    data = encode_artifact({}, {"[/x].[link=a]b": torch.ones(2)}, LosslessSettings())
    assert "[/x].[link=a]b" in shown(data)
    with pytest.raises(TokenboundError, match="control characters"):
        encode_artifact({}, {"a\x1b[2J": torch.ones(2)}, LosslessSettings())


def test_nothing_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load"), (np, "load")):
        monkeypatch.setattr(module, name, refuse)
    for data in seeds().values():
        use(data)
