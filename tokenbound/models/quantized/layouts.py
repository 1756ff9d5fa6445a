"""Packed codes to the dense weights that they stand for, for the methods whose own code does not run everywhere.

    gptq           w = (q - z) s        codes of 2, 3, 4 or 8 bits along the inputs, one stream over 32-bit words
    awq            w = (q - z) s        codes of 4 bits, eight outputs in a word, in the order 0 2 4 6 1 3 5 7
    bitsandbytes   w = table[q] a       4 bits, two in a byte, the first above; a itself may be 8-bit codes
                   w = q s / 127        8 bits
    hqq            w = (q - z) s        z not an integer; in the dtype that the checkpoint computes in

gptq and awq are exact in float32: a code less its zero point has 9 bits and a half-precision scale 11, and a float32
holds 24. The others round as their own dequantization does, operation by operation, so that each weight is defined to
the last bit on every machine. Formats: AutoGPTQ and GPTQModel ("gptq", "gptq_v2"), AutoAWQ ("gemm"), bitsandbytes and
hqq as transformers and their own packages save them. QuIP# is in `quip`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tokenbound.errors import InputError
from tokenbound.models.quantized import quip
from tokenbound.models.quantized.schemes import QUANTIZATION, Scheme

Tensors = Mapping[str, torch.Tensor]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """How a quantized layer lies among the tensors of a checkpoint."""

    mark: str
    """Ending of the one tensor that every such layer has."""
    parts: tuple[str, ...]
    """Endings of the tensors that become the weight; a bias is not among them."""
    restore: Callable[[Tensors, Settings], torch.Tensor]
    """Parts by ending, and the quantization config, to float32 weights [outputs, inputs]."""


def dense_tensors(
    method: Scheme,
    architecture: Mapping[str, Any],
    tensors: Tensors,
    *,
    dtype: torch.dtype,
    transposed: Callable[[str], bool] = lambda layer: False,
) -> dict[str, torch.Tensor]:
    """Replace the parts of every quantized layer by its weight.

    Args:
        method: how they are quantized.
        architecture: with the quantization config.
        tensors: as stored, by name.
        dtype: of the weights; they are rounded to it once.
        transposed: of a layer's name, whether the model keeps its weight as [inputs, outputs].

    Returns:
        Tensors by the names of the unquantized model; what belongs to no quantized layer is as it was.

    Raises:
        InputError: a layer does not lie as its method says; by name.
    """
    out = dict(tensors)
    for layer, layout in quantized_layers(method, tensors).items():
        parts = {part: out.pop(layer + part) for part in layout.parts if layer + part in out}
        out |= dense_layer(method, architecture, layer, parts, dtype=dtype, transposed=transposed(layer))
    return out


def quantized_layers(method: Scheme, names: Collection[str]) -> dict[str, Layout]:
    """Layers among the names of a checkpoint's tensors that are quantized, each with how it lies there."""
    return {
        name.removesuffix(layout.mark): layout
        for layout in LAYOUTS[method.name]
        for name in sorted(names)
        if name.endswith(layout.mark)
    }


def weight_names(method: Scheme, layer: str) -> tuple[str, ...]:
    """Names of the dense weights that a quantized layer holds."""
    return quip.weight_names(layer) if method.name == "quip#" else (f"{layer}.weight",)


def dense_layer(
    method: Scheme,
    architecture: Mapping[str, Any],
    layer: str,
    parts: Tensors,
    *,
    dtype: torch.dtype,
    transposed: bool = False,
) -> dict[str, torch.Tensor]:
    """The weights that one quantized layer stands for, by name; see `dense_tensors`.

    Args:
        method: how it is quantized.
        architecture: with the quantization config.
        layer: its name.
        parts: its tensors by ending.
        dtype: of the weights.
        transposed: whether the model keeps its weight as [inputs, outputs].

    Raises:
        InputError: it does not lie as its method says; by name.
    """
    settings = {**architecture[QUANTIZATION], quip.SETTINGS: architecture.get(quip.SETTINGS)}
    layout = quantized_layers(method, [layer + part for part in parts])[layer]
    weight = _restore(layout, method, layer, parts, settings)
    if method.name == "quip#":
        pieces = quip.split(layer, weight, parts.get(".fuse_scales"), architecture)
    else:
        pieces = {f"{layer}.weight": weight.T.contiguous() if transposed else weight}
    return {name: piece.to(dtype) for name, piece in pieces.items()}


