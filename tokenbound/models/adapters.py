"""peft's LoRA adapters as changes of a base: which tensor of the base each of an adapter's tensors changes, and how.

    factors     W = W0 + s B A                         also of embeddings, and with ranks and alphas by layer
    DoRA        W = m (W0 + s B A) / |W0 + s B A|      m and norm by output (Liu et al. 2024, arXiv 2402.09353)
    whole       trained biases and `modules_to_save`   replaced
    tokens      rows of an embedding                   replaced

What peft computes is followed to the letter, and the tests hold it against peft itself: which layer a config targets,
which rank and alpha it has, that a layer's class decides its orientation, and that a trained side of a tied pair of
embeddings leaves the other side as it was. A tensor that nothing in the config accounts for is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokenbound.compression.tensor_map import OverlaidTensors, RenamedTensors
from tokenbound.compression.weight_delta import WeightDelta, adapter_delta, difference, low_rank_product
from tokenbound.errors import InputError
from tokenbound.models.adapter_config import MERGE, AdapterConfig, parse_adapter_config
from tokenbound.models.checkpoint import read_json, read_safetensors
from tokenbound.models.hf_model import blank_model, tied_names
from tokenbound.models.structured.layers import is_transposed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""What peft saves of an adapter."""

_PREFIX = "base_model.model."
_FACTORS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_B.bias": "bias",
}
"""Endings of a LoRA layer's tensors, and what each of them is."""
_TOKENS = ".token_adapter.trainable_tokens_delta"

Tensors = Mapping[str, torch.Tensor]


