"""Which quantized checkpoints can be scored, and in which arithmetic. Light: importing this does not pull in torch.

    deployed   the tool's own tensors and products, loaded by transformers' quantizer (torchao, compressed-tensors)
    dense      the stored codes stand for a matrix; it is restored and the model runs like any other

Which of the two follows from the method alone, so the artifact, which holds the whole `quantization_config`, names the
arithmetic; the certificate says it in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from tokenbound.errors import InputError
from tokenbound.models.quantized.keys import require_known_settings

QUANTIZATION = "quantization_config"
"""Key of an architecture that says how its tensors are quantized, as the checkpoint's config has it."""
RECORDS = "tokenbound_tensor_records"
"""Key of an architecture with what torchao keeps of each quantized weight in the header of its safetensors files."""


@dataclass(frozen=True)
class Scheme:
    """A way of quantizing that can be scored."""

    name: str
    """`quant_method` of the config."""
    package: str | None = None
    """Whose code runs the quantized layers, through transformers; None where they become dense ones."""
    may_change: bool = False
    """Whether a method of compression may start from the weights that the codes stand for."""
    remark: str = ""
    """What the tool's own products do beside that."""

    @property
    def arithmetic(self) -> str:
        """What the certificate says of the products that were scored."""
        if self.package is None:
            return f"dense products with the weights that the {self.name} codes stand for{self.remark}"
        return f"{self.name}, as transformers loads it"


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("torchao", "torchao"),
        Scheme("compressed-tensors", "compressed_tensors"),
        Scheme("gptq"),
        Scheme("awq"),
        Scheme("bitsandbytes"),
        Scheme("hqq"),
        Scheme("quip#"),
        Scheme("gguf", may_change=True, remark=" (llama.cpp also rounds activations, which is not done here)"),
    )
}


def scheme_of(architecture: Mapping[str, Any], origin: str = "given") -> Scheme | None:
    """How a checkpoint is quantized; None if it is not.

    Raises:
        InputError: in a way, or in a place, that is not known here.
    """
    for key, section in architecture.items():
        if isinstance(section, Mapping) and (key == "compression_config" or section.get(QUANTIZATION)):
            raise InputError(
                f"checkpoint {origin}: the quantization stands in {key!r}, which is not read; save it again with a "
                f"newer transformers, which writes {QUANTIZATION!r} at the top of config.json"
            )
    settings = architecture.get(QUANTIZATION)
    if not settings:
        return None
    name = _name(settings)
    if name not in SCHEMES:
        raise InputError(
            f"checkpoint {origin} is quantized with {name!r}, which cannot be loaded here ({', '.join(SCHEMES)} can); "
            "save a dequantized copy (transformers: `model.dequantize(); model.save_pretrained(OUT)`) or give the "
            "original weights"
        )
    if isinstance(settings, Mapping):
        require_known_settings(name, settings)
    return SCHEMES[name]


def _name(settings: object) -> str:
    if not isinstance(settings, Mapping):
        return str(settings)
    is_old = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    return str(settings.get("quant_method") or ("bitsandbytes" if is_old else "unknown"))


def require_package(architecture: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose quantized layers run in a package that is not installed.

    Raises:
        InputError: the message names the package.
    """
    scheme = scheme_of(architecture)
    if scheme is not None and scheme.package is not None and find_spec(scheme.package) is None:
        raise InputError(
            f"the model is quantized with {scheme.name}, and the package that runs it is not installed: pip install "
            f"'tokenbound[quantized]' (or {scheme.name} alone)"
        )


def arithmetic_of(architecture: Mapping[str, Any]) -> str | None:
    """In which arithmetic a quantized model is scored, in words; None for a plain one."""
    scheme = scheme_of(architecture)
    return None if scheme is None else scheme.arithmetic


MARKS = {".W_q": "hqq", ".Qidxs": "quip#"}
"""Endings of tensor names by which a checkpoint whose config does not say its method is known."""


def implied_settings(names: Iterable[str]) -> dict[str, Any]:
    """What a config leaves out that the names of the tensors say, as keys of an architecture; empty if nothing."""
    found = {scheme for name in names for mark, scheme in MARKS.items() if name.endswith(mark)}
    return {QUANTIZATION: {"quant_method": min(found)}} if found else {}