def _restore(layout: Layout, method: Scheme, layer: str, parts: Tensors, settings: Settings) -> torch.Tensor:
    try:
        return layout.restore(parts, settings)
    except InputError as error:
        raise InputError(f"{method.name} layer {layer}: {error}") from None
    except KeyError as error:
        raise InputError(f"{method.name} layer {layer} has no {error}; give a complete checkpoint") from None
    except (RuntimeError, ValueError, TypeError, IndexError, RecursionError, ZeroDivisionError, OverflowError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{method.name} layer {layer}: its tensors do not fit each other ({reason})") from error


def unpack_stream(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of a stream of 32-bit words, least significant bits first, that may run across words.

    Args:
        words: int32 [words, lanes].
        bits: of a code.

    Returns:
        uint8 [32 * words // bits, lanes].

    >>> unpack_stream(torch.tensor([[0b11_10_01_00]], dtype=torch.int32), 2)[:4, 0].tolist()
    [0, 1, 2, 3]
    """
    if words.dtype != torch.int32 or words.ndim != 2 or len(words) % (period := bits // math.gcd(bits, 32)):
        raise InputError(f"packed words must be int32 [n, lanes] with whole codes, not {words.dtype} {words.shape}")
    wide = words.view(len(words) // period, period, -1)
    count = 32 * period // bits
    codes = torch.empty(len(wide), count, wide.shape[2], dtype=torch.uint8)
    for index in range(count):
        row, offset = divmod(bits * index, 32)
        value = wide[:, row].to(torch.int64) >> offset
        if offset + bits > 32:
            value = (value & ((1 << 32 - offset) - 1)) | (wide[:, row + 1].to(torch.int64) << 32 - offset)
        codes[:, index] = value & ((1 << bits) - 1)
    return codes.view(-1, wide.shape[2])


def _affine(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """(q - z) s of codes [inputs, outputs] whose zero points and scales [groups, outputs] go by `group` [inputs]."""
    if zeros.shape != scales.shape or codes.shape[1] != scales.shape[1]:
        raise InputError(
            f"codes {tuple(codes.shape)}, zero points {tuple(zeros.shape)} and scales {tuple(scales.shape)} disagree"
        )
    if int(group.min()) < 0 or int(group.max()) >= len(scales):
        raise InputError(f"an input belongs to group {int(group.max())} of {len(scales)}")
    return ((codes.float() - zeros.float()[group]) * scales.float()[group]).T.contiguous()


def _equal_groups(inputs: int, groups: int) -> torch.Tensor:
    if not groups or inputs % groups:
        raise InputError(f"{inputs} inputs do not divide into {groups} groups")
    return torch.arange(inputs) // (inputs // groups)


# --- GPTQ ---------------------------------------------------------------------------------------------------------


def _gptq(parts: Tensors, settings: Settings) -> torch.Tensor:
    words, scales, group = parts[".qweight"], parts[".scales"], parts.get(".g_idx")
    layout = _gptq_format(settings)
    bits = int(settings["bits"]) if group is None else 32 * len(words) // len(group)  # some layers have other bits
    if bits not in (2, 3, 4, 8):
        raise InputError(f"codes of {bits} bits are not known")
    codes = unpack_stream(words, bits)
    zeros = _gptq_zeros(unpack_stream(parts[".qzeros"].T.contiguous(), bits).T, bits, layout, settings)
    if group is None and settings.get("desc_act"):
        raise InputError("desc_act is true, but there is no g_idx to say which group an input belongs to")
    by_input = _equal_groups(len(codes), len(scales)) if group is None else group.to(torch.int64)
    if len(by_input) != len(codes):
        raise InputError(f"{len(codes)} codes for {len(by_input)} inputs")
    weights = _affine(codes, zeros, scales, by_input)
    if (used := len(set(by_input.tolist()))) != len(scales):
        raise InputError(f"g_idx uses {used} of {len(scales)} groups, so kernels disagree about the scales")
    return weights


def _gptq_format(settings: Settings) -> str:
    named = {str(settings[key]).lower() for key in ("checkpoint_format", "format") if settings.get(key)} or {"gptq"}
    if len(named) > 1:
        raise InputError(f"checkpoint_format and format disagree ({', '.join(sorted(named))}); save it with GPTQModel")
    (layout,) = named
    if layout not in ("gptq", "gptq_v2"):
        raise InputError(f"checkpoint_format {layout!r} is made for one kernel; save it as 'gptq' with GPTQModel")
    return layout


def _gptq_zeros(stored: torch.Tensor, bits: int, layout: str, settings: Settings) -> torch.Tensor:
    """Zero points. The older format stores one less, but writers have set the format field wrongly.

    Under symmetric quantization the zero point is the middle of the codes, whatever the field says, so the stored
    numbers show which convention they follow. They do so too where the config leaves `sym` out and all are the middle;
    otherwise the field decides.
    """
    middle, older = 1 << bits - 1, (stored + 1) & ((1 << bits) - 1)
    symmetric = settings.get("sym")
    if symmetric is not False and ((older == middle).all() or (stored == middle).all()):
        return torch.full_like(stored, middle)
    if symmetric:
        found = sorted(set(stored.flatten().tolist()))
        raise InputError(
            f"sym is true, but the stored zero points ({', '.join(map(str, found[:5]))}) are the middle {middle} of "
            f"{bits}-bit codes neither as they are nor plus one; save it again with GPTQModel"
        )
    return older if layout == "gptq" else stored


# --- AWQ ----------------------------------------------------------------------------------------------------------

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which nibble of a word each of its eight outputs stands."""


def _awq(parts: Tensors, settings: Settings) -> torch.Tensor:
    named = {str(settings[key]).lower() for key in ("version", "format") if settings.get(key)} or {"gemm"}
    if named != {"gemm"} or int(settings.get("bits", 4)) != 4:
        version = " and ".join(sorted(named))
        raise InputError(f"version {version!r} with {settings.get('bits', 4)} bits is not known; save it as 4-bit gemm")
    codes, zeros = _nibbles(parts[".qweight"]), _nibbles(parts[".qzeros"])
    if settings.get("zero_point") is False and (zeros != 8).any():
        raise InputError("zero_point is false, but the stored zero points are not all 8; save it again with AutoAWQ")
    size = settings.get("group_size")
    if isinstance(size, int) and size > 0 and len(codes) != size * len(zeros):
        raise InputError(f"group_size {size} does not give {len(zeros)} groups of {len(codes)} inputs")
    return _affine(codes, zeros, parts[".scales"], _equal_groups(len(codes), len(zeros)))


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, 8 columns] of int32 [rows, columns]."""
    if words.dtype != torch.int32:
        raise InputError(f"packed words must be int32, not {words.dtype}")
    codes = torch.stack([((words >> 4 * place) & 15).to(torch.uint8) for place in _AWQ_PLACES], dim=2)
    return codes.flatten(1)


# --- bitsandbytes -------------------------------------------------------------------------------------------------

_ABSMAX = tuple(f".weight.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"))
_STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")

_STATE_KEYS = frozenset(
    {"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"}
)


def _bitsandbytes_4bit(parts: Tensors, settings: Settings) -> torch.Tensor:
    state = json.loads(bytes(parts[_STATES[1] if _STATES[1] in parts else _STATES[0]].tolist()))
    if unknown := sorted(state.keys() - _STATE_KEYS):
        raise InputError(f"its quant_state has {', '.join(unknown[:5])}, which is not understood")
    shape = tuple(int(size) for size in state["shape"])
    packed = parts[".weight"].contiguous().view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    table, absmax = parts[".weight.quant_map"].float(), _absmax(parts, state)
    if len(table) != 16 or len(shape) != 2 or not 0 <= len(codes) - math.prod(shape) < 2:
        raise InputError(f"{len(codes)} codes and a table of {len(table)} for a weight {shape}")
    codes = codes[: math.prod(shape)]
    return (table[codes.int()] * _by_block(absmax, int(state["blocksize"]), len(codes))).view(shape)


def _absmax(parts: Tensors, state: Mapping[str, Any]) -> torch.Tensor:
    """Scale of each block; where it is nested, itself codes of one byte with scales of their own."""
    absmax = parts[".weight.absmax"]
    if "nested_offset" not in state:
        return absmax.float()
    table, scales = parts[".weight.nested_quant_map"].float(), parts[".weight.nested_absmax"].float()
    if absmax.dtype != torch.uint8 or len(table) != 256:
        raise InputError(f"nested scales are {absmax.dtype} with a table of {len(table)}")
    blocks = _by_block(scales, int(state["nested_blocksize"]), len(absmax))
    return table[absmax.int()] * blocks + torch.tensor(state["nested_offset"], dtype=torch.float32)


def _by_block(scales: torch.Tensor, size: int, count: int) -> torch.Tensor:
    """The scale of each of `count` values in blocks of `size`."""
    if size < 1 or len(scales) != -(-count // size):
        raise InputError(f"{len(scales)} scales for {count} values in blocks of {size}")
    return scales.repeat_interleave(min(size, count))[:count]


def _bitsandbytes_8bit(parts: Tensors, settings: Settings) -> torch.Tensor:
    order = parts.get(".weight_format")
    if order is not None and int(order):
        raise InputError(f"weight_format {int(order)} is made for one device; save it again with a newer bitsandbytes")
    codes, scales = parts[".weight"], parts[".SCB"].float()
    if codes.dtype != torch.int8 or scales.shape != codes.shape[:1]:
        raise InputError(f"codes are {codes.dtype} {tuple(codes.shape)} with {tuple(scales.shape)} scales")
    return codes.float() * scales[:, None] * (1 / 127)


# --- HQQ ----------------------------------------------------------------------------------------------------------

_HQQ_META = (
    *("nbits", "group_size", "shape", "scale", "zero", "axis", "packing", "unpack_view_dtype", "view_as_float"),
    *("quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config"),
    *("channel_wise", "optimize", "round_zero"),
)
_HQQ_SHIFTS = {"8bit_u8": (0,), "4bit_u8": (4, 0), "2bit_u8": (6, 4, 2, 0), "1bit_u8": tuple(range(7, -1, -1))}
_HQQ_SHIFTS["3bit_32"] = tuple(range(27, -1, -3))
"""Codes stand in a word from the top; the next word has those of the next column, not the next codes."""
_DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("float16", "bfloat16", "float32")}


def _hqq(parts: Tensors, settings: Settings) -> torch.Tensor:
    packing, dtype = _text(parts[".packing"]), _DTYPES.get(_text(parts[".compute_dtype"]))
    if packing not in _HQQ_SHIFTS or dtype is None or any(int(parts[f".quant_{k}"]) for k in ("scale", "zero")):
        raise InputError(f"packing {packing!r} with quantized scales or in an unknown dtype cannot be read")
    words = parts[".W_q"].contiguous().view(torch.int32 if packing == "3bit_32" else torch.uint8)
    mask = (1 << (3 if packing == "3bit_32" else 8 // len(_HQQ_SHIFTS[packing]))) - 1
    codes = torch.cat([(words >> shift) & mask for shift in _HQQ_SHIFTS[packing]])
    shape = tuple(int(size) for size in parts[".shape"])
    group = int(parts[".group_size"])
    if packing == "3bit_32":
        codes = codes[: group if int(parts[".axis"]) == 0 else math.prod(shape) // group]
    zero, scale = parts[".zero"], parts[".scale"]
    if any(part.ndim != 2 or not all(map(_repeats, part.shape, codes.shape)) for part in (zero, scale)):
        raise InputError(f"codes {tuple(codes.shape)} with scales {tuple(scale.shape)}")
    return ((codes.to(dtype) - zero.to(dtype)) * scale.to(dtype)).reshape(shape).float()


def _repeats(size: int, count: int) -> bool:
    return size in (1, count)


def _text(codes: torch.Tensor) -> str:
    return bytes(codes.to(torch.uint8).flatten()[:64].tolist()).decode("ascii", "replace")


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "gptq": (Layout(".qweight", (".qweight", ".qzeros", ".scales", ".g_idx"), _gptq),),
    "awq": (Layout(".qweight", (".qweight", ".qzeros", ".scales"), _awq),),
    "bitsandbytes": (
        Layout(
            ".weight.absmax",
            (".weight", *_ABSMAX, *_STATES),
            _bitsandbytes_4bit,
        ),
        Layout(".SCB", (".weight", ".SCB", ".weight_format"), _bitsandbytes_8bit),
    ),
    "hqq": (Layout(".W_q", (".W_q", *(f".{part}" for part in _HQQ_META)), _hqq),),
    "quip#": (Layout(".Qidxs", quip.PARTS, lambda parts, settings: quip.restore(parts, settings[quip.SETTINGS])),),
}
"""By the name of the method."""