@dataclass
class _Layer:
    """A module with LoRA factors."""

    name: str
    transposed: bool
    """Whether the base keeps its weight as [inputs, outputs]; embeddings do."""
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class _Changes:
    """An adapter's tensors, sorted by what they do. Names are the base's."""

    layers: dict[str, _Layer] = field(default_factory=dict)
    base: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors of the base model itself; a tied pair has one."""
    saved: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors of modules that were trained as a whole, beside the base's."""
    rows: dict[str, tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=dict)
    """Of an embedding's weight: token ids and their rows."""


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The config of the adapter in a folder.

    Raises:
        InputError: it is not readable, or has a key that is not understood.
    """
    return parse_adapter_config(read_json(folder / ADAPTER_CONFIG))


def require_adapter_files(folder: Path) -> None:
    """Refuse an adapter whose weights are not there as safetensors, or that lies beside full weights.

    Raises:
        InputError: the message names the file and the cure.
    """
    from tokenbound.models.checkpoint import INDEX, SINGLE

    for name in (SINGLE, INDEX):
        if (folder / name).exists():
            raise InputError(
                f"{folder} holds both an adapter ({ADAPTER_CONFIG}) and full weights ({name}), which are two models; "
                "move one of them to a folder of its own"
            )
    if (folder / ADAPTER_WEIGHTS).exists():
        return
    if (folder / "adapter_model.bin").exists():
        raise InputError(
            f"{folder} has its adapter only as the pickle adapter_model.bin, and loading a pickle can run any code; "
            "where you trust it, convert it once: "
            "`PeftModel.from_pretrained(BASE_MODEL, IN).save_pretrained(OUT, safe_serialization=True)`"
        )
    raise InputError(
        f"{folder} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; save the adapter again with `model.save_pretrained` "
        "(an adapter_model.bin is a pickle and is not read)"
    )


def read_adapter(
    folder: Path, architecture: dict[str, Any], base: Tensors
) -> tuple[dict[str, Any], WeightDelta, AdapterConfig]:
    """What an adapter changes of a base.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        architecture: of the base.
        base: its tensors by full names.

    Returns:
        Architecture of the adapted model, the delta, and the adapter's config.

    Raises:
        InputError: a key, a layer or a tensor that cannot be applied as peft would; by name.
    """
    require_adapter_files(folder)
    config = read_adapter_config(folder)
    found, delta = resolve_adapter(config, architecture, base, read_safetensors(folder / ADAPTER_WEIGHTS))
    return found, delta, config


def resolve_adapter(
    config: AdapterConfig, architecture: dict[str, Any], base: Tensors, adapter: Tensors
) -> tuple[dict[str, Any], WeightDelta]:
    """An adapter as a delta: its own factors where the base can take them as they are, else the merged difference.

    Raises:
        InputError: a layer or a tensor that cannot be applied as peft would; by name.
    """
    model = blank_model(architecture, len(base))
    ties = {name: source for name, source in tied_names(model).items() if name not in base}
    _require_no_forced_tie(config, ties)
    changes = _sort_tensors(config, model, adapter)
    _require_complete(config, model, changes)
    untied = _untied(ties, changes)
    if untied:
        architecture = _without_tie(architecture, untied)
    full = RenamedTensors(base, {**{name: name for name in base}, **untied})
    _require_fit(config, full, ties, changes)
    plain = not config.use_dora and not changes.rows
    make = _as_factors if plain else _as_difference
    return architecture, make(config, base, full, ties, changes, untied)


def _weights(changes: _Changes) -> set[str]:
    return {f"{name}.weight" for name in changes.layers}


# --- What the config asks for --------------------------------------------------------------------------------------


def _sort_tensors(config: AdapterConfig, model: PreTrainedModel, adapter: Tensors) -> _Changes:
    modules = dict(model.named_modules(remove_duplicate=False))
    known = set(model.state_dict())
    targets = {name for name in modules if name and _is_target(config, model, modules, name)}
    changes = _Changes({name: _Layer(name, _is_transposed(modules[name], name)) for name in sorted(targets)})
    tokens = _token_layers(config, model, modules)
    for full, tensor in adapter.items():
        name = full.removeprefix(_PREFIX)
        if name == full:
            raise InputError(
                f"adapter tensor {full!r} does not begin with {_PREFIX!r}, so peft would ignore it; {MERGE}"
            )
        if not tensor.is_floating_point():
            raise InputError(
                f"adapter tensor {full!r} holds {tensor.dtype}, not floating point; save it again with peft"
            )
        _place(name, tensor, changes, tokens, config, known)
    return changes


def _place(
    name: str,
    tensor: torch.Tensor,
    changes: _Changes,
    tokens: Mapping[str, tuple[int, ...]],
    config: AdapterConfig,
    known: set[str],
) -> None:
    ending = next((ending for ending in _FACTORS if name.endswith(ending)), None)
    if ending is not None:
        layer = changes.layers.get(name.removesuffix(ending))
        if layer is None:
            raise InputError(
                f"adapter tensor {name!r} belongs to a layer that adapter_config.json does not target or the base does "
                f"not have, so peft would ignore it; {MERGE}"
            )
        layer.parts[_FACTORS[ending]] = tensor
    elif name.endswith(_TOKENS) and name.removesuffix(_TOKENS) in tokens:
        module = name.removesuffix(_TOKENS)
        changes.rows[f"{module}.weight"] = (tokens[module], tensor)
    else:
        module, _, leaf = (
            name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".").rpartition(".")
        )
        target, is_base_layer = f"{module.removesuffix('.base_layer')}.{leaf}", module.endswith(".base_layer")
        is_lora = module.removesuffix(".base_layer") in changes.layers
        if target not in known or is_lora != is_base_layer or module in tokens:
            raise InputError(
                f"adapter tensor {name!r} belongs to nothing that adapter_config.json and the base have, so peft would "
                f"ignore it; {MERGE}"
            )
        is_saved = any(config.saves(parent) for parent in _parents(module))
        (changes.saved if is_saved else changes.base)[target] = tensor


def _parents(module: str) -> Iterable[str]:
    """A module's name and those of the modules around it."""
    parts = module.split(".")
    return (".".join(parts[:count]) for count in range(len(parts), 0, -1))


def _is_target(config: AdapterConfig, model: PreTrainedModel, modules: Mapping[str, nn.Module], name: str) -> bool:
    module = modules[name]
    if config.target_modules == "all-linear":
        is_linear = isinstance(module, nn.Linear) or is_transposed(module)
        return is_linear and module is not model.get_output_embeddings() and not config.saves(name)
    return config.targets(name)


def _is_transposed(module: nn.Module, name: str) -> bool:
    """Orientation follows from the layer's class, as peft decides it."""
    if is_transposed(module) or isinstance(module, nn.Embedding):
        return True
    if isinstance(module, nn.Linear):
        return False
    raise InputError(
        f"adapter_config.json targets {name}, a {type(module).__name__}; LoRA on linear layers and embeddings is "
        f"supported; {MERGE}"
    )


def _token_layers(
    config: AdapterConfig, model: PreTrainedModel, modules: Mapping[str, nn.Module]
) -> dict[str, tuple[int, ...]]:
    """Embeddings whose rows were trained, with the ids."""
    chosen = config.trainable_tokens
    if not chosen:
        return {}
    if not isinstance(chosen, Mapping):
        embeddings = model.get_input_embeddings()
        return {next(name for name, module in modules.items() if module is embeddings): chosen}
    found = {name: ids for name in modules if name for key, ids in chosen.items() if name.endswith(key)}
    if len(found) != len(chosen):
        raise InputError(
            f"adapter_config.json: trainable_token_indices = {dict(chosen)!r} names {len(found)} layers of the base; "
            f"{MERGE}"
        )
    ties = tied_names(model)

    def source_of(name: str) -> str:
        return ties.get(f"{name}.weight", "").rpartition(".")[0]

    # Of a tied pair with the same ids, peft trains the input embedding's rows and shares them.
    return {name: ids for name, ids in found.items() if found.get(source_of(name)) != ids}


def _require_complete(config: AdapterConfig, model: PreTrainedModel, changes: _Changes) -> None:
    """Refuse an adapter that lacks a tensor its config promises: peft would leave it at its initialization."""
    for layer in changes.layers.values():
        for part in ("A", "B", *(["magnitude"] if config.use_dora else [])):
            if part not in layer.parts:
                raise InputError(
                    f"adapter_config.json targets {layer.name}, but the adapter has no {part} for it; save the adapter "
                    "again with `model.save_pretrained`"
                )
        if "magnitude" in layer.parts and not config.use_dora:
            raise InputError(f"the adapter has a magnitude for {layer.name}, but use_dora is not set; {MERGE}")
    known = set(model.state_dict())
    saved = {name for name in known for parent in _parents(name.rpartition(".")[0]) if config.saves(parent)}
    if saved - changes.saved.keys():
        raise InputError(
            f"adapter_config.json: modules_to_save names {min(saved - changes.saved.keys())}, which the adapter does "
            "not hold; save the adapter again with `model.save_pretrained`"
        )
    for module in _token_layers(config, model, dict(model.named_modules(remove_duplicate=False))):
        if f"{module}.weight" not in changes.rows:
            raise InputError(
                f"adapter_config.json: trainable_token_indices names rows of {module}, which the adapter does not "
                "hold; save the adapter again with `model.save_pretrained`"
            )


# --- Tied embeddings ----------------------------------------------------------------------------------------------


def _untied(ties: Mapping[str, str], changes: _Changes) -> dict[str, str]:
    """Tied tensors of which the adapter changes one side alone; trained rows of the input embedding change both."""
    changed = _weights(changes) | changes.saved.keys() | changes.rows.keys()
    apart = {name: source for name, source in ties.items() if name in changed or source in changed}
    return {name: source for name, source in apart.items() if not _shares_rows(name, source, changed, changes)}


def _require_no_forced_tie(config: AdapterConfig, ties: Mapping[str, str]) -> None:
    """Peft then trains both sides as one, under names of its own; trained rows are shared anyway."""
    for name in sorted({*ties, *ties.values()}):
        module = name.rpartition(".")[0]
        if config.ensure_weight_tying and (config.saves(module) or config.targets(module)):
            raise InputError(
                f"adapter_config.json: ensure_weight_tying = True is not supported for {module}, which is tied; {MERGE}"
            )


def _shares_rows(name: str, source: str, changed: set[str], changes: _Changes) -> bool:
    """Whether both sides get the same new rows and nothing else."""
    others = _weights(changes) | changes.saved.keys()
    if {name, source} & others or source not in changes.rows:
        return False
    return name not in changed or changes.rows[name][0] == changes.rows[source][0]


def _without_tie(architecture: dict[str, Any], untied: Mapping[str, str]) -> dict[str, Any]:
    found = {
        key: {**value, "tie_word_embeddings": False} if isinstance(value, Mapping) and "vocab_size" in value else value
        for key, value in architecture.items()
    }
    found["tie_word_embeddings"] = False
    if tied_names(blank_model(found)).keys() & untied.keys():
        raise InputError(
            f"the adapter changes one side of the tied tensors {min(untied)} and {untied[min(untied)]}, and this "
            "architecture cannot untie them; merge the adapter with peft, set `config.tie_word_embeddings = False`, "
            "and give the result as the checkpoint without a base"
        )
    return found


# --- Applying -----------------------------------------------------------------------------------------------------


def _require_fit(config: AdapterConfig, full: Tensors, ties: Mapping[str, str], changes: _Changes) -> None:
    for layer in changes.layers.values():
        weight = _base_of(full, ties, f"{layer.name}.weight")
        rank = config.rank_of(layer.name)
        outputs, inputs = weight.shape[::-1] if layer.transposed else weight.shape
        wanted = {"A": (rank, inputs), "B": (outputs, rank), "magnitude": (outputs,), "bias": (outputs,)}
        for part, tensor in layer.parts.items():
            if tuple(tensor.shape) != wanted[part]:
                raise InputError(
                    f"adapter: {part} of {layer.name} has shape {tuple(tensor.shape)}, but adapter_config.json and the "
                    f"base ask for {wanted[part]}; give the base that the adapter was trained on"
                )
        if "bias" in layer.parts and f"{layer.name}.bias" not in full:
            raise InputError(
                f"adapter_config.json: lora_bias adds a bias to {layer.name}, which has none in the base, so it cannot "
                "be merged; train the adapter without lora_bias"
            )
        if "bias" in layer.parts and config.use_dora:
            raise InputError(f"adapter_config.json: lora_bias with use_dora is not supported; {MERGE}")
    for name, tensor in (*changes.base.items(), *changes.saved.items()):
        if (shape := _base_of(full, ties, name).shape) != tensor.shape:
            raise InputError(
                f"adapter tensor {name!r} has shape {tuple(tensor.shape)}, but the base's has {tuple(shape)}; give the "
                "base that the adapter was trained on"
            )
    for name, (ids, rows) in changes.rows.items():
        weight = _base_of(full, ties, name)
        if rows.shape != (len(ids), weight.shape[1]) or max(ids) >= len(weight) or len(set(ids)) != len(ids):
            raise InputError(
                f"adapter: rows {tuple(rows.shape)} for the tokens {list(ids)[:5]} do not fit {name} "
                f"{tuple(weight.shape)}; give the base that the adapter was trained on"
            )


def _base_of(full: Tensors, ties: Mapping[str, str], name: str) -> torch.Tensor:
    name = name if name in full else ties.get(name, name)
    if name not in full:
        raise InputError(f"the adapter changes {name!r}, which the base does not store under this name; {MERGE}")
    return full[name]


def _bias(config: AdapterConfig, layer: _Layer, start: torch.Tensor) -> torch.Tensor:
    return (start.float() + config.scaling_of(layer.name) * layer.parts["bias"].float()).to(start.dtype)


def _replaced_base(full: Tensors, ties: Mapping[str, str], untied: Mapping[str, str], changes: _Changes) -> Tensors:
    """Tensors of the base model that the adapter holds; both sides of a pair that was tied get them."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in changes.base.items():
        source = ties.get(name, name)
        sides = [source, *(other for other, kept in untied.items() if kept == source)]
        for side in sides:
            if side in found and not torch.equal(found[side], tensor):
                raise InputError(f"the adapter holds two values of {side!r}, which is tied; {MERGE}")
            found[side] = tensor
    return {name: tensor for name, tensor in found.items() if not torch.equal(tensor.to(full[name].dtype), full[name])}


def _as_factors(
    config: AdapterConfig,
    base: Tensors,
    full: Tensors,
    ties: Mapping[str, str],
    changes: _Changes,
    untied: Mapping[str, str],
) -> WeightDelta:
    """The adapter's own tensors. A layer with another orientation or scaling than the rest has it in its factors."""
    replaced = _replaced_base(full, ties, untied, changes)
    tensors = {**replaced, **changes.saved}
    if _weights(changes) & replaced.keys():
        return _as_difference(config, base, full, ties, changes, untied)
    transposed = bool(changes.layers) and all(layer.transposed for layer in changes.layers.values())
    scaling = config.scaling or next((config.scaling_of(name) for name in changes.layers), 0.0)
    for layer in changes.layers.values():
        left, right = _scaled(layer.parts["B"], config.scaling_of(layer.name), scaling), layer.parts["A"]
        if layer.transposed != transposed:
            left, right = right.T.contiguous(), left.T.contiguous()
        tensors |= {f"{layer.name}.lora_A.weight": right, f"{layer.name}.lora_B.weight": left}
        if "bias" in layer.parts:
            name = f"{layer.name}.bias"
            tensors[name] = _bias(config, layer, tensors.get(name, full[name]))
    return adapter_delta(base, tensors, scaling=scaling, transposed=transposed, untied=untied)


def _scaled(factor: torch.Tensor, wanted: float, common: float) -> torch.Tensor:
    """A factor times wanted / common: as it is where they agree, and exact for powers of two."""
    if wanted == common:
        return factor
    if common == 0:
        raise InputError(
            "adapter_config.json: lora_alpha = 0 beside an alpha_pattern is not supported; merge it with peft"
        )
    ratio = wanted / common
    if ratio and math.frexp(ratio)[0] == 0.5:
        scaled = factor * ratio
        if torch.equal(scaled.double(), factor.double() * ratio):
            return scaled
    return (factor.double() * ratio).float()


def _as_difference(
    config: AdapterConfig,
    base: Tensors,
    full: Tensors,
    ties: Mapping[str, str],
    changes: _Changes,
    untied: Mapping[str, str],
) -> WeightDelta:
    """The merged weights, less the base's."""
    changed = dict(_replaced_base(full, ties, untied, changes))
    tuned = OverlaidTensors(full, changed)
    changed |= {name: tensor.to(full[name].dtype) for name, tensor in changes.saved.items()}
    for layer in changes.layers.values():
        weight = f"{layer.name}.weight"
        changed[weight] = _merged(config, layer, tuned[weight].float()).to(full[weight].dtype)
        if "bias" in layer.parts:
            changed[f"{layer.name}.bias"] = _bias(config, layer, tuned[f"{layer.name}.bias"])
    for name, (ids, rows) in changes.rows.items():
        if name in tuned:
            changed[name] = tuned[name].index_copy(0, torch.tensor(ids), rows.to(full[name].dtype))
    changed |= {name: tensor.to(full[name].dtype) for name, tensor in changed.items()}
    return difference(base, tuned, untied=untied)


def _merged(config: AdapterConfig, layer: _Layer, start: torch.Tensor) -> torch.Tensor:
    update = low_rank_product(layer.parts["B"], layer.parts["A"], config.scaling_of(layer.name))
    merged = (start.T if layer.transposed else start) + update
    if config.use_dora:
        norm = merged.double().norm(dim=1)
        merged = (layer.parts["magnitude"].double() / norm)[:, None].float() * merged
    return merged.T.contiguous() if layer.transposed else merged
